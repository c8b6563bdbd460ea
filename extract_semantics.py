"""Stage 2: give every SID token a meaning: a description and 10-20 keywords, from the items that carry it.

A teacher sees a sample of the token's items and says what they share. TS-Rec (arXiv 2602.22632), section 4.1:

    Eq. 6   I_s = { i in I : s in e_i }           the cluster of token s: the items whose SID e_i contains s
    Eq. 7   D_s, W_s = teacher(sample of I_s)     description D_s (for TS-Align), keywords W_s (for SA-Init)

Reads   RUN/items.jsonl (with "sid": ["<a_12>", "<b_7>", "<c_3>"])
Writes  RUN/semantics.jsonl, one line per token in use, by level, then code: {"token": "<a_12>",
        "description": str, "keywords": [str], "n_items": int, "sampled": [item_id], "source": "tfidf"}

Differs from the paper
  1. `--teacher tfidf` is no language model and needs no download: the keywords are the words and two-word
     phrases that set the sample apart from the catalogue; the description is a template filled with what the
     items are, are made of and are for. Both keep the rules of the paper's prompt (appendix A.1): 10-20
     keywords, one neutral paragraph of at most five sentences, no brands, no exact measures, no promotion.
  2. Only the sample speaks, as in eq. 7, however large the cluster; a larger `--sample` hears more of it.
  3. A few items with short titles can give fewer than 10 keywords, but never none.

Examples
  python extract_semantics.py                                      # the demo: 3 s on one core
  python extract_semantics.py --run runs/industrial --sample 50    # 3,686 items, 560 tokens: 8 s on one core
"""
import argparse
import html
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from tqdm import tqdm

from tokenize_items import parse_sid_token, read_catalogue, write_jsonl

MIN_KEYWORDS, MAX_KEYWORDS = 10, 20
FIELDS = {"title": 1.0, "categories": 0.5, "description": 0.3}      # what a term in each of them weighs
MAX_WORDS = 150                                 # words of a field that count: what follows is boilerplate
POOL, MIN_GAIN, DAMPING = 80, 0.1, 0.25         # see choose_keywords
NARROW = 0.6                                    # share of one kind of item that makes a cluster narrow

# Words that are never keywords: function words, shop talk, promotion; units and packs; colours
STOP_WORDS = frozenset("""
a about above across add additional affordable after against all allow allowing along also always amazing
amazon among an and another any anyone anything are area around as at authentic available avoid award away
awesome back backed based be beautiful because been before beginner being below best better between both
brand bring but by can cart case cheap choose com come common company compared competitive complete connect
contact contain content convenience convenient cool customer daily deal dependable depending description
design designed desired different discount do down due during each easier easy ebay economical effective
efficient either end enjoy enough ensure etc even every everyday excellent exclusive extra fantastic fast
favorite feature find finest first fit flawless for free from full fully get gift give go going good great
group guarantee guaranteed happy has have having help high highest hold how ideal if important improved in
inc include included including incredible information innovative inside intended into is it item job just
keep large last lasting leading legendary less let level like limited listing long longer look love low lower
made main make making manufactured manufacturer many maximum may means measure meet method model money more
most much multiple must name need needed never new next no not note now number of off offer often on once one
only open or order original other our out outstanding over overall own package packaged part perfect piece
place please pleased plus pre premier premium prevent price pride product project proven provide provided
purchase purpose quality range rated rating re read recommend recommended reduce refund regular reliable
require required resist result right run same satisfaction satisfied save see seller service set ship
shipping should show side similar simple single size sized small so some special specific specification start
states step still store such superb superior support take than that the their them then there these they this
those three through time to together too top trusted two type typical ultimate under unique unit united up us
usa use used useful user using value variety various version very want warning warranty was way we well what
when where whether which while wide will with within without won wonderful work working world worry year yes
yet you your
""".split())
UNITS = frozenset("""
amp box cc cm count ct cup dia diameter dozen ea feet female foot ft gal gallon gram gsm height hz id inch kg
khz lb length liter litre mah male max meters metric mhz mic micron mil min minute ml mm nominal od ohm ounce
oz pack pair pc pieces pint pk pound psi qty quantity quart roll rpm second seconds square thick thickness ul
volt watt weighs weight width yard yd
""".split())
COLOURS = frozenset("""
black blue brown clear color colors colour gray green grey orange pink purple red white yellow
""".split())
BLOCKED = STOP_WORDS | UNITS | COLOURS
NOT_ADVERBS = frozenset("assembly belly family fly jelly ply poly supply".split())
SHORT = frozenset("2d 3d ac dc ph tv uv".split())                   # words of two letters
# Words that say neither what an item is nor what it is for: "ideal for indoor jobs"
VAGUE = frozenset("""accuracy application capacity commercial compatible degree electrical home household
indoor industrial industry job outdoor professional project repellent resistant task""".split())
MATERIALS = frozenset("""
acetal acrylic aluminium aluminum bamboo brass bronze carbide ceramic copper cotton epoxy fabric fiberglass
foam glass iron latex leather metal neodymium nitrile nylon oak paper pine plastic polycarbonate polyester
polyethylene polyolefin polypropylene polyurethane porcelain pvc rubber silicone silk steel titanium vinyl
wood wool zinc
""".split())
UNCOUNTED = ("tubing", "coating", "wiring", "sheeting", "lighting", "piping", "equipment", "hardware", "oil",
             "grease", "putty", "soil", "trash", "waste", "water", "glycol", "caulk", "glue", *MATERIALS)
BOILERPLATE = re.compile(
    r"<[^<>]{1,300}>|https?://\S+|www\.\S+|amazon\.com|product descriptions?|from the manufacturer"
    r"|money[- ]back|country of origin[^.]*|made in (?:the )?\w+|high[- ]quality"
    r"|package (?:includes?|contents?|list)|(?:part|model|item) (?:number|no\b)[^.,]*", re.I)
DIMENSION = re.compile(r"\b([23])[- ]?d\b-?", re.I)                 # 3-D, 3d -> 3D
PREFIX = re.compile(r"\b(non|self|multi|anti|semi|pre|ultra|double|heavy(?=.duty))[- ]+(?=[a-z])", re.I)
CHUNK = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]")
CAMEL = re.compile(r"[a-z][A-Z]")               # KwikWeld: a trade name, or words that a scraper glued
PHRASE_END = re.compile(r"\s(?:for|with|by|in|to|from)\s|[,(/:;|]|\s[-–]\s|\sw/", re.I)
TITLE_USE = re.compile(r"\bfor ([^.,;:()]{3,40})", re.I)
USE = re.compile(r"\b(?:ideal|perfect|great|excellent|suitable|suited|designed|used?|intended|recommended)"
                 r" (?:for|in|on|to) ([^.,;:()]{3,60})", re.I)
SIZE = re.compile(r"\d[\s-]*(?:\"|''|(?:mm|cm|inch|in|ft|feet|yards?|oz|ounce|ml|lbs?|kg|gal)\b)", re.I)

SUBJECTS = ("product family", "product group", "set of products")   # by level, so that no two levels agree
OPENINGS = {
    "uniform": ("This {subject} consists of {first}.", "This {subject} is made up of {first}."),
    "narrow": ("This {subject} comprises {first}, together with {rest}.",
               "{first} make up most of this {subject}, which also holds {rest}.",
               "At the core of this {subject} are {first}; {rest} complete it."),
    "broad": ("This {subject} is broad, spanning {all}.", "This {subject} brings together {all}.",
              "Items as different as {all} meet in this {subject}.")}
MADE_OF = ("Typical materials are {}.", "The items are often made of {}.", "Materials such as {} recur.")
MARKS = ("They are marked by terms such as {}.", "Recurring themes are {}.", "Common traits concern {}.")
USES = ("They serve uses such as {}.", "Common applications involve {}.", "They are meant for {}.")


@dataclass
class Profile:
    """What one item says: its terms with their weights, what it is, what it is for, whether sizes vary."""
    terms: dict[str, float]
    sized: bool
    head: str = ""
    uses: frozenset[str] = frozenset()


@dataclass
class Catalogue:
    """What the teacher knows beside the sample. A term is a singular word, or two joined by a blank."""
    profiles: dict[int | str, Profile]          # by item_id
    df: Counter                                 # term -> items that use it
    title_df: Counter                           # term -> items that have it in the title
    last: Counter                               # word -> items with a phrase in the title that it ends
    doubtful: set[str]                          # words in capitals only, of one or two brands: trade names
    use_df: Counter                             # use -> items that are meant for it
    spelling: dict[str, str]                    # term -> its most frequent spelling


# ---------------------------------------------------------------------------------------------------------
# Clusters, eq. 6
# ---------------------------------------------------------------------------------------------------------

def make_clusters(items: list[dict]) -> dict[str, list[dict]]:
    """Collect the items of every token in use; tokens by level, then code."""
    clusters = defaultdict(list)
    for item in items:
        for token in item["sid"]:
            clusters[token].append(item)
    return {token: clusters[token] for token in sorted(clusters, key=parse_sid_token)}


def draw_sample(token: str, cluster: list[dict], size: int, seed: int) -> list[dict]:
    """Draw at most `size` items, from a stream of the token's own: other tokens change nothing."""
    return random.Random(f"{seed} {token}").sample(cluster, min(size, len(cluster)))


# ---------------------------------------------------------------------------------------------------------
# The catalogue: words, terms, what an item is and what it is for
# ---------------------------------------------------------------------------------------------------------

def clean(text: str, brand: str) -> str:
    """Undo what scraping left (entities, tags, shop phrases) and take the item's own brand out."""
    text = html.unescape(html.unescape(text))
    if brand:
        text = re.sub(rf"(?<!\w){re.escape(brand)}(?!\w)", " . ", text, flags=re.I if " " in brand else 0)
    return BOILERPLATE.sub(" . ", text)


def split_words(text: str) -> list[str]:
    """Split into words, "" for a break: "Arrow T50 Heavy Duty Gun" -> ["Arrow", "", "Heavy-Duty", "Gun"]."""
    words = []
    for chunk in CHUNK.findall(PREFIX.sub(r"\1-", DIMENSION.sub(r"\1D ", text))):
        if chunk in ("2D", "3D") or PREFIX.match(chunk):
            words.append(chunk)
        elif not chunk[0].isalpha() or any(c.isdigit() for c in chunk) or CAMEL.search(chunk):
            words.append("")
        else:
            words += re.sub(r"['’](?:s\b)?", "", chunk).split("-")
    return words


def find_names(items: list[dict], texts: list[set[str]]) -> set[str]:
    """The words of the brands that are no ordinary words; texts: the words of each item.

    A word is ordinary if enough items of other brands use it, and spell it in lower case, or very many use it
    at all: "tools" stays although there is a Precision Tools, "stanley" goes.
    """
    own, plain, named = Counter(), Counter(), Counter()
    for item, words in zip(items, texts):
        mine = set(split_words(item["brand"].lower()))
        own.update(mine)
        plain.update({word for word in words if word.islower()} - mine)
        named.update({word.lower() for word in words} - mine)
    rare = {word for word, n in own.items() if plain[word] <= max(1, n / 2) or 3 * plain[word] < named[word]}
    return {word for word in rare if named[word] < 10 * own[word]} - SHORT


def singular(word: str, vocabulary: set[str]) -> str:
    """"brushes" -> "brush", "brass" -> "brass": strip a plural ending only where that leaves a known word."""
    for ending, stem in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")):
            if word[:-len(ending)] + stem in vocabulary:
                return word[:-len(ending)] + stem
    return word


def make_lexicon(texts: list[set[str]], names: set[str]) -> dict[str, tuple[str, str]]:
    """Map every word worth a keyword to (singular, spelling): "Staples" to ("staple", "staples")."""
    forms = Counter(word for words in texts for word in words)
    vocabulary, unwanted, lexicon = {word.lower() for word in forms}, names | BLOCKED, {}
    for word in forms:
        lower = word.lower()
        stem = singular(lower, vocabulary)
        adverb = lower.endswith("ly") and lower not in NOT_ADVERBS
        blocked = {lower, stem, singular(lower, unwanted)} & unwanted
        if not (adverb or blocked or len(lower) < 3 and lower not in SHORT):
            acronym = len(word) < 5 and forms[word.upper()] > forms[lower] + forms[word.capitalize()]
            lexicon[word] = stem, word.upper() if acronym else lower
    return lexicon


def content_runs(words: list[str], lexicon: dict) -> list[list[tuple[str, str]]]:
    """Cut a word list at everything that is not in the lexicon; each word as (singular, spelling)."""
    runs = [[]]
    for word in words:
        if word in lexicon:
            runs[-1].append(lexicon[word])
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def is_thing(word: str, catalogue: Catalogue) -> bool:
    """Does the word mostly end phrases of titles, as "brush" does, or rather start them, as "hard" does?"""
    participle = word.endswith("ed") and len(word) > 5
    return word not in VAGUE and not participle and 2 * catalogue.last[word] >= catalogue.title_df[word] > 0


def find_head(runs: list[list[str]], catalogue: Catalogue) -> str:
    """What an item is, "cup brush" or "3d printer filament": the end of its title's first phrase for a thing.

    runs: the title's phrases; a material ("brass") is not what an item is.
    """
    runs = [[word for word in dict.fromkeys(run) if word not in catalogue.doubtful] for run in runs]
    runs = [run for run in runs if run and run[-1] not in VAGUE]
    things = [run for run in runs if run[-1] not in MATERIALS and is_thing(run[-1], catalogue)]
    run = next((run for run in things if len(run) > 1), (things or runs or [[]])[0])
    first, second = " ".join(run[-3:-1]), " ".join(run[-2:])
    extend = len(run) > 2 and catalogue.title_df[first] > catalogue.title_df[second]
    return " ".join(run[-3:]) if extend else second


def find_uses(title: str, description: str, lexicon: dict, catalogue: Catalogue) -> frozenset[str]:
    """What an item is for, activities or things of one or two words: "ideal for jobs such as wiring"."""
    uses = set()
    for phrase in TITLE_USE.findall(title) + USE.findall(description):
        for run in content_runs(split_words(phrase), lexicon)[:2]:
            run = [stem for stem, _ in run if stem not in VAGUE and stem not in catalogue.doubtful][:2]
            uses |= {" ".join(run[:n]) for n in range(1, len(run) + 1)
                     if run[0].endswith("ing") or is_thing(run[n - 1], catalogue)}
    return frozenset(uses)


def study(items: list[dict]) -> Catalogue:
    """Read every item once: its terms, what it is, what it is for, and the counts over all items."""
    texts = [{field: clean(item[field], item["brand"]) for field in FIELDS} for item in items]
    words = [{field: split_words(text)[:MAX_WORDS] for field, text in fields.items()} for fields in texts]
    bags = [set().union(*fields.values()) - {""} for fields in words]
    lexicon = make_lexicon(bags, find_names(items, bags))
    all_brands = {" ".join(split_words(item["brand"].lower())) for item in items}
    catalogue = Catalogue({}, Counter(), Counter(), Counter(), set(), Counter(), {})
    spellings, brands, titles = defaultdict(Counter), defaultdict(set), []
    for item, fields, text in zip(items, words, texts):
        terms = {}
        for field, weight in FIELDS.items():
            for run in content_runs(fields[field], lexicon):
                pairs = [(f"{a} {b}", f"{x} {y}") for (a, x), (b, y) in zip(run, run[1:]) if a != b]
                for term, spelling in run + [pair for pair in pairs if pair[1].lower() not in all_brands]:
                    terms.setdefault(term, weight)
                    spellings[term][spelling] += 1
                for word, _ in run:
                    brands[word].add(item["brand"])
        titles.append([[stem for stem, _ in run] for part in PHRASE_END.split(text["title"])
                       for run in content_runs(split_words(part), lexicon)])
        catalogue.df.update(terms.keys())
        catalogue.title_df.update(term for term, weight in terms.items() if weight == FIELDS["title"])
        catalogue.last.update({run[-1] for run in titles[-1]})
        catalogue.profiles[item["item_id"]] = Profile(terms, bool(SIZE.search(text["title"])))
    plain = {lexicon[word][0] for bag in bags for word in bag if word.islower() and word in lexicon}
    catalogue.doubtful = {word for word, users in brands.items() if len(users) < 3 and word not in plain}
    catalogue.spelling = {term: min(n, key=lambda form: (-n[form], form)) for term, n in spellings.items()}
    for profile, runs, text in zip(catalogue.profiles.values(), titles, texts):
        profile.head = find_head(runs, catalogue)
        profile.uses = find_uses(text["title"], text["description"], lexicon, catalogue)
        catalogue.use_df.update(profile.uses)
    return catalogue


# ---------------------------------------------------------------------------------------------------------
# The offline teacher, eq. 7: keywords, then the description
# ---------------------------------------------------------------------------------------------------------

def score_terms(profiles: list[Profile], catalogue: Catalogue) -> dict[str, float]:
    """Score each term by its lift, log(share of the sample that uses it / share of the catalogue).

    Terms of one item count half, trade names and words of no title a fifth, what an item is half again more.
    A word that comes mostly in one phrase gives way to the phrase.
    """
    count = Counter(term for profile in profiles for term in profile.terms)
    heads = {" ".join(profile.head.split()[-n:]) for profile in profiles for n in (1, 2)}
    total, df, title_df, scores = len(catalogue.profiles), catalogue.df, catalogue.title_df, {}
    smooth = total / 500                        # a term of one item in thousands says little, however rare
    for term, n in count.items():
        words = term.split()
        lift = math.log(n / len(profiles) * (total + smooth) / (df[term] + smooth))
        known = df[term] >= min(3, 1 + total / 1000) and title_df[term] and is_thing(words[-1], catalogue)
        if lift > 0.05 and (len(words) == 1 or known):
            doubt = not title_df[term] or not catalogue.doubtful.isdisjoint(words)
            scores[term] = lift * (1 - 0.5 / n) * (0.2 if doubt else 1.5 if term in heads else 1)
    for term in [term for term in scores if " " in term]:
        for word in term.split():
            if count[term] >= 0.6 * count[word]:
                scores.pop(word, None)
    return scores


def choose_keywords(profiles: list[Profile], catalogue: Catalogue) -> list[str]:
    """Pick 10-20 terms greedily by score x weight; an item that has had its say counts less the next time."""
    scores, holders = score_terms(profiles, catalogue), defaultdict(list)
    for index, profile in enumerate(profiles):
        for term, weight in profile.terms.items():
            holders[term].append((index, weight))
    total = {term: sum(weight for _, weight in held) for term, held in holders.items()}
    pool = sorted(total, key=lambda term: (-total[term] * scores.get(term, 0), -total[term], term))[:POOL]
    voice, used, chosen, best_gain = [1.0] * len(profiles), Counter(), [], 0.0
    while pool and len(chosen) < MAX_KEYWORDS:
        gains = {term: scores.get(term, 0) * sum(w * voice[i] for i, w in holders[term]) for term in pool}
        best = max(pool, key=gains.get)
        best_gain = max(best_gain, gains[best])
        if len(chosen) >= MIN_KEYWORDS and gains[best] <= MIN_GAIN * best_gain:
            break
        pool.remove(best)
        words = best.split()
        if all(used[word] for word in words) or any(used[word] > 2 for word in words):
            continue
        chosen.append(best)
        used.update(words)
        for i, weight in holders[best]:
            voice[i] *= 1 - DAMPING * weight
    return chosen


def any_words(items: list[dict]) -> list[str]:
    """The last resort where titles and descriptions hold nothing worth a keyword: any words at all."""
    words = [word.lower() for item in items for field in FIELDS for word in split_words(item[field]) if word]
    return list(dict.fromkeys(words))[:MAX_KEYWORDS] or ["product"]


def spell(term: str, catalogue: Catalogue) -> str:
    """A term as the catalogue mostly spells it: "3d printer" -> "3D printer", "cable tie" -> "cable ties"."""
    *first, last = term.split()
    first = [word.upper() if catalogue.spelling.get(word, "").isupper() else word for word in first]
    return catalogue.spelling.get(term) or " ".join([*first, catalogue.spelling.get(last, last)])


def plural(term: str, catalogue: Catalogue) -> str:
    """"cup brush" -> "cup brushes"; what is a plural already or cannot be counted stays."""
    phrase = spell(term, catalogue)
    if phrase.split()[-1].isupper() or phrase.endswith(("s", *UNCOUNTED)) and not phrase.endswith("ss"):
        return phrase
    if phrase.endswith("y") and phrase[-2] not in "aeiou":
        return phrase[:-1] + "ies"
    return phrase + ("es" if phrase.endswith(("s", "x", "z", "ch", "sh")) else "s")


def listing(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def name_kinds(profiles: list[Profile]) -> tuple[list[str], float]:
    """The kinds of item in a sample as terms, most frequent first, and the share of the first."""
    groups = defaultdict(Counter)
    for head in filter(None, (profile.head for profile in profiles)):
        groups[head.split()[-1]][head] += 1
    order = sorted(groups, key=lambda last: (-groups[last].total(), last))
    best = [max(groups[last].items(), key=lambda pair: (pair[1], pair[0])) for last in order]
    kinds = [head if 2 * n >= groups[last].total() else last for last, (head, n) in zip(order, best)]
    return kinds, groups[order[0]].total() / len(profiles) if order else 0.0


def most_shared(sets: list[set[str]], df: Counter) -> list[tuple[str, int]]:
    """The terms of the sets and how many sets have each, most shared first, then those rare elsewhere."""
    return sorted(Counter(term for terms in sets for term in terms).items(),
                  key=lambda pair: (-pair[1], df[pair[0]], pair[0]))


def describe(token: str, profiles: list[Profile], keywords: list[str], catalogue: Catalogue) -> str:
    """Write the paragraph: what the items are, what of, what sets them apart, what for; wording by token."""
    terms, share = name_kinds(profiles)
    kinds = [plural(term, catalogue) for term in terms] or [spell(keyword, catalogue) for keyword in keywords]
    materials = [spell(word, catalogue) for word, n in most_shared(
        [MATERIALS & p.terms.keys() for p in profiles], catalogue.df) if n > len(profiles) // 7]
    told = {word for term in (terms or keywords)[:5] for word in term.split()} | MATERIALS
    marks = [spell(keyword, catalogue) for keyword in keywords if told.isdisjoint(keyword.split())]
    common = min(2, len(catalogue.profiles) // 500)
    uses = [spell(use, catalogue) for use, n in most_shared([p.uses for p in profiles], catalogue.use_df)
            if catalogue.use_df[use] > common and (n > 1 or use.split()[0].endswith("ing"))]
    style = crc32(token.encode())
    openings = OPENINGS["uniform" if len(kinds) == 1 else "narrow" if share >= NARROW else "broad"]
    text = [openings[style % len(openings)].format(
        subject=SUBJECTS[parse_sid_token(token)[0] % len(SUBJECTS)],
        first=kinds[0], rest=listing(kinds[1:4]), all=listing(kinds[:5]))]
    for templates, words in ((MADE_OF, materials[:3]), (MARKS, marks[:5]), (USES, uses[:3])):
        style //= 5
        if words:
            text.append(templates[style % len(templates)].format(listing(words)))
    if sum(profile.sized for profile in profiles) > len(profiles) / 2:
        text.append("Various sizes are offered.")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in text)


def tfidf_teacher(token: str, sample: list[dict], catalogue: Catalogue) -> tuple[str, list[str], str]:
    """Say what sets the sample apart from the catalogue: (description, keywords, source)."""
    profiles = [catalogue.profiles[item["item_id"]] for item in sample]
    keywords = choose_keywords(profiles, catalogue) or any_words(sample)
    description = describe(token, profiles, keywords, catalogue)
    return description, [spell(keyword, catalogue) for keyword in keywords], "tfidf"


TEACHERS = {"tfidf": tfidf_teacher}     # name -> f(token, sample, catalogue): description, keywords, source


# ---------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/demo", help="folder of the run")
    files.add_argument("--items", help="catalogue with SIDs, instead of RUN/items.jsonl")
    files.add_argument("--out", help="output, instead of RUN/semantics.jsonl")
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", choices=sorted(TEACHERS), default="tfidf", help="who reads the items")
    teacher.add_argument("--sample", type=int, default=20, help="most items the teacher is shown of a token")
    parser.add_argument("--seed", type=int, default=42, help="seed of the samples")
    args = parser.parse_args(argv)
    if args.sample < 1:
        parser.error("--sample must be at least 1")
    return args


def report(rows: list[dict]) -> None:
    """Print what a reader checks first, and three of the tokens as they were written."""
    sizes = sorted(row["n_items"] for row in rows)
    levels = Counter(row["token"][1] for row in rows)
    words = sum(len(row["description"].split()) for row in rows) / len(rows)
    print("tokens in use per level " + ", ".join(f"{level} {n}" for level, n in levels.items())
          + f" | items per token: min {sizes[0]}, median {sizes[len(sizes) // 2]}, max {sizes[-1]}")
    few = sum(len(row["keywords"]) < MIN_KEYWORDS for row in rows)
    print(f"tokens with fewer than {MIN_KEYWORDS} keywords {few}"
          f" | words per description {words:.1f}"
          f" | repeated descriptions {len(rows) - len({row['description'] for row in rows})}")
    for row in rows[::-(-len(rows) // 3)]:
        print(f"example | {row['token']} {row['n_items']} items: {', '.join(row['keywords'])}\n"
              f"        | {row['description']}")


def main() -> None:
    args = parse_args()
    items = read_catalogue(args.items or Path(args.run) / "items.jsonl")
    out = Path(args.out or Path(args.run) / "semantics.jsonl")
    clusters, catalogue, rows = make_clusters(items), study(items), []
    print(f"teacher {args.teacher} | {len(items)} items, {len(clusters)} SID tokens in use | "
          f"at most {args.sample} items shown per token")
    for token, cluster in tqdm(clusters.items(), unit="token", delay=2):
        sample = draw_sample(token, cluster, args.sample, args.seed)
        description, keywords, source = TEACHERS[args.teacher](token, sample, catalogue)
        rows.append({"token": token, "description": description, "keywords": keywords,
                     "n_items": len(cluster), "sampled": [item["item_id"] for item in sample],
                     "source": source})
    write_jsonl(out, rows)
    report(rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
