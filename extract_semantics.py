"""Stage 2: give every SID token a meaning: a description and 10-20 keywords, from the items that carry it.

A teacher sees a sample of the token's items and says what they share. TS-Rec (arXiv 2602.22632), section 4.1:

    Eq. 6   I_s = { i in I : s in e_i }           the cluster of token s: the items whose SID e_i contains s
    Eq. 7   D_s, W_s = teacher(sample of I_s)     description D_s (for TS-Align), keywords W_s (for SA-Init)

Reads   RUN/items.jsonl (with "sid": ["<a_12>", "<b_7>", "<c_3>"])
Writes  RUN/semantics.jsonl, one line per token in use, by level, then code: {"token": "<a_12>",
        "description": str, "keywords": [str], "n_items": int, "sampled": [item_id], "source": "tfidf"}

Differs from the paper
  1. `--teacher tfidf` is no language model and needs no download: the keywords are the words and two-word
     phrases that set the sample apart from the catalogue, the description fills templates. Both keep the
     rules of the paper's prompt (appendix A.1): no brands, no exact measures, no promotion.
  2. A few items with short titles can give fewer than 10 keywords, but never none.

Examples
  python extract_semantics.py                                      # the demo: 3 s on one core
  python extract_semantics.py --run runs/industrial --sample 50    # 3,686 items, 768 tokens: 6 s on one core
"""
import argparse
import html
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from zlib import crc32

from tqdm import tqdm

from tokenize_items import parse_sid_token, read_catalogue, write_jsonl

MIN_KEYWORDS, MAX_KEYWORDS = 10, 20
FIELDS = {"title": 1.0, "categories": 0.5, "description": 0.3}      # what a term in each of them weighs
POOL, MIN_GAIN, DAMPING = 80, 0.1, 0.25         # see choose_keywords

# Words that are never keywords: function words; shop talk and promotion; units, packs and colours
STOP_WORDS = frozenset("""
a all an and any are as at back be by can each etc for from full fully get good great has have if in inside
into is it made make making many may more most new no not of off on one only or other out over per so than
that the these this three time to two up use used using very way we when which will with without you your
amazing amazon application available best brand case common company compatible complete come count degree
design designed duty easy end excellent exclusive extra fast feature fit free general guarantee high heavy
hold ideal include included item large level long low manufactured maximum meet model multiple number offer
original overall package packaged part perfect piece place plus pre premium price pro product professional
project purpose quality quick range rated read right service set several shipping simple single size small
special specific step superior support task top type ultra united usa value variety various version warranty
wide work year amp box cm color dia diameter feet foot gal gallon gram height inch lb length male female max
measure meter metric mil ml mm ohm ounce oz pack pair pc pound psi qty quart roll square thick thickness volt
watt weight width yard black blue brown clear gray green grey orange pink purple red white yellow
""".split())
SHORT = frozenset("2d 3d ac dc ph tv uv".split())                   # words of two letters
MATERIALS = frozenset("""
acrylic aluminum bamboo brass bronze carbide ceramic copper cotton epoxy fabric foam glass iron latex leather
metal nylon paper plastic polyester polyethylene polypropylene pvc rubber silicone steel vinyl wood wool zinc
""".split())
MARKUP = re.compile(r"<[^<>]{1,300}>|https?://\S+|www\.\S+")
WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")

SUBJECTS = ("product family", "product group", "set of products")   # by level, so that no two levels agree
OPENINGS = ("This {} covers {}.", "This {} includes items such as {}.", "Typical of this {} is {}.")
MADE_OF = ("Typical materials are {}.", "The items are often made of {}.", "Materials such as {} recur.")
MARKS = ("They are marked by terms such as {}.", "Recurring themes are {}.", "Common traits concern {}.")


@dataclass
class Catalogue:
    """What the teacher knows beside the sample. A term is a singular word, or two joined by a blank."""
    terms: dict[int | str, dict[str, float]]    # item_id -> its terms with their weights
    titles: dict[int | str, list[list[str]]]    # item_id -> its title's phrases, as lists of words
    df: Counter                                 # term -> items that use it
    title_df: Counter                           # term -> items that have it in the title
    last: Counter                               # word -> items with a phrase in the title that it ends


# ---------------------------------------------------------------------------------------------------------
# Clusters, eq. 6, and the catalogue's words
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


def clean(text: str, brand: str) -> str:
    """Undo what scraping left (entities, tags, addresses) and take the item's own brand out."""
    text = MARKUP.sub(" . ", html.unescape(text))
    return re.sub(rf"(?<!\w){re.escape(brand)}(?!\w)", " . ", text, flags=re.I) if brand else text


def split_words(text: str) -> list[str]:
    """Split into words, "" for what is none: "Arrow T50 Non-Slip Gun" -> ["Arrow", "", "Non-Slip", "Gun"]."""
    return [chunk if all(part.isalpha() or part.lower() in SHORT for part in chunk.split("-")) else ""
            for chunk in WORD.findall(text)]


def find_names(items: list[dict], texts: list[set[str]]) -> set[str]:
    """The words that are brands or trade names; texts: the words of each item.

    "tools" stays although there is a Precision Tools: other brands spell it in lower case; "stanley" goes. A
    word of no brand is a trade name if it is never in lower case and at most three brands' items use it.
    """
    own, plain, users = Counter(), Counter(), defaultdict(set)
    for item, words in zip(items, texts):
        mine = set(split_words(item["brand"].lower()))
        own.update(mine)
        plain.update({word for word in words if word.islower()} - mine)
        for word in words:
            users[word.lower()].add(item["brand"])
    few = min(4, len(items) / 1000)             # a small catalogue is no judge of trade names
    return {word for word in {*own, *users}
            if plain[word] <= own[word] and len(users[word]) < max(few, 10 * own[word])} - SHORT


def singular(word: str, vocabulary: set[str]) -> str:
    """"brushes" -> "brush", "brass" -> "brass": strip a plural ending only where that leaves a known word."""
    for ending, stem in (("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")):
            if word[:-len(ending)] + stem in vocabulary:
                return word[:-len(ending)] + stem
    return word


def make_lexicon(texts: list[set[str]], names: set[str]) -> dict[str, str]:
    """Map every word worth a keyword to its singular: "Staples" to "staple"."""
    words, blocked, lexicon = set().union(*texts) - {""}, STOP_WORDS | names, {}
    vocabulary = {word.lower() for word in words} | blocked
    for word in words:
        stem = singular(word.lower(), vocabulary)
        short = len(stem) < 3 and stem not in SHORT
        adverb = len(stem) > 4 and stem.endswith("ly") and stem[:-2] in vocabulary
        if not short and not adverb and blocked.isdisjoint([word.lower(), stem, *stem.split("-")]):
            lexicon[word] = stem
    return lexicon


def find_phrases(words: list[str], lexicon: dict[str, str]) -> list[list[str]]:
    """Cut a word list at every word that is not in the lexicon; the words between, in the singular."""
    return [[lexicon[word] for word in run] for known, run in groupby(words, lexicon.__contains__) if known]


def study(items: list[dict]) -> Catalogue:
    """Read every item once: its terms, its title's phrases, and the counts over all items."""
    texts = [{field: split_words(clean(item[field], item["brand"])) for field in FIELDS} for item in items]
    bags = [set().union(*fields.values()) for fields in texts]
    lexicon = make_lexicon(bags, find_names(items, bags))
    catalogue = Catalogue({}, {}, Counter(), Counter(), Counter())
    for item, fields in zip(items, texts):
        terms = {}
        for field, weight in FIELDS.items():
            for phrase in find_phrases(fields[field], lexicon):
                for term in phrase + [f"{a} {b}" for a, b in zip(phrase, phrase[1:]) if a != b]:
                    terms.setdefault(term, weight)              # the title comes first and weighs most
        title = find_phrases(fields["title"], lexicon)
        catalogue.terms[item["item_id"]], catalogue.titles[item["item_id"]] = terms, title
        catalogue.df.update(terms.keys())
        catalogue.title_df.update(term for term, weight in terms.items() if weight == FIELDS["title"])
        catalogue.last.update({phrase[-1] for phrase in title})
    return catalogue


# ---------------------------------------------------------------------------------------------------------
# The offline teacher, eq. 7: keywords, then the description
# ---------------------------------------------------------------------------------------------------------

def is_thing(word: str, catalogue: Catalogue) -> bool:
    """Does the word mostly end phrases of titles, as "brush" does, or rather start them, as "hard" does?"""
    modifier = "-" in word or word.endswith("ed") and len(word) > 4        # rust-resistant, corded
    return not modifier and 2 * catalogue.last[word] >= catalogue.title_df[word] > 0


def find_kind(title: list[list[str]], catalogue: Catalogue) -> str:
    """What an item is, "cup brush" or "3d printer filament": the end of a phrase of its title, or ""."""
    things = [phrase for phrase in title if phrase[-1] not in MATERIALS and is_thing(phrase[-1], catalogue)]
    phrase = max(things, key=lambda phrase: len(phrase) > 1, default=[])    # the first of two words, if any
    first, second = " ".join(phrase[-3:-1]), " ".join(phrase[-2:])
    longer = len(phrase) > 2 and catalogue.title_df[first] > catalogue.title_df[second]
    return " ".join(phrase[-3:]) if longer else second


def score_terms(texts: list[dict[str, float]], catalogue: Catalogue) -> dict[str, float]:
    """Score each term by its lift, log(share of the sample that uses it / share of the catalogue).

    Terms of one item count half, words of no title a fifth. A phrase must name something and recur in titles;
    a word that comes mostly in one phrase gives way to it.
    """
    count, total, scores = Counter(term for terms in texts for term in terms), len(catalogue.terms), {}
    smooth = total / 500                        # a term of one item in thousands says little, however rare
    for term, n in count.items():
        last = term.split()[-1]
        thing = last in MATERIALS or is_thing(last, catalogue)
        if last == term or thing and catalogue.title_df[term] >= min(3, 1 + total / 1000):
            lift = math.log(n / len(texts) * (total + smooth) / (catalogue.df[term] + smooth))
            scores[term] = max(lift, 0.001) * (1 - 0.5 / n) * (1 if catalogue.title_df[term] else 0.2)
    for term in [term for term in scores if " " in term]:
        for word in term.split():
            if count[term] >= 0.6 * count[word]:
                scores.pop(word, None)
    return scores


def choose_keywords(texts: list[dict[str, float]], scores: dict[str, float]) -> list[str]:
    """Pick 10-20 terms greedily by score x weight; an item that has had its say counts less the next time."""
    gains = {term: [score * terms.get(term, 0) for terms in texts] for term, score in scores.items()}
    pool = sorted(gains, key=lambda term: -sum(gains[term]))[:POOL]
    voice, used, chosen = [1.0] * len(texts), Counter(), []
    while pool and len(chosen) < MAX_KEYWORDS:
        gain, best = max((sum(v * g for v, g in zip(voice, gains[term])), term) for term in pool)
        if len(chosen) >= MIN_KEYWORDS and gain <= MIN_GAIN * sum(gains[chosen[0]]):
            break
        pool.remove(best)
        words = best.split()
        if not all(used[word] for word in words) and not any(used[word] > 2 for word in words):
            chosen.append(best)
            used.update(words)
            voice = [v * (1 - DAMPING * terms.get(best, 0)) for v, terms in zip(voice, texts)]
    return chosen


def listing(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def describe(token: str, texts: list[dict[str, float]], kinds: list[str], keywords: list[str]) -> str:
    """Write the paragraph: what the items are, what of, what marks them; the wording varies by token."""
    kinds = [kind for kind, _ in Counter(filter(None, kinds)).most_common(5)] or keywords[:5]
    found = Counter(word for terms in texts for word in terms if word in MATERIALS)
    materials = [word for word, n in found.most_common(3) if 4 * n >= len(texts)]
    told = {word for kind in kinds for word in kind.split()} | MATERIALS
    marks = [keyword for keyword in keywords if told.isdisjoint(keyword.split())] or keywords
    style = crc32(token.encode())
    text = [OPENINGS[style % 3].format(SUBJECTS[parse_sid_token(token)[0] % 3], listing(kinds))]
    if materials:
        text.append(MADE_OF[style // 3 % 3].format(listing(materials)))
    text.append(MARKS[style // 9 % 3].format(listing(marks[:5])))
    return " ".join(text)


def tfidf_teacher(token: str, sample: list[dict], catalogue: Catalogue) -> tuple[str, list[str], str]:
    """Say what sets the sample apart from the catalogue: (description, keywords, source)."""
    texts = [catalogue.terms[item["item_id"]] for item in sample]
    kinds = [find_kind(catalogue.titles[item["item_id"]], catalogue) for item in sample]
    keywords = choose_keywords(texts, score_terms(texts, catalogue)) or ["product"]
    return describe(token, texts, kinds, keywords), keywords, "tfidf"


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
    few = sum(len(row["keywords"]) < MIN_KEYWORDS for row in rows)
    repeated = len(rows) - len({row["description"] for row in rows})
    print("tokens in use per level " + ", ".join(f"{level} {n}" for level, n in levels.items())
          + f" | items per token: min {sizes[0]}, median {sizes[len(sizes) // 2]}, max {sizes[-1]}")
    print(f"tokens with fewer than {MIN_KEYWORDS} keywords {few}"
          f" | words per description {words:.1f} | repeated descriptions {repeated}")
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
        sampled = [item["item_id"] for item in sample]
        rows.append({"token": token, "description": description, "keywords": keywords,
                     "n_items": len(cluster), "sampled": sampled, "source": source})
    write_jsonl(out, rows)
    report(rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
