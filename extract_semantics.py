"""Stage 2: give every SID token a meaning: a description and 10-20 keywords, from the items that carry it.

A teacher sees a sample of the token's items and says what they share. TS-Rec (arXiv 2602.22632), section 4.1:

    Eq. 6   I_s = { i in I : s in e_i }           the cluster of token s: the items whose SID e_i contains s
    Eq. 7   D_s, W_s = teacher(sample of I_s)     description D_s (for TS-Align), keywords W_s (for SA-Init)

`--queries N` adds N search queries per item, for the task query -> SID (STAR, appendix A.1.2: 5). STAR does not say
which are for testing; here it is one of each item's.

Reads   RUN/items.jsonl (with "sid": ["<a_12>", "<b_7>", "<c_3>"])
Writes  RUN/semantics.jsonl, one line per token in use, by level, then code: {"token": "<a_12>",
        "description": str, "keywords": [str], "n_items": int, "sampled": [item_id], "source": "tfidf"}
        RUN/queries.jsonl, with --queries: {"item_id": ..., "query": str, "split": "train" or "test"}
        RUN/teacher_cache.jsonl, with a language model: its good answers, so that a killed run goes on from there

Differs from the paper
  1. `--teacher tfidf` is no language model and needs no download: the keywords are the words and two-word phrases that
     set the sample apart from the catalogue, the description fills templates, the queries are words of the title, with
     brand or category at times, and a typo now and then. It keeps the rules of appendix A.1: no brands, no exact
     measures, no promotion. A few items with short titles can give it fewer than 10 keywords or N queries, never none.
  2. `--teacher http` (any OpenAI-compatible server) and `--teacher hf` (a local model) get the papers' prompts,
     shortened. An answer that breaks the rules is asked again with what was wrong; what is still bad then is made by
     tfidf, as "source" says.

Examples
  python extract_semantics.py                                      # the demo: 3 s on one core
  python extract_semantics.py --run runs/industrial --sample 50    # 3,686 items, 768 tokens: 6 s on one core
  python extract_semantics.py --teacher http --base-url https://api.deepseek.com --teacher-model deepseek-chat --dry-run
  python extract_semantics.py --teacher hf --teacher-model Qwen/Qwen2.5-7B-Instruct --queries 5
"""
import argparse
import hashlib
import html
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from zlib import crc32

import requests
import torch
from tqdm import tqdm

from tokenize_items import (ITEM_FIELDS, SEED, item_text, parse_sid_token, pick_device, read_catalogue, replacing, stop,
                            within, write_jsonl)

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
TYPO_RATE = 0.1                                 # share of the offline queries that get a typo

# What a language model is asked: the requirements of TS-Rec, appendix A.1, and of STAR, appendix A.2.2
MEANING_PROMPT = """You are a Senior Product Content Analyst and Catalog Specialist with expertise in {category} \
product classification and summarization. Analyze the items below, synthesize what they share into a single, cohesive \
"Product Family Description", then produce a related keyword list.
- Identify the functional, design, usage or performance traits that ALL listed items share.
- Describe the product family as a category, not the individual items: broad enough to encompass all of them, specific \
enough to convey meaningful shared traits.
- Write one continuous paragraph of 3-5 sentences, no bullet points: professional, neutral, objective third person; \
focused on function, durability, applicability or end-user benefits.
- Replace exact measurements, quantities and configurations with generalized terms (e.g., "various sizes").
- No brand names, proprietary technology names, marketing slogans or promotional adjectives; only verifiable facts.
- Extract 10-20 domain-relevant, semantically meaningful keywords from the description; none is only a number.

Items, one JSON object per line:
{items}

Answer in pure JSON, without any other text: {{"description": "...", "keywords": ["...", ...]}}"""
QUERIES_PROMPT = """You are an AI assistant specializing in generating realistic user search queries for products. \
Here is the JSON data of a product:
{item}

Generate exactly {count} different queries that users are most likely to search this specific product with. Consider \
brand, product type, specific features, use cases, and common misspellings or alternative names. Use natural language \
and phrasing of real users; vary length and specificity, broad and narrow terms; cover different aspects.

Answer in pure JSON, without any other text, {count} objects: [{{"query": "..."}}, ...]"""
ASK_AGAIN = "That answer cannot be used: {problem}. Give the corrected JSON, without any other text."
DESCRIPTION_CHARS = 1000                        # of an item's description, in a prompt
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b\w\.)\s+(?=\W*[A-Z])")       # not after "e.g." or "U.S."
CHARS_PER_TOKEN, MEANING_TOKENS, QUERY_TOKENS = 4, 230, 20              # estimates, for --dry-run
TRIES, FIRST_WAIT, MAX_WAIT, CONNECT_TIMEOUT = 7, 1.0, 120.0, 10.0      # --teacher http; seconds
MAX_NEW_TOKENS = 1024                                                   # --teacher hf


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


def clean(text: str, brand: str = "", gap: str = " . ") -> str:
    """Put `gap` for what scraping left (entities, tags, addresses), and for the item's own brand."""
    text = MARKUP.sub(gap, html.unescape(text))
    return re.sub(rf"(?<!\w){re.escape(brand)}(?!\w)", gap, text, flags=re.I) if brand else text


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


def study(items: list[dict]) -> Catalogue:
    """Read every item once: its terms, its title's phrases, and the counts over all items."""
    texts = [{field: split_words(clean(item[field], item["brand"])) for field in FIELDS} for item in items]
    bags = [set().union(*fields.values()) for fields in texts]
    lexicon = make_lexicon(bags, find_names(items, bags))
    catalogue = Catalogue({}, {}, Counter(), Counter(), Counter())
    for item, fields in zip(items, texts):
        terms, phrases = {}, {}
        for field, weight in FIELDS.items():
            runs = groupby(fields[field], lexicon.__contains__)         # a phrase: neighbours in the lexicon
            phrases[field] = [[lexicon[word] for word in run] for known, run in runs if known]
            for phrase in phrases[field]:
                for term in phrase + [f"{a} {b}" for a, b in zip(phrase, phrase[1:]) if a != b]:
                    terms.setdefault(term, weight)              # the title comes first and weighs most
        catalogue.terms[item["item_id"]], catalogue.titles[item["item_id"]] = terms, phrases["title"]
        catalogue.df.update(terms.keys())
        catalogue.title_df.update(term for term, weight in terms.items() if weight == FIELDS["title"])
        catalogue.last.update({phrase[-1] for phrase in phrases["title"]})
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


def tfidf_teacher(token: str, sample: list[dict], catalogue: Catalogue) -> tuple[str, list[str]]:
    """The description and the keywords of a sample: what the items are, what of, what marks them. Wording by token."""
    texts = [catalogue.terms[item["item_id"]] for item in sample]
    keywords = choose_keywords(texts, score_terms(texts, catalogue)) or ["product"]
    found = Counter(filter(None, (find_kind(catalogue.titles[item["item_id"]], catalogue) for item in sample)))
    kinds = [kind for kind, _ in found.most_common(5)] or keywords[:5]
    found = Counter(word for terms in texts for word in terms if word in MATERIALS)
    materials = [word for word, n in found.most_common(3) if 4 * n >= len(texts)]
    told = MATERIALS.union(*(kind.split() for kind in kinds))
    marks = [keyword for keyword in keywords if told.isdisjoint(keyword.split())] or keywords
    style = crc32(token.encode())
    text = [OPENINGS[style % 3].format(SUBJECTS[parse_sid_token(token)[0] % 3], listing(kinds))]
    if materials:
        text.append(MADE_OF[style // 3 % 3].format(listing(materials)))
    text.append(MARKS[style // 9 % 3].format(listing(marks[:5])))
    return " ".join(text), keywords


def mistype(query: str, rng: random.Random) -> str:
    """Swap two neighbouring letters inside a word, "glass beaker" -> "glass bekaer", where one is long enough."""
    places = [at for at in range(1, len(query) - 2) if query[at - 1:at + 3].isalpha()]
    at = rng.choice(places) if places else 0
    return query[:at] + query[at:at + 2][::-1] + query[at + 2:] if places else query


def plain_queries(item: dict, catalogue: Catalogue, count: int, seed: int) -> list[str]:
    """Up to `count` distinct queries: what the item is; then words of its title with that or the category."""
    rng, queries = random.Random(f"{seed} {item['item_id']!r}"), {}
    words = re.findall(r"\w{3,}(?:-\w+)*", clean(item["title"] or item["description"], item["brand"]).lower())
    words = [word for word in words if word not in STOP_WORDS][:12] or [item_text(item).lower()]
    kind = query = find_kind(catalogue.titles[item["item_id"]], catalogue)
    leaf = item["categories"].split(">")[-1].strip().lower()
    for _ in range(20 * count):
        if query and len(queries) < count:
            queries.setdefault(query, mistype(query, rng) if rng.random() < TYPO_RATE else query)
        brand, tail = item["brand"].lower() * (rng.random() < 0.3), rng.choice([kind, kind, leaf])
        size = min(rng.randint(1 if tail else 2, 3), len(words))
        parts = [brand, *(words[n] for n in sorted(rng.sample(range(len(words)), size))), tail]
        query = " ".join(dict.fromkeys(" ".join(parts).split()))        # no word twice
    return distinct(queries.values())


# ---------------------------------------------------------------------------------------------------------
# Language models as teachers: what they are asked, what makes an answer good, and how they are asked again
# ---------------------------------------------------------------------------------------------------------

def item_json(item: dict) -> str:
    """An item's texts as one line of JSON, without markup and empty fields, a long description cut."""
    texts = {field: " ".join(clean(item[field], gap=" ").split()) for field in ITEM_FIELDS}
    texts["description"] = texts["description"][:DESCRIPTION_CHARS]
    return json.dumps({field: text for field, text in texts.items() if text}, ensure_ascii=False)


def make_questions(samples: dict[str, list[dict]], items: list[dict], args) -> dict[str, tuple[str, str, Callable]]:
    """All that is asked: name, "<a_12>" or "item 7" -> key in the cache, prompt, check (text -> answer or problem)."""
    questions = {}
    for token, sample in samples.items():
        shops = [item["categories"].split(">")[0].strip() for item in sample if item["categories"].strip()]
        prompt = MEANING_PROMPT.format(category=max(shops, key=shops.count, default="retail"),
                                       items="\n".join(map(item_json, sample)))
        brands = {item["brand"].strip() for item in sample} - {""}
        questions[token] = prompt, partial(check_meaning, brands=sorted(brands))
    for item in items if args.queries else []:
        prompt = QUERIES_PROMPT.format(item=item_json(item), count=args.queries)
        questions[f"item {item['item_id']!r}"] = prompt, partial(check_queries, count=args.queries)
    return {name: (hashlib.sha256(json.dumps([args.teacher_model, prompt]).encode()).hexdigest(), prompt, check)
            for name, (prompt, check) in questions.items()}


def find_json(text: str, brackets: str) -> dict | list | None:
    """The JSON between the outermost `brackets`, after the thoughts that some models write down first, or None."""
    text = text.rpartition("</think>")[2]
    try:
        value = json.loads(text[text.find(brackets[0]):text.rfind(brackets[1]) + 1])
        json.dumps(value, ensure_ascii=False).encode()                  # half a surrogate pair is not UTF-8
        return value
    except (ValueError, RecursionError):
        return None


def distinct(texts: list[str]) -> list[str]:
    """The texts that are not empty, each once, whatever its case."""
    return list({text.strip().lower(): text.strip() for text in texts if text.strip()}.values())


def check_meaning(text: str, brands: list[str]) -> list | str:
    """[description, keywords] from an answer, or the rule of TS-Rec's appendix A.1 that it breaks."""
    answer = find_json(text, "{}") or {}
    description, keywords = answer.get("description"), answer.get("keywords")
    if not isinstance(description, str) or not isinstance(keywords, list) or {*map(type, keywords)} - {str}:
        return 'it must be valid JSON with "description", a string, and "keywords", a list of strings'
    description, keywords = description.strip(), distinct(keywords)
    sentences = len(SENTENCE_END.split(description)) if description else 0
    if "\n" in description or not 3 <= sentences <= 5:
        return f"the description must be one paragraph of 3 to 5 sentences, not {sentences}"
    if not MIN_KEYWORDS <= len(keywords) <= MAX_KEYWORDS:
        return f"there must be {MIN_KEYWORDS} to {MAX_KEYWORDS} different keywords, not {len(keywords)}"
    for keyword in keywords:
        if not any(map(str.isalpha, keyword)):
            return f"the keyword {keyword!r} has no letters"
        for brand in brands:
            if re.search(rf"(?<!\w){re.escape(brand)}(?!\w)", keyword, flags=re.I):
                return f"the keyword {keyword!r} holds the brand name {brand!r}"
    return [description, keywords]


def check_queries(text: str, count: int) -> list[str] | str:
    """The queries from an answer, or the rule of STAR's appendix A.2.2 that it breaks."""
    rows = find_json(text, "[]") or [None]
    if not all(isinstance(row, dict) and isinstance(row.get("query"), str) for row in rows):
        return 'it must be valid JSON, a list of objects {"query": "..."}'
    queries = distinct([row["query"] for row in rows])
    return queries if len(queries) == count else f"there must be {count} different queries, not {len(queries)}"


class Refused(Exception):
    """The teacher cannot go on; the text says why."""


def read_cache(path: Path) -> dict[str, list]:
    """The answers so far, by key; a last line without an end, which a killed run leaves, is none."""
    try:
        data = path.read_bytes() if path.exists() else b""
        rows = [json.loads(line) for line in data[:data.rfind(b"\n") + 1].splitlines()]
        return {row["key"]: row["answer"] for row in rows}
    except (OSError, ValueError, LookupError, TypeError) as error:
        stop(f"{path}: cannot be read as this script's answers ({error}); move it away, or name another by --cache")


def consult(todo: dict[str, tuple], answers: dict[str, list], teacher: Callable, args: argparse.Namespace) -> None:
    """Ask all of name -> (key, prompt, check), then again, with what was wrong, those whose answers were bad.

    Each good answer is in the cache before the next is looked at, and joins the cached ones in `answers`. A teacher
    takes name -> chat, a list of {"role", "content"}, and yields, in any order, name, answer, and why there is none
    or ""; where going on is no use it raises Refused.
    """
    cached, asked, bad = len(answers), 0, {}                            # bad: name -> what is wrong
    chats = {name: [{"role": "user", "content": prompt}] for name, (_, prompt, _) in todo.items()}
    with open(args.cache, "a", encoding="utf-8") as file:
        for _ in range(1 + args.retries):
            again, asked = {}, asked + len(chats)
            with closing(teacher(chats)) as replies:
                for name, text, failure in tqdm(replies, total=len(chats), unit="answer", disable=None):
                    key, prompt, check = todo[name]
                    bad[name] = answer = failure or check(text)
                    if isinstance(answer, list):
                        answers[name] = bad.pop(name)
                        file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
                        file.flush()
                    elif not failure:
                        again[name] = [{"role": "user", "content": prompt},
                                       {"role": "assistant", "content": text or "(nothing)"},
                                       {"role": "user", "content": ASK_AGAIN.format(problem=answer)}]
            chats = again
            if not chats:
                break
    print(f"answers | {cached} cached | {len(todo)} asked | {asked - len(todo)} retried | {len(bad)} fell back to "
          f"tfidf, {len(bad) - len(chats)} of which failed: no answer came")
    for name, problem in bad.items():
        print(f"fell back | {name} | {problem}")


def ask_teacher(samples: dict[str, list[dict]], items: list[dict], args: argparse.Namespace) -> dict[str, list]:
    """A language model's good answers, from the cache or asked now, by name: "<a_12>" or "item 7"."""
    kept, questions = read_cache(args.cache), make_questions(samples, items, args)
    answers = {name: kept[key] for name, (key, _, _) in questions.items() if key in kept}
    todo = {name: question for name, question in questions.items() if name not in answers}
    letters = sum(len(prompt) for _, prompt, _ in todo.values())
    out = sum(MEANING_TOKENS if name in samples else QUERY_TOKENS * args.queries for name in todo)
    print(f"{len(todo)} requests to {args.teacher_model}, {len(answers)} more are cached | about "
          f"{letters // CHARS_PER_TOKEN} tokens in, {out} out")
    if args.dry_run:
        for name in list(todo)[:1]:
            print(f"the prompt for {name}:\n{todo[name][1]}")
        raise SystemExit
    write_jsonl(args.cache, [{"key": key, "answer": answer} for key, answer in kept.items()])   # drops half a line
    try:
        if todo:
            consult(todo, answers, TEACHERS[args.teacher](args), args)
    except (Refused, KeyboardInterrupt) as error:
        stop(f"{str(error) or 'interrupted'}; the answers so far are in {args.cache}, the same command goes on")
    return answers


# ---------------------------------------------------------------------------------------------------------
# The two teachers that are language models
# ---------------------------------------------------------------------------------------------------------

def waiting_time(attempt: int, retry_after: str) -> float:
    """Seconds until the next try: what Retry-After says (seconds or a date), else 1, 2, 4, ... with jitter; capped."""
    try:
        wait = float(retry_after) if retry_after.isdigit() else (
            parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):                      # no such header
        wait = FIRST_WAIT * 2 ** attempt * random.uniform(0.5, 1)
    return min(max(wait, 0), MAX_WAIT)


def post(url: str, key: str, body: dict, timeout: float) -> tuple[int, str, str]:
    """One request; (200, the model's answer, "") or (status, what went wrong, Retry-After), 0 for no whole answer.

    The key leaves only in the header: exceptions' texts can hold it, and servers repeat it in theirs.
    """
    def sign(request):                          # without an auth of ours, requests would look for one in ~/.netrc
        request.headers.update({"Authorization": f"Bearer {key}"} if key else {})
        return request
    try:
        response = requests.post(url, json=body, auth=sign, timeout=(CONNECT_TIMEOUT, timeout), allow_redirects=False)
    except requests.RequestException as error:
        return 0, type(error).__name__, ""
    status, text = response.status_code, response.content.decode("utf-8", "replace")
    try:
        if status == 200:
            return status, str(json.loads(text)["choices"][0]["message"]["content"] or ""), ""
        text = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):        # what came instead is the problem
        status = 0 if status == 200 else status
    return status, text.replace(key, "***") if key else text, response.headers.get("Retry-After", "")


def post_chat(url: str, key: str, chat: list[dict], args: argparse.Namespace, halt: threading.Event,
              answered: threading.Event) -> tuple | None:
    """The answer and "", or "" and why none came in TRIES tries; None once `halt` is set, as Refused sets it here.

    Time-outs, cut lines, 429 and 5xx may pass, unless the server has never `answered`; any other status will not.
    """
    wait, body = 0, {"model": args.teacher_model, "messages": chat}
    for attempt in range(TRIES):
        if halt.wait(wait):
            return None
        status, text, retry_after = post(url, key, body, args.timeout)
        if status == 200:
            answered.set()
            return text, ""
        problem = f"{status or 'no answer'}: {' '.join(text.split())[:300]}"
        if status != 429 and 0 < status < 500:
            halt.set()
            raise Refused(f"{url} says {problem}")
        wait = waiting_time(attempt, retry_after)
    if not answered.is_set():
        halt.set()                              # here, before this worker could begin the next question
        raise Refused(f"{url}: {problem}, {TRIES} times")
    return "", problem


def http_teacher(args: argparse.Namespace) -> Callable:
    """Any OpenAI-compatible server; the key comes from the environment, none where the variable is not set."""
    url, key = args.base_url.rstrip("/") + "/chat/completions", os.environ.get(args.api_key_env, "").strip()
    if not re.fullmatch("[!-~]*", key):
        stop(f"the key in ${args.api_key_env} holds blanks or letters that no key has; set it again")
    answered = threading.Event()

    def ask(chats: dict[str, list[dict]]) -> Iterator[tuple[str, str, str]]:
        halt, pool = threading.Event(), ThreadPoolExecutor(args.workers)
        try:
            futures = {pool.submit(post_chat, url, key, chat, args, halt, answered): name
                       for name, chat in chats.items()}
            for future in as_completed(futures):
                if future.result():
                    yield (futures.pop(future), *future.result())
        except (Refused, KeyboardInterrupt):    # what has come meanwhile is not lost
            yield from ((name, *future.result()) for future, name in futures.items()
                        if future.done() and not future.exception() and future.result())
            raise
        finally:                                # nothing new starts; the requests under way are left to end
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return ask


def hf_teacher(args: argparse.Namespace) -> Callable:
    """A local causal LM, greedy, in batches of similar length padded on the left, the longest first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    device = pick_device(args.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(
            args.teacher_model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()
    except (OSError, ValueError) as error:
        stop(f"--teacher-model {args.teacher_model}: cannot be loaded ({str(error).splitlines()[0]})")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    own, template = model.generation_config, tokenizer.chat_template
    # generate() takes what is unset from the model's own file, sampling and penalties too: leave it none
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        eos_token_id=own.eos_token_id or tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    room = getattr(model.config, "max_position_embeddings", math.inf) - MAX_NEW_TOKENS

    def ask(chats: dict[str, list[dict]]) -> Iterator[tuple[str, str, str]]:
        texts = {name: tokenizer.apply_chat_template(        # Qwen3 thinks aloud unless told not to
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False) if template else
            "\n\n".join(message["content"] for message in chat) + "\n\n" for name, chat in chats.items()}
        order = sorted(texts, key=lambda name: -len(texts[name]))
        for start in range(0, len(order), args.batch_size):
            names = order[start:start + args.batch_size]
            batch = tokenizer([texts[name] for name in names], padding=True, add_special_tokens=not template,
                              return_tensors="pt").to(device)
            width = batch["input_ids"].shape[1]
            if width > room:
                raise Refused(f"a prompt has {width} tokens, the model reads {room} beside {MAX_NEW_TOKENS} of the "
                              "answer; choose a smaller --sample")
            with torch.no_grad():
                out = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for name, text in zip(names, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)):
                yield name, text, ""
    return ask


TEACHERS = {"http": http_teacher, "hf": hf_teacher}     # name -> f(args): the function ask of consult


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
    files.add_argument("--queries-out", help="output, instead of RUN/queries.jsonl")
    files.add_argument("--cache", help="a language model's answers, instead of RUN/teacher_cache.jsonl")
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", choices=("tfidf", *TEACHERS), default="tfidf", help="who reads the items")
    teacher.add_argument("--sample", type=within(int, 1), default=20, help="most items the teacher is shown of a token")
    teacher.add_argument("--queries", type=within(int, 0), default=0,
                         help="search queries per item, 0 for none; STAR: 5")
    teacher.add_argument("--teacher-model", default="", help="the model's name; hf: a name or a folder")
    teacher.add_argument("--retries", type=within(int, 0), default=2, help="how often a bad answer is asked again")
    teacher.add_argument("--dry-run", action="store_true", help="say what would be asked, and write nothing")
    teacher.add_argument("--base-url", default="", help="http: what stands before /chat/completions")
    teacher.add_argument("--api-key-env", default="OPENAI_API_KEY", help="http: environment variable with the key")
    teacher.add_argument("--workers", type=within(int, 1), default=8, help="http: requests at a time")
    teacher.add_argument("--timeout", type=within(float, 1e-3), default=120.0,
                         help="http: seconds without a sign of the server")
    teacher.add_argument("--batch-size", type=within(int, 1), default=8, help="hf: prompts at a time")
    teacher.add_argument("--device", default="", help="hf: cpu, cuda, ...; empty: cuda where there is one")
    parser.add_argument("--seed", type=SEED, default=42, help="seed of the samples and the offline queries")
    args = parser.parse_args(argv)
    if args.queries == 1:
        parser.error("--queries must be 0 or at least 2: one query of each item is for testing")
    if (args.teacher == "tfidf") != (not args.teacher_model) or args.dry_run and not args.teacher_model:
        parser.error("--teacher http and hf need --teacher-model; tfidf has none, and no --dry-run")
    if args.teacher == "http" and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", args.base_url):
        parser.error("--teacher http needs --base-url, like https://api.deepseek.com or http://localhost:8000/v1")
    args.cache = Path(args.cache or Path(args.run) / "teacher_cache.jsonl")
    return args


def report(rows: list[dict]) -> None:
    """Print what a reader checks first, and three of the tokens as they were written."""
    sizes, levels = sorted(row["n_items"] for row in rows), Counter(row["token"][1] for row in rows)
    few = sum(len(row["keywords"]) < MIN_KEYWORDS for row in rows)
    print("tokens in use per level " + ", ".join(f"{level} {n}" for level, n in levels.items())
          + f" | items per token: min {sizes[0]}, median {sizes[len(sizes) // 2]}, max {sizes[-1]}"
          + f" | tokens with fewer than {MIN_KEYWORDS} keywords {few}")
    for row in rows[::-(-len(rows) // 3)]:
        print(f"example | {row['token']} {row['n_items']} items: {', '.join(row['keywords'])}\n"
              f"        | {row['description']}")


def make_queries(items: list[dict], answers: dict[str, list], catalogue: Catalogue, args) -> list[dict]:
    """The lines of queries.jsonl; one query of each item, drawn at random, is for testing, but not its only one."""
    lines = []
    for item in items:
        name = repr(item["item_id"])
        queries = answers.get(f"item {name}") or plain_queries(item, catalogue, args.queries, args.seed)
        test = random.Random(f"{args.seed} {name} test").choice(queries) if len(queries) > 1 else None
        lines += [{"item_id": item["item_id"], "query": query, "split": "test" if query == test else "train"}
                  for query in queries]
    return lines


def main() -> None:
    args = parse_args()
    items = read_catalogue(args.items or Path(args.run) / "items.jsonl")
    out = Path(args.out or Path(args.run) / "semantics.jsonl")
    clusters, catalogue, rows = make_clusters(items), study(items), []
    print(f"teacher {args.teacher} | {len(items)} items, {len(clusters)} SID tokens in use | "
          f"at most {args.sample} items shown per token")
    samples = {token: draw_sample(token, cluster, args.sample, args.seed) for token, cluster in clusters.items()}
    answers = {} if args.teacher == "tfidf" else ask_teacher(samples, items, args)
    for token, sample in tqdm(samples.items(), unit="token", delay=2):
        good = token in answers
        description, keywords = answers[token] if good else tfidf_teacher(token, sample, catalogue)
        rows.append({"token": token, "description": description, "keywords": keywords, "n_items": len(clusters[token]),
                     "sampled": [item["item_id"] for item in sample],
                     "source": f"{args.teacher} {args.teacher_model}" if good else "tfidf"})
    lines = make_queries(items, answers, catalogue, args) if args.queries else []
    queries_out = args.queries_out or Path(args.run) / "queries.jsonl"
    with replacing(out) as temporary:                                   # both files are replaced, or none
        write_jsonl(temporary, rows)
        if args.queries:
            write_jsonl(queries_out, lines)
    report(rows)
    print(f"wrote {out}")
    if args.queries:
        print(f"wrote {queries_out}: {len(lines)} queries, {sum(line['split'] == 'test' for line in lines)} for "
              f"testing, e.g. {' | '.join(line['query'] for line in lines[:args.queries])}")


if __name__ == "__main__":
    main()
