"""Stage 2: give every SID token a meaning: a description and keywords, from the items that carry it.

A teacher sees a sample of the token's items and says what they share. TS-Rec (arXiv 2602.22632), 4.1:

    Eq. 6   I_s = { i in I : s in e_i }         the cluster of token s: items whose SID e_i contains s
    Eq. 7   D_s, W_s = teacher(sample of I_s)   description D_s (TS-Align), keywords W_s (SA-Init)

Reads   RUN/items.jsonl (with SIDs)
Writes  RUN/semantics.jsonl: {"token": "<a_12>", "description": str, "keywords": [str], "n_items": int,
        "sampled": [item_id], "source": "tfidf"} for each token in use
        RUN/queries.jsonl, with --queries N: {"item_id", "query", "split": "train" or "test"}
        RUN/teacher_cache.jsonl, with --teacher http: good answers; a killed run continues from them

Differs from the paper
  1. `--teacher tfidf` (default) is no language model. Descriptions fill a template, queries are words
     of the title. Keywords have no brands or numbers, as in A.1.
  2. `--teacher http` gets the papers' prompts, shortened. A bad answer is asked for again, with what was
     wrong. If it is still bad, tfidf takes its place, as "source" says.

Examples
  python extract_semantics.py  # the demo, 1 s
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import queue
import random
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import requests
from requests.adapters import HTTPAdapter, Retry
from tqdm import tqdm

from tokenize_items import (
    ID, make_parser, number, parse_sid_token, read_catalogue, read_jsonl, stop, write_jsonl)

MIN_KEYWORDS, MAX_KEYWORDS, TFIDF_KEYWORDS = 10, 20, 15
DESCRIPTION_WEIGHT = 0.3  # of a word that only an item's description has
STOP_WORDS = frozenset("""
about above after all also and any are based because been before below best between both brand but can color
comes different does each easy etc every extra feature features for from full get good great has have here
high how ideal inch inches into its just keep large long made make makes many may more most must new not off
one only other our out over own pack package perfect piece pieces please product products provide provides
quality ready same set several should size sizes small some such suitable than that the their them then there
these they this those three through too two under unit use used using very was well were what when where
which while will with within without work works you your
""".split())

# The requirements of TS-Rec, appendix A.1, and of STAR, appendix A.2.2
MEANING_PROMPT = """You are a Senior Product Content Analyst and Catalog Specialist. Analyze the items \
below, synthesize what they share into a single, cohesive "Product Family Description", then produce a \
related keyword list.
- Identify the functional, design, usage or performance traits that ALL listed items share.
- Describe the product family as a category, not the individual items: broad enough for all of them, \
specific enough to convey shared traits.
- Write one continuous paragraph of 3-5 sentences, no bullet points: neutral, objective third person; \
focused on function, durability, applicability or end-user benefits.
- Replace exact measurements, quantities and configurations with generalized terms.
- No brand names, technology names, slogans or promotional adjectives; only verifiable facts.
- Extract 10-20 domain-relevant, semantically meaningful keywords; none is only a number.

Items, one JSON object per line:
{items}

Answer in pure JSON, without any other text: {{"description": "...", "keywords": ["...", ...]}}"""
QUERIES_PROMPT = """You are an AI assistant specializing in generating realistic user search queries for \
products. Here is the JSON data of a product:
{item}

Generate exactly {count} different queries that users are most likely to search this product with. \
Consider brand, product type, features, use cases, and common misspellings or alternative names. \
Use the language of real users; vary length and specificity.

Answer in pure JSON, without any other text, {count} objects: [{{"query": "..."}}, ...]"""
ASK_AGAIN = "That answer cannot be used: {problem}. Give the corrected JSON, without any other text."
MAX_TEXT = 1000  # characters of each field in a prompt
RETRIES, TIMEOUT = 2, (10, 600)  # after a bad answer; seconds to connect, to answer
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may pass

# ---- Clusters (eq. 6) --------------------------
def make_clusters(items: list[dict]) -> dict[str, list[dict]]:
    """Collect the items of every token in use; tokens by level, then code."""
    clusters = defaultdict(list)
    for item in items:
        for token in item["sid"]:
            clusters[token].append(item)
    return {token: clusters[token] for token in sorted(clusters, key=parse_sid_token)}

# ---- The offline teacher (eq. 7): TF-IDF of a cluster ----
def words_of(text: str) -> list[str]:
    """Words and punctuation marks: "Steel rod, 5mm" -> ["steel", "rod", ",", "5mm"]."""
    return re.findall(r"[^\W_]+|[^\w\s]", text.lower())

def find_brand_words(items: list[dict]) -> set[str]:
    """Words that mostly occur as a brand: "stanley", but not the "tools" of Precision Tools."""
    as_brand, as_word = Counter(), Counter()
    for item in items:
        brand = set(words_of(item["brand"]))
        as_brand.update(brand)
        as_word.update(set(words_of(item["title"])) - brand)
    return {word for word, count in as_brand.items() if count >= as_word[word]}

def weigh_terms(item: dict, blocked: set[str]) -> dict[str, float]:
    """The words and word pairs of an item that may be keywords, and what each counts."""
    weights = {}
    for field, weight in (("title", 1.0), ("categories", 1.0), ("description", DESCRIPTION_WEIGHT)):
        words = [word if len(word) > 2 and word.isalpha() and word not in blocked else ""
                 for word in words_of(item[field])]
        if field != "description":
            words += [f"{a} {b}" for a, b in zip(words, words[1:]) if a and b]
        for term in filter(None, words):
            weights.setdefault(term, weight)
    return weights

def choose_keywords(sample: list[dict[str, float]], frequency: Counter, num_items: int) -> list[str]:
    """The terms with the highest (share of the sample) * log(N / items that use them).

    A term of a single item counts 0. A term whose words are all chosen already is skipped.
    """
    score = Counter()
    for weights in sample:
        for term, weight in weights.items():
            idf = math.log(num_items / frequency[term]) if frequency[term] > 1 else 0.0
            score[term] += weight / len(sample) * idf
    keywords, used = [], set()
    for term in sorted(score, key=lambda term: (-score[term], -len(term), term)):
        if not used.issuperset(term.split()) and len(keywords) < TFIDF_KEYWORDS:
            keywords.append(term)
            used.update(term.split())
    return keywords or ["product"]

def describe(keywords: list[str]) -> str:
    """Up to three sentences around the keywords, for TS-Align."""
    parts = {"This product family covers": keywords[:3], "Typical items involve": keywords[3:6],
             "Common traits concern": keywords[6:10]}
    return " ".join(f"{start} {', '.join(words)}." for start, words in parts.items() if words)

def plain_queries(item: dict, count: int, seed: int) -> list[str]:
    """Up to `count` queries: two or three words of the title, at times with the brand."""
    rng = random.Random(f"{seed} {item['item_id']!r}")
    text = item["title"].strip() or item["description"]
    words = [word for word in words_of(text) if len(word) > 2 and word not in STOP_WORDS]
    words = list(dict.fromkeys(words))[:12] or [text.strip()]
    queries = {}
    for _ in range(20 * count):  # short titles allow few
        places = sorted(rng.sample(range(len(words)), min(rng.randint(2, 3), len(words))))
        brand = item["brand"].lower().split() if rng.random() < 0.2 else []
        query = dict.fromkeys(brand + [words[place] for place in places])  # no word twice
        queries[" ".join(query)] = None
    return list(queries)[:count]

# ---- A language model as teacher (eq. 7): questions, rules for answers ----
class Question(NamedTuple):
    """What the teacher is asked. `read` returns its answer, or raises ValueError."""
    prompt: str
    read: Callable

def item_json(item: dict) -> str:
    """An item's texts as one line of JSON, without empty fields, long ones cut."""
    fields = ("title", "brand", "categories", "description")
    texts = {field: " ".join(item[field].split())[:MAX_TEXT] for field in fields if item[field].strip()}
    return json.dumps(texts, ensure_ascii=False)

def make_questions(samples: dict[str, list[dict]], items: list[dict],
                   num_queries: int) -> dict[str, Question]:
    """All questions by name: "<a_12>" asks for a meaning, "item 7" for queries."""
    questions = {}
    for token, sample in samples.items():
        prompt = MEANING_PROMPT.format(items="\n".join(item_json(item) for item in sample))
        brands = sorted({item["brand"].strip() for item in sample} - {""})
        questions[token] = Question(prompt, partial(parse_meaning, brands=brands))
    for item in items if num_queries else []:
        prompt = QUERIES_PROMPT.format(item=item_json(item), count=num_queries)
        read = partial(parse_queries, count=num_queries)
        questions[f"item {item['item_id']!r}"] = Question(prompt, read)
    return questions

def find_json(text: str, brackets: str):
    """Parse what is between the outermost brackets. Some models think aloud before they answer."""
    text = text.rpartition("</think>")[2]
    answer = json.loads(text[text.find(brackets[0]):text.rfind(brackets[1]) + 1])
    return json.loads(json.dumps(answer, ensure_ascii=False).encode(errors="replace"))  # half an emoji

def distinct(texts: list[str]) -> list[str]:
    """The texts that are not empty, each once, whatever its case."""
    return list({text.strip().lower(): text.strip() for text in texts if text.strip()}.values())

def parse_meaning(text: str, brands: list[str]) -> dict:
    """Read {"description", "keywords"} and check what can be counted of TS-Rec, A.1."""
    answer = find_json(text, "{}")
    description, keywords = answer.get("description"), answer.get("keywords")
    if not isinstance(keywords, list) or not all(isinstance(text, str) for text in [description, *keywords]):
        raise ValueError('it must be JSON: a string "description", strings "keywords"')
    description, keywords = description.strip(), distinct(keywords)
    # A mark ends a sentence if a capital follows, or nothing; marks of other scripts always do
    sentences = len(re.findall(r"[.!?](?=\s+\W*[^\W\d_a-z]|\W*$)|[。！？।۔؟]", description))
    if "\n" in description or not 3 <= sentences <= 5:
        raise ValueError(f"the description must be one paragraph of 3 to 5 sentences, not {sentences}")
    if not MIN_KEYWORDS <= len(keywords) <= MAX_KEYWORDS:
        raise ValueError(f"give {MIN_KEYWORDS} to {MAX_KEYWORDS} different keywords, not {len(keywords)}")
    for keyword in keywords:
        if not any(letter.isalpha() for letter in keyword):
            raise ValueError(f"the keyword {keyword!r} has no letters")
        for brand in brands:
            if re.search(rf"(?<!\w){re.escape(brand)}(?!\w)", keyword, flags=re.I):
                raise ValueError(f"the keyword {keyword!r} contains the brand name {brand!r}")
    return {"description": description, "keywords": keywords}

def parse_queries(text: str, count: int) -> list[str]:
    """Read [{"query": ...}, ...] and check the rules of STAR, appendix A.2.2."""
    rows = find_json(text, "[]")
    if not all(isinstance(row, dict) and isinstance(row.get("query"), str) for row in rows):
        raise ValueError('it must be a JSON list of objects {"query": "..."}')
    queries = distinct([row["query"] for row in rows])
    if len(queries) != count:
        raise ValueError(f"there must be {count} different queries, not {len(queries)}")
    return queries

# ---- Asking an OpenAI-compatible server --------
def open_session(key: str, workers: int) -> requests.Session:
    """A session that sends the key, and tries again after transient failures."""
    session = requests.Session()
    session.headers.update({"Authorization": f"Bearer {key}"} if key else {})
    session.auth = lambda request: request  # or ~/.netrc would replace the header
    retry = Retry(total=6, connect=2, read=2, backoff_factor=1, status_forcelist=TRANSIENT,
                  allowed_methods=None, raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=workers))
    return session

def ask(session: requests.Session, url: str, model: str, question: Question) -> dict | list | None:
    """The first answer that can be read, of 1 + RETRIES; or None."""
    chat = [{"role": "user", "content": question.prompt}]
    for _ in range(1 + RETRIES):
        body = {"model": model, "messages": chat}
        reply = session.post(url, json=body, timeout=TIMEOUT, allow_redirects=False)
        if reply.status_code != 200:
            error = LookupError if reply.status_code in (400, 413, 422) else requests.HTTPError  # this prompt
            raise error(f"status {reply.status_code}: {' '.join(reply.text.split())}")
        try:
            text = str(reply.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            raise requests.HTTPError("the reply is not a chat completion; check --base-url") from None
        try:
            return question.read(text)
        except (ValueError, RecursionError) as error:
            chat = [chat[0], {"role": "assistant", "content": text or "(nothing)"},
                    {"role": "user", "content": ASK_AGAIN.format(problem=error)}]
    return None

def read_cache(path: Path) -> dict[str, dict | list]:
    """The answers so far, by key. Bad lines, like the last one of a killed run, are dropped."""
    answers = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            answers[row["key"]] = row["answer"]
    return answers

def ask_all(questions: dict[str, Question], cache_path: Path, base_url: str, model: str, key: str,
            workers: int) -> dict[str, dict | list]:
    """The teacher's answers by name, without those it failed at; each is cached as it arrives."""
    cached = read_cache(cache_path)
    keys, failed = {}, []
    for name, question in questions.items():
        keys[name] = hashlib.sha256(json.dumps([model, question.prompt]).encode()).hexdigest()
    answers = {name: cached[keys[name]] for name in questions if keys[name] in cached}
    todo = [name for name in questions if name not in answers]
    write_jsonl(cache_path, [{"key": k, "answer": answer} for k, answer in cached.items()])
    url = base_url.rstrip("/") + "/chat/completions"
    session, waiting, arrived = open_session(key, workers), queue.Queue(), queue.Queue()
    for name in todo:
        waiting.put(name)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                name = waiting.get_nowait()
                try:
                    arrived.put((name, ask(session, url, model, questions[name])))
                except Exception as error:  # the main thread raises it
                    arrived.put((name, error))
    for _ in range(workers):  # daemons do not keep a stopped script alive
        threading.Thread(target=work, daemon=True).start()
    try:
        with open(cache_path, "a", encoding="utf-8") as file:
            for _ in tqdm(todo, unit="answer", disable=None):
                name, answer = arrived.get()
                if answer is None or isinstance(answer, LookupError) and len(answers) > len(failed):
                    failed.append(name)
                    continue
                if isinstance(answer, Exception):
                    raise answer
                answers[name] = answer
                file.write(json.dumps({"key": keys[name], "answer": answer}) + "\n")
                file.flush()
    except (OSError, ValueError, LookupError, KeyboardInterrupt) as error:
        waiting.queue.clear()
        reason = (str(error).replace(key, "***") if key else str(error)) or "interrupted"
        stop(f"{url}: {reason[:300]}; the answers so far are in {cache_path}, run it again")
    print(f"answers | {len(questions) - len(todo)} cached | {len(todo) - len(failed)} new | "
          f"{len(failed)} not usable, left to tfidf {failed[:5]}")
    return answers

# ---- Reading what this stage writes ------------
def read_semantics(path: str | Path, items: list[dict]) -> list[dict]:
    """Read semantics.jsonl; stops if it describes other SIDs than those of the catalogue."""
    sid_of = {item["item_id"]: item["sid"] for item in items}
    used = {token for sid in sid_of.values() for token in sid}
    rows = read_jsonl(path, {"token": str, "description": str, "keywords": list})
    for row in rows:
        strangers = [i for i in row.get("sampled") or [] if row["token"] not in sid_of.get(i, [])]
        if row["token"] not in used or strangers:
            stop(f"{path}: {row['token']} does not fit items.jsonl; run extract_semantics.py again")
    return rows

def read_queries(path: Path, known: set, split: str) -> list[dict]:
    """The search queries of one split, {"item_id", "query", "split"}."""
    rows = read_jsonl(path, {"item_id": ID, "query": str, "split": str}, known=known)
    return [row for row in rows if row["split"] == split]

# ---- Command line ------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed")
    flag = parser.add_argument
    flag("--teacher", choices=("tfidf", "http"), default="tfidf", help="offline, or a server like OpenAI's")
    flag("--sample", type=number(int, 1), default=20, help="items per token for the teacher")
    flag("--queries", type=number(int, 0), default=0, help="search queries per item; 0: none; STAR: 5")
    flag("--base-url", default="", help="what comes before /chat/completions")
    flag("--teacher-model", default="", help="name of the model")
    flag("--api-key-env", default="OPENAI_API_KEY", help="environment variable with the key")
    flag("--workers", type=number(int, 1), default=8, help="requests at a time")
    flag("--dry-run", action="store_true", help="http: count requests, print a prompt, stop")
    args = parser.parse_args(argv)
    if args.queries == 1:
        parser.error("--queries must be 0 or at least 2: one query of each item is for testing")
    if args.teacher == "http" and not (args.base_url.startswith("http") and args.teacher_model):
        parser.error("--teacher http needs --base-url http..., and --teacher-model")
    return args

def main() -> None:
    args = parse_args()
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    clusters, samples = make_clusters(items), {}
    for token, cluster in clusters.items():
        rng = random.Random(f"{args.seed} {token}")  # whatever the other tokens
        samples[token] = rng.sample(cluster, min(args.sample, len(cluster)))
    print(f"teacher {args.teacher} | {len(items)} items | {len(clusters)} SID tokens in use")

    answers = {}
    if args.teacher == "http" or args.dry_run:
        key = os.environ.get(args.api_key_env, "").strip()
        if not re.fullmatch("[!-~]*", key):
            stop(f"${args.api_key_env} has characters that no key has; set it again")
        questions = make_questions(samples, items, args.queries)
        if args.dry_run:
            letters = sum(len(question.prompt) for question in questions.values())
            print(f"{len(questions)} requests, less those cached | about {letters // 4} input tokens")
            print(f"the first prompt:\n{next(iter(questions.values())).prompt}")
            return
        answers = ask_all(questions, run / "teacher_cache.jsonl", args.base_url, args.teacher_model, key,
                          args.workers)

    blocked = STOP_WORDS | find_brand_words(items)
    terms = {item["item_id"]: weigh_terms(item, blocked) for item in items}
    frequency = Counter(term for weights in terms.values() for term in weights)
    rows = []
    for token, sample in samples.items():
        source, meaning = f"http {args.teacher_model}", answers.get(token)
        if meaning is None:
            weights = [terms[item["item_id"]] for item in sample]
            keywords = choose_keywords(weights, frequency, len(items))
            source, meaning = "tfidf", {"description": describe(keywords), "keywords": keywords}
        rows.append({"token": token, **meaning, "n_items": len(clusters[token]),
                     "sampled": [item["item_id"] for item in sample], "source": source})
    write_jsonl(run / "semantics.jsonl", rows)
    for row in rows[::max(1, len(rows) // 3)][:3]:
        print(f"example | {row['token']} {row['n_items']} items: {', '.join(row['keywords'])}")
    print(f"wrote {run}/semantics.jsonl")

    if args.queries:
        lines = []
        for item in items:
            name = f"item {item['item_id']!r}"
            queries = answers.get(name) or plain_queries(item, args.queries, args.seed)
            test = random.Random(f"{args.seed} {name}").choice(queries) if len(queries) > 1 else None
            for query in queries:
                split = "test" if query == test else "train"
                lines.append({"item_id": item["item_id"], "query": query, "split": split})
        write_jsonl(run / "queries.jsonl", lines)
        print(f"wrote {run}/queries.jsonl: {len(lines)} queries, e.g. {lines[0]['query']!r}")
    elif (run / "queries.jsonl").exists():
        print(f"{run}/queries.jsonl is of an earlier run: delete it if the items changed")

if __name__ == "__main__":
    main()
