"""Stage 1: turn a catalogue into semantic IDs (SIDs) and its interactions into samples.

Each item's title and description become one embedding x by a frozen encoder; residual K-means turns x into
L codes; a collision step makes every SID unique. TS-Rec (arXiv 2602.22632), section 3.2.1:

    Eq. 1   C_l = K-means(R_l, K)                      R_1 = X, the (N, D) item embeddings
    Eq. 2   s_il = argmin_k || R_il - C_lk ||
    Eq. 3   R_i,l+1 = R_il - C_l,s_il

Reads   DATA/items.jsonl, and DATA/train|valid|test.jsonl (an official split) or DATA/interactions.jsonl;
        with --amazon both are made in RUN/data from a public dump, downloaded once into --cache
Writes  RUN/items.jsonl (the input with "sid": ["<a_12>", "<b_7>", "<c_3>"]), RUN/train|valid|test.jsonl,
        RUN/codebook.pt (centroids (L, K, D) and the encoder, so that new items can be encoded later)

Differs from the paper
  1. `--encoder lsa` (default) needs no download; the paper's is Qwen3-Embedding-4B.
  2. `--collision nearest` (default) gives a colliding item the free last code nearest to its residual; the paper's
     way is `--collision random`.
  3. K is 256 as in the paper, but N / 12 (at least 8, at most N / 3) for fewer than 3,072 items, rounded down to a
     power of two, and doubled where a prefix then has more items than codes.

Examples
  python tokenize_items.py                                                         # the demo, 4 s on two cores
  python tokenize_items.py --run runs/industrial --data ../shared/data/industrial  # 10 s on two cores
  python tokenize_items.py --run runs/ind --amazon Industrial_and_Scientific --since 2016-10 --until 2018-11 --peers
  python tokenize_items.py --encoder Qwen/Qwen3-Embedding-4B --pooling last --dim 32 --collision random
  python tokenize_items.py --run runs/demo --codebook runs/demo/codebook.pt --items new_items.jsonl
"""
import argparse
import base64
import calendar
import contextlib
import gzip
import hashlib
import html
import json
import math
import os
import pickle
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable

import numpy as np
import requests
import torch
from tqdm import tqdm

# Letters used in shapes: N items, D embedding width, L levels, K codes per level.
LEVELS = "abcdefgh"                     # level 0 is spelled <a_12>, level 1 <b_12>, ...
SID_TOKEN = re.compile(r"<([a-h])_(0|[1-9][0-9]{0,6})>")
WORD = re.compile(r"[^\W_]+")           # LSA: runs of letters and digits
LSA_DIM, LSA_MAX_TERMS = 128, 50_000    # width of the LSA space; most frequent terms kept
ENCODER_PARTS = ({"name", "terms", "idf", "components"}, {"name", "pooling", "max_length"})      # in codebook.pt
DISTANCE_BYTES, ITERATIONS = 64 << 20, 100      # K-means: one block of the distance matrix; most steps per level
ITEM_FIELDS = ("title", "description", "brand", "categories")
TAG = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>]*>", re.I | re.S)
SCRAPED = re.compile(r"<span id|getTime")   # titles that are a piece of the page's code, not a name
TIMEOUT = (10, 60)                      # seconds to connect, and between two pieces of an answer
WAITS = (1, 4, 16, None)                # seconds before each new attempt of a download
AMAZON_URL = "https://mcauleylab.ucsd.edu/public_datasets/data"
AMAZON = {  # by release: paths below the host, the user's column (the item's is 1 or 0), times per second, names
    2018: {"ratings": "amazon_v2/categoryFilesSmall/{}.csv", "user": 1, "second": 1,
           "metadata": "amazon_v2/metaFiles2/meta_{}.json.gz",
           "item_id": "asin", "brand": "brand", "categories": "category"},
    2023: {"ratings": "amazon_2023/benchmark/0core/rating_only/{}.csv.gz", "user": 0, "second": 1000,
           "metadata": "amazon_2023/raw/meta_categories/meta_{}.jsonl.gz",
           "item_id": "parent_asin", "brand": "store", "categories": "categories"}}


# ---------------------------------------------------------------------------------------------------------
# What all stages share: errors, files, the spelling of SIDs
# ---------------------------------------------------------------------------------------------------------

def stop(message: str):
    """End the program with one line on stderr and exit code 2: the reader can mend this himself."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path: str | Path, fields: tuple[str, ...], check=lambda place, row: None) -> list[dict]:
    """Read a JSONL file whose every line is blank or an object with at least `fields`; stops naming file and line.

    check(place, row) sees each row with "PATH, line 7" and stops where it does not like it.
    """
    rows, number = [], 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                row, place = json.loads(line), f"{path}, line {number}"
                missing = [f for f in fields if not isinstance(row, dict) or f not in row]
                if missing:
                    stop(f"{place}: no {missing[0]!r}; each line is an object with {', '.join(fields)}")
                if "\\ud" in line or "\\uD" in line:                    # half of such a pair could not be written
                    json.dumps(row, ensure_ascii=False).encode()
                check(place, row)
                rows.append(row)
    except OSError as error:
        stop(f"{path}: cannot be read ({error.strerror}); run the stage that writes it, or name another file")
    except (ValueError, RecursionError) as error:                       # broken JSON, or not UTF-8
        stop(f"{path}, line {max(1, number)}: not valid JSON in UTF-8 ({error}); mend that line")
    if not rows:
        stop(f"{path}: holds no lines; it needs at least one object with {', '.join(fields)}")
    return rows


def check_text(place: str, row: dict, fields: tuple[str, ...]) -> None:
    """Stop, naming the place, unless all `fields` of the row are strings."""
    for field in fields:
        if not isinstance(row[field], str):
            stop(f"{place}: {field} must be a string, not {repr(row[field])[:80]}")


def check_id(place: str, row: dict, field: str, seen: dict) -> None:
    """Stop unless the row's id is a number or a string, and none of `seen`, id -> place, where it is put."""
    if not isinstance(row[field], (int, float, str)):
        stop(f"{place}: {field} must be a number or a string, not {row[field]!r}")
    if seen.setdefault(row[field], place) != place:
        stop(f"{place}: {field} {row[field]!r} stands in {seen[row[field]]} already; each may come once")


def check_output(path: Path) -> None:
    """Stop now, not when all is done, if a file cannot be written there; makes its folder."""
    if path.is_dir():
        stop(f"{path}: cannot be written (it is a folder)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        stop(f"{path}: cannot be written ({error})")


@contextlib.contextmanager
def replacing(path: str | Path):
    """Give a temporary path beside `path`; rename it over `path` when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    check_output(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                            # torch.save raises the latter
        stop(f"{path}: cannot be written ({error})")
    finally:
        with contextlib.suppress(OSError):                              # where the folder is none, say
            temporary.unlink()


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write one object per line, atomically."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load_pt(path: str | Path, keys: tuple[str, ...]) -> dict:
    """Load one of the project's .pt files, a dict with at least `keys`; stops at anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)      # read as needed
        if all(key in content for key in keys):
            return content
    except (FileNotFoundError, IsADirectoryError):
        stop(f"{path}: {'is a folder' if Path(path).is_dir() else 'no such file'}; name a file that a stage wrote")
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, AttributeError, ImportError,
            pickle.UnpicklingError):
        pass                                                            # whatever the bytes suggest to torch
    stop(f"{path}: not a file that this project wrote (no {', '.join(keys)}); write it again")


def load_codebook(path: str | Path) -> dict:
    """Load codebook.pt: {"centroids": (L, K, D), "encoder": dict, ...}; stops where one of them is something else."""
    book = load_pt(path, ("centroids", "encoder"))
    centroids, encoder = book["centroids"], book["encoder"]
    if not (isinstance(centroids, torch.Tensor) and centroids.dim() == 3 and centroids.is_floating_point()
            and isinstance(encoder, dict) and any(parts <= encoder.keys() for parts in ENCODER_PARTS)):
        stop(f"{path}: its centroids or its encoder are not complete; name another file or make a new run")
    return book


def pick_device(name: str) -> torch.device:
    """The device that --device names, or cuda where there is one, else the cpu."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        stop(f"--device {name}: not to be had here ({str(error).splitlines()[0]})")
    return device


def sid_token(level: int, code: int) -> str:
    """Spell a code: (0, 12) -> "<a_12>"."""
    return f"<{LEVELS[level]}_{code}>"


def parse_sid_token(token: str) -> tuple[int, int]:
    """Read a SID token: "<a_12>" -> (0, 12); stops at anything else."""
    match = SID_TOKEN.fullmatch(token) if isinstance(token, str) else None
    if not match:
        stop(f"{token!r} is not a SID token; they look like <a_12>, <b_7>, <c_3>")
    return LEVELS.index(match[1]), int(match[2])


def codes_of(items: list[dict]) -> np.ndarray:
    """The code matrix of a catalogue, (N, L)."""
    return np.array([[parse_sid_token(token)[1] for token in item["sid"]] for item in items])


def item_text(item: dict) -> str:
    """The text that stands for an item: title and description as one sentence (section 3.2.1)."""
    return ". ".join(part for part in (item["title"].strip(), item["description"].strip()) if part)


def read_items(path: str | Path) -> list[dict]:
    """Read a catalogue; item_id unique, missing fields filled with "", every item with some text."""
    seen = {}

    def check(place: str, item: dict) -> None:
        item.update({field: item.get(field) or "" for field in ITEM_FIELDS})
        check_id(place, item, "item_id", seen)
        check_text(place, item, ITEM_FIELDS)
        if not item_text(item):
            stop(f"{place}: item_id {item['item_id']!r}: neither title nor description; give it a text or leave it out")
    return read_jsonl(path, ("item_id", "title"), check)


def check_key(num_levels: int, k: int) -> None:
    """Stop unless evaluate.build_trie can number all SIDs that `k` codes per level can spell."""
    if k ** num_levels > 2 ** 62:
        stop(f"{num_levels} levels of {k} codes do not fit one 64-bit key; use fewer levels or codes")


def check_sids(path: str | Path, items: list[dict]) -> list[dict]:
    """The items, if each has a "sid" of one token per level a, b, ..., as many as the first one; else stops."""
    for item in items:
        sid = item.get("sid")
        if not isinstance(sid, list) or len(sid) < 2 or len(sid) != len(items[0]["sid"]) or any(
                parse_sid_token(t)[0] != level for level, t in enumerate(sid)):
            stop(f"{path}: item {item['item_id']!r} has no valid SID ({sid!r}); all need one token for each of 2 to "
                 f"{len(LEVELS)} levels, like ['<a_12>', '<b_7>', '<c_3>']")
    check_key(len(items[0]["sid"]), 1 + int(codes_of(items).max()))
    return items


def read_catalogue(path: str | Path) -> list[dict]:
    """Read a run's items.jsonl: items with their "sid", all of the same number of levels."""
    return check_sids(path, read_items(path))


def check_known(where: str, item_ids, known: set) -> None:
    """Stop at the first item that the catalogue does not hold, or at a list that is none."""
    if not isinstance(item_ids, list) or not item_ids:
        stop(f"{where}: needs a list of at least one item_id")
    for i in item_ids:
        if not isinstance(i, (int, float, str)) or i not in known:
            stop(f"{where}: item {i!r} is not in the catalogue; add it to items.jsonl or drop it")


def read_samples(path: str | Path, known: set) -> list[dict]:
    """Read train/valid/test.jsonl: {"user_id", "history": [item_id, ...], "target": item_id}."""
    def check(place: str, sample: dict) -> None:
        check_id(place, sample, "user_id", {})
        check_known(f"{place}, history", sample["history"], known)
        check_known(f"{place}, target", [sample["target"]], known)
    return read_jsonl(path, ("user_id", "history", "target"), check)


# ---------------------------------------------------------------------------------------------------------
# Encoders: text -> (N, D), rows of length 1
# ---------------------------------------------------------------------------------------------------------

def terms_of(text: str) -> list[str]:
    """Words and pairs of neighbouring words, lower case: "Steel rod" -> ["steel", "rod", "steel rod"]."""
    words = WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def tfidf(texts: list[str], column: dict[str, int], idf: torch.Tensor) -> torch.Tensor:
    """Weigh (1 + log tf) * idf, rows of length 1; a sparse (N, V) matrix."""
    counted = [(row, column[t], n) for row, text in enumerate(texts)
               for t, n in Counter(terms_of(text)).items() if t in column]
    rows, columns, counts = torch.tensor(counted, dtype=torch.long).reshape(-1, 3).T
    values = (1 + counts.double().log()).float() * idf[columns]
    norms = torch.zeros(len(texts)).index_add_(0, rows, values ** 2).sqrt().clamp_min(1e-12)
    with torch.sparse.check_sparse_tensor_invariants(False):            # the argument alone still warns in torch 2.11
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), values / norms[rows],
                                       (len(texts), len(idf))).coalesce()


def fit_lsa(texts: list[str]) -> dict:
    """Fit latent semantic analysis: TF-IDF, then the leading right singular vectors, (V, D)."""
    frequency = Counter(t for text in texts for t in set(terms_of(text)))
    kept = sorted(frequency, key=lambda t: (-frequency[t], t))
    kept = ([t for t in kept if frequency[t] > 1] or kept)[:LSA_MAX_TERMS]
    if not kept:
        stop("no item text holds a word or a number; the lsa encoder has nothing to work with")
    idf = torch.tensor([np.log(len(texts) / frequency[t]) + 1 for t in kept], dtype=torch.float32)
    matrix = tfidf(texts, {t: j for j, t in enumerate(kept)}, idf)
    dim = min(LSA_DIM, *matrix.shape)
    # svd_lowrank draws its random projection from the global generator, which main() seeds
    _, _, components = torch.svd_lowrank(matrix, q=min(2 * dim, *matrix.shape), niter=4)
    return {"name": "lsa", "terms": kept, "idf": idf, "components": components[:, :dim].contiguous()}


def encode_lsa(texts: list[str], encoder: dict) -> torch.Tensor:
    """Project texts on the LSA components; (N, D), rows of length 1."""
    column = {t: j for j, t in enumerate(encoder["terms"])}
    x = torch.sparse.mm(tfidf(texts, column, encoder["idf"]), encoder["components"])
    return torch.nn.functional.normalize(x, dim=1)


@torch.no_grad()
def encode_hf(texts: list[str], encoder: dict, batch_size: int, device: torch.device) -> torch.Tensor:
    """Embed texts with a frozen Hugging Face encoder, mean or last-token pooling; (N, D), rows of length 1."""
    from transformers import AutoModel, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder["name"], padding_side="right")
        model = AutoModel.from_pretrained(
            encoder["name"], dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OSError, ValueError) as error:
        stop(f"--encoder {encoder['name']}: cannot be loaded ({str(error).splitlines()[0]})")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.to(device).eval()
    reach = min(encoder["max_length"], getattr(model.config, "max_position_embeddings", None) or math.inf)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))      # similar lengths, little padding
    out = torch.empty(len(texts), model.config.hidden_size)
    for start in tqdm(range(0, len(order), batch_size), desc="encode", unit="batch", disable=None):
        rows = order[start:start + batch_size]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=reach,
                          return_tensors="pt").to(device)
        hidden = model(**batch).last_hidden_state.float()               # (B, T, D)
        mask = batch["attention_mask"]
        if encoder["pooling"] == "last":
            pooled = hidden[torch.arange(len(rows), device=device), mask.sum(1) - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out[rows] = torch.nn.functional.normalize(pooled, dim=1).cpu()
    return out


def encode(texts: list[str], encoder: dict, batch_size: int, device: torch.device) -> torch.Tensor:
    """Embed texts with a fitted or named encoder, then its PCA where it has one; (N, D)."""
    x = encode_lsa(texts, encoder) if encoder["name"] == "lsa" else encode_hf(texts, encoder, batch_size, device)
    return (x - encoder["pca_mean"]) @ encoder["pca_components"] if "pca_mean" in encoder else x


def fit_pca(x: torch.Tensor, dim: int) -> dict:
    """Mean (D,) and the `dim` leading principal axes (D, dim) of the embeddings."""
    if dim > min(x.shape):
        stop(f"--dim {dim} is more than the {min(x.shape)} dimensions that the embeddings have")
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))           # eigenvalues ascending
    return {"pca_mean": mean, "pca_components": vectors.flip(1)[:, :dim].contiguous()}


# ---------------------------------------------------------------------------------------------------------
# RQ-KMeans (eqs. 1-3)
# ---------------------------------------------------------------------------------------------------------

def seed_centroids(x: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: draw each next seed with probability proportional to its squared distance; (K, D)."""
    square = (x * x).sum(1)                                             # (N,)
    distance = torch.full_like(square, torch.inf)
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    for _ in range(k - 1):
        c = x[chosen[-1]]
        new = square - 2 * (x @ c) + square[chosen[-1]]
        new[new <= 1e-6 * (square + square[chosen[-1]])] = 0            # a copy of c, up to rounding
        distance = torch.minimum(distance, new)
        total = distance.double().cumsum(0)
        if total[-1] <= 0:
            stop(f"codebook size {k} is larger than the number of distinct embeddings ({len(chosen)}) at this "
                 "level; choose a smaller --codebook-size or fewer --num-levels")
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * total[-1]
        row = int(torch.searchsorted(total, draw, right=True).clamp_max(len(x) - 1))
        chosen.append(row if distance[row] > 0 else int(distance.argmax()))
    return x[chosen].clone()


def assign(x: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each row and the squared distance to it (eq. 2); (N, D), (K, D) -> (N,), (N,)."""
    rows = max(1, DISTANCE_BYTES // (4 * len(centroids)))               # bounded memory, whatever N is
    square = (centroids * centroids).sum(1)
    nearest = [torch.addmm(square, block, centroids.T, alpha=-2).min(1) for block in x.split(rows)]
    distance, codes = (torch.cat(parts) for parts in zip(*nearest))
    return codes, (distance + (x * x).sum(1)).clamp_min(0)


def kmeans(x: torch.Tensor, k: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm (eq. 1); (N, D) -> (K, D). Empty clusters restart at the farthest points."""
    centroids, previous = seed_centroids(x, k, generator), None
    for _ in range(iterations):
        codes, distance = assign(x, centroids)
        if previous is not None and torch.equal(codes, previous):
            break
        previous = codes
        counts = torch.bincount(codes, minlength=k)
        sums = torch.zeros_like(centroids).index_add_(0, codes, x)
        centroids = sums / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().squeeze(1)
        centroids[empty] = x[distance.topk(len(empty)).indices]
    return centroids


def quantize(x: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode by residuals (eqs. 2-3); (N, D), (L, K, D) -> codes (N, L), the last level's input (N, D)."""
    codes = []
    for level, book in enumerate(centroids):
        codes.append(assign(x, book)[0])
        if level + 1 < len(centroids):
            x = x - book[codes[-1]]
    return torch.stack(codes, 1), x


def fit_codebook(x: torch.Tensor, num_levels: int, k: int, iterations: int, seed: int) -> torch.Tensor:
    """Learn one codebook per level on the residuals of the level above (eqs. 1-3); (L, K, D)."""
    generator, books = torch.Generator().manual_seed(seed), []
    print(f"level   - | mse {float((x * x).sum(1).mean()):.4f} (mean squared length of the embeddings)")
    for level in range(num_levels):
        books.append(kmeans(x, k, iterations, generator))
        codes, _ = assign(x, books[-1])
        x = x - books[-1][codes]
        counts = torch.bincount(codes).double()
        p = counts[counts > 0] / len(x)
        print(f"level   {LEVELS[level]} | mse {float((x * x).sum(1).mean()):.4f} | codes in use {len(p)}/{k} | "
              f"perplexity {float((-p * p.log()).sum().exp()):.1f} | largest cluster {int(counts.max())}")
    return torch.stack(books)


def choose_codebook(x: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Learn codebooks of --codebook-size, or of a size that gives each item of a prefix a code; (N, D) -> (L, K, D)."""
    k = args.codebook_size or min(256, 1 << max(1, min(8, len(x) // 3), len(x) // 12).bit_length() - 1)
    while True:
        check_key(args.num_levels, k)
        print(f"encoder {args.encoder} | embeddings {tuple(x.shape)} | codebooks {args.num_levels} x {k}")
        centroids = fit_codebook(x, args.num_levels, k, ITERATIONS, args.seed)
        if args.codebook_size:
            return centroids
        prefixes = quantize(x, centroids)[0][:, :-1]
        most = int(prefixes.unique(dim=0, return_counts=True)[1].max())
        if most <= k:
            return centroids
        print(f"one prefix has {most} items but {k} last codes: once more with {2 * k}")
        k *= 2


def resolve_collisions(codes: np.ndarray, residuals: np.ndarray, book: np.ndarray, policy: str,
                       seed: int, first_new: int = 0) -> np.ndarray:
    """Give all but one item of each shared SID another last code; (N, L), (N, D), (K, D) -> (N, L).

    Rows before `first_new` are older than this run and never move. The item nearest to the shared centroid
    keeps its code; "nearest" gives the others the free code whose centroid is nearest to their residual,
    "random" (TS-Rec, footnote 1) any free one. Stops where a prefix holds more items than K.
    """
    codes, rng, rows_of = codes.copy(), np.random.default_rng(seed), {}
    for row, (*prefix, _) in enumerate(codes.tolist()):
        rows_of.setdefault(tuple(prefix), []).append(row)
    for prefix, rows in sorted(rows_of.items()):
        rows = np.array(rows)
        distance = ((residuals[rows] - book[codes[rows, -1]]) ** 2).sum(1)
        rows = rows[np.lexsort((distance, rows >= first_new))]          # the older first, then the nearer
        taken, first = np.unique(codes[rows, -1], return_index=True)    # the first with a code keeps it
        movers = [row for row in np.delete(rows, first) if row >= first_new]
        free = np.setdiff1d(np.arange(len(book)), taken)
        if len(free) < len(movers):
            name = "".join(sid_token(level, code) for level, code in enumerate(prefix))
            stop(f"prefix {name} has {len(rows)} items but only {len(book)} last codes; "
                 f"{'make a new run with' if first_new else 'choose'} a larger --codebook-size or more --num-levels")
        for row in movers:
            distance = ((residuals[row] - book[free]) ** 2).sum(1)
            pick = rng.integers(len(free)) if policy == "random" else distance.argmin()
            codes[row, -1], free = free[pick], np.delete(free, pick)
    return codes


def colliding(codes: np.ndarray) -> int:
    """Number of items beyond the first on each SID."""
    return len(codes) - len(np.unique(codes, axis=0))


def give_sids(items: list[dict], x: torch.Tensor, centroids: torch.Tensor, args: argparse.Namespace,
              old: list[dict] = ()) -> None:
    """Write a free SID into every item's "sid", from its embedding; (N, D), (L, K, D). Those of `old` are taken."""
    raw, residuals = (part.cpu().numpy() for part in quantize(x, centroids))
    raw = np.concatenate([codes_of(old), raw]) if old else raw
    residuals = np.concatenate([np.zeros((len(old), residuals.shape[1]), np.float32), residuals])
    codes = resolve_collisions(raw, residuals, centroids[-1].cpu().numpy(), args.collision, args.seed, len(old))
    print(f"collisions {colliding(raw)} of {len(raw)} items before, {colliding(codes)} after "
          f"({args.collision} free last code)")
    for item, row in zip(items, codes[len(old):].tolist()):
        item["sid"] = [sid_token(level, code) for level, code in enumerate(row)]


# ---------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------

def read_interactions(path: str | Path, known: set, timed: bool) -> list[dict]:
    """Read interactions.jsonl: {"user_id", "items": [...]} and, needed where `timed`, "timestamps"."""
    seen = {}

    def check(place: str, user: dict) -> None:
        check_id(place, user, "user_id", seen)
        check_known(f"{place}, items", user["items"], known)
        times = user.setdefault("timestamps", list(range(len(user["items"]))))
        if (not isinstance(times, list) or not all(isinstance(t, (int, float)) for t in times)
                or len(times) != len(user["items"]) or times != sorted(times)):
            stop(f"{place}: timestamps must be a list of numbers, as many as items, and ascending")
    return read_jsonl(path, ("user_id", "items", "timestamps")[:2 + timed], check)


def k_core(users: list[dict], min_count: int) -> list[dict]:
    """Drop items and users with fewer than `min_count` interactions until none is left."""
    before = None
    while before != (before := sum(len(user["items"]) for user in users)):
        counts = Counter(i for user in users for i in user["items"])
        kept = []
        for user in users:
            index = [j for j, i in enumerate(user["items"]) if counts[i] >= min_count]
            if len(index) >= min_count:
                kept.append({**user, **{f: [user[f][j] for j in index] for f in ("items", "timestamps")}})
        users = kept
    return users


def split_samples(users: list[dict], split: str) -> dict[str, list[dict]]:
    """One sample per interaction but a user's first, its history all that came before.

    leave-one-out: a user's last target is test, the one before valid, the rest train. chronological: all
    samples in the order of their target's time, cut 8:1:1, as MiniOneRec and TS-Rec do.
    """
    samples = [(user["timestamps"][t], len(user["items"]) - t,
                {"user_id": user["user_id"], "history": user["items"][:t], "target": user["items"][t]})
               for user in users for t in range(1, len(user["items"]))]
    if split == "leave-one-out":
        return {name: [s for _, left, s in samples if min(left, 3) == k]
                for name, k in (("train", 3), ("valid", 2), ("test", 1))}
    ordered = [s for _, _, s in sorted(samples, key=lambda sample: sample[0])]
    a, b = len(ordered) * 8 // 10, len(ordered) * 9 // 10
    return {"train": ordered[:a], "valid": ordered[a:b], "test": ordered[b:]}


def make_samples(args: argparse.Namespace, items: list[dict]) -> tuple[dict[str, list[dict]], list[dict]]:
    """The three sample lists, histories cut to the most recent items, and the catalogue after filtering."""
    known = {item["item_id"] for item in items}
    if args.split == "official":
        if args.min_count > 1:
            stop("--min-count filters interactions.jsonl; an official split is used as it is")
        split = {name: read_samples(Path(args.data) / f"{name}.jsonl", known) for name in ("train", "valid", "test")}
    else:
        path = args.interactions or Path(args.data) / "interactions.jsonl"
        users = read_interactions(path, known, timed=args.split == "chronological")
        if args.min_count > 1:
            users = k_core(users, args.min_count)
            known = {i for user in users for i in user["items"]}
            items = [item for item in items if item["item_id"] in known]
        split = split_samples(users, args.split)
        print(f"interactions | {len(users)} users | {sum(len(u['items']) for u in users)} interactions")
    if not all(split.values()):
        stop(f"the {' and '.join(n for n in split if not split[n])} split is empty; give more interactions "
             "per user, or a lower --min-count")
    for sample in (s for samples in split.values() for s in samples):
        sample["history"] = sample["history"][-args.max_history:]
    return split, items


# ---------------------------------------------------------------------------------------------------------
# Amazon reviews: download, filter, clean
# ---------------------------------------------------------------------------------------------------------

def fetch(url: str, path: Path) -> None:
    """GET `url` to `path` through a part file named after the host's version of it; what that holds is not sent again.

    RFC 9110, 13.1.5: with If-Range a host sends the rest of that version (206) or the whole file (200). Checked by
    size and, where the host has it, Content-MD5 (RFC 1864). Raises requests.RequestException where it fails or is cut.
    """
    options = {"headers": {"Accept-Encoding": "identity"}, "timeout": TIMEOUT, "allow_redirects": True}
    with requests.head(url, **options) as reply:
        reply.raise_for_status()
        told = reply.headers
    size, version = int(told.get("Content-Length", 0)), told.get("ETag") or told.get("Last-Modified", "")
    part = path.with_name(f"{path.name}.{zlib.crc32(version.encode()):08x}.part")
    have = part.stat().st_size if part.exists() else 0
    if 0 < have < size and version[:2] not in ("", "W/"):
        options["headers"] |= {"Range": f"bytes={have}-", "If-Range": version}
    with requests.get(url, stream=True, **options) as reply:
        reply.raise_for_status()
        reply.raw.headers.pop("Content-Encoding", None)                 # a .gz shall stay one
        have = have if reply.status_code == 206 else 0
        with open(part, "ab" if have else "wb") as file, tqdm(
                desc=path.name, total=size or None, initial=have, unit="B", unit_scale=True, disable=None) as bar:
            for block in reply.iter_content(1 << 16):
                bar.update(file.write(block))
    have, md5 = part.stat().st_size, told.get("Content-MD5")
    if size and size != have:
        raise requests.ConnectionError(f"{have} of {size} bytes arrived")
    if have and md5 and md5 != base64.b64encode(hashlib.md5(np.memmap(part, mode="r")).digest()).decode():
        part.unlink()
        stop(f"{url}: what arrived does not have the host's Content-MD5; run again to fetch it anew")
    os.replace(part, path)


def download(url: str, path: Path) -> Path:
    """Fetch `url` to `path` unless it is there, in a few attempts; returns `path`."""
    for wait in () if path.exists() else WAITS:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(url, path)
            break
        except requests.RequestException as error:
            refused = getattr(error.response, "status_code", 500) in range(400, 429)    # but 429, too many requests
            if refused or isinstance(error, ValueError):                # requests' own for a URL that is none
                stop(f"{error}; check --amazon, --year and --amazon-url")
            if wait is None:
                stop(f"{url}: {error}; what has arrived is kept, run again to fetch the rest")
            time.sleep(wait)
        except OSError as error:
            stop(f"{path}: cannot be written ({error})")
    return path


def read_dump(path: Path, parse):
    """Yield parse(line) of each line of a downloaded file; stops where it is damaged or cut short."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield parse(line)
    except (OSError, EOFError, LookupError, TypeError, ValueError, zlib.error) as error:
        stop(f"{path}: damaged at or after line {number} ({error}); delete it and run again to fetch it anew")


def read_ratings(path: Path, args: argparse.Namespace):
    """Yield (user, item, time) of each rating inside the window, the time as in the dump."""
    dump = AMAZON[args.year]
    low, high = (args.since or 0) * dump["second"], (args.until or math.inf) * dump["second"]

    def parse(line: str) -> tuple[str, str, int]:
        cells = line.replace("timestamp", "-1").split(",")              # the header of 2023 is before any window
        return cells[dump["user"]], cells[1 - dump["user"]], int(cells[3])
    return (rating for rating in read_dump(path, parse) if low <= rating[2] < high)


def plain(text) -> str:
    """Clean a field, a string or a list of them, of markup and halves of emoji: ["<b>A&amp;B</b>", "c"] -> "A&B c"."""
    text = " ".join(map(str, text)) if isinstance(text, list) else str(text or "")
    text = text.encode("utf-8", "ignore").decode()
    return " ".join(TAG.sub(" ", html.unescape(text)).split())


def read_metadata(path: Path, args: argparse.Namespace, wanted: set) -> dict[str, dict]:
    """The wanted items that have a text, by id; with --peers, those with a title of at most 20 words."""
    dump, items = AMAZON[args.year], {}
    rows = read_dump(path, lambda line: (row := json.loads(line), row[dump["item_id"]]))
    for row, item_id in tqdm(rows, desc="metadata", unit=" items", disable=None):
        if item_id not in wanted or item_id in items:
            continue
        title = str(row.get("title") or "").strip(' "')
        title = "" if SCRAPED.search(title) else title
        if args.peers and (len(title) < 2 or len(title.split(" ")) > 20):
            continue
        item = {"item_id": item_id, "title": plain(title), "brand": plain(row.get(dump["brand"])),
                "description": plain(row.get("description") or row.get("features")),
                "categories": " > ".join(filter(None, map(plain, row.get(dump["categories"]) or [])))}
        if item_text(item):
            items[item_id] = item
    return items


def prepare_amazon(args: argparse.Namespace) -> None:
    """Make DATA/items.jsonl and interactions.jsonl from one category of the 2018 or 2023 Amazon reviews.

    Ni et al., EMNLP 2019 (times in seconds); Hou et al., arXiv 2403.03952 (milliseconds, a user's first rating of an
    item only). What a user rates twice at the same time counts once; with --peers it stays twice.
    """
    dump, by_user, by_item, histories = AMAZON[args.year], Counter(), Counter(), {}
    ratings, metadata = (download(f"{args.amazon_url}/{path}", Path(args.cache).expanduser() / path)
                         for path in (dump[kind].format(args.amazon) for kind in ("ratings", "metadata")))
    for user, item, _ in read_ratings(ratings, args):
        by_user[user] += 1
        by_item[item] += 1
    items = read_metadata(metadata, args, {i for i, n in by_item.items() if n >= args.min_count})
    for user, item, moment in read_ratings(ratings, args):              # once more, to hold only what may stay
        if item in items and by_user[user] >= args.min_count:
            histories.setdefault(user, []).append((moment, item))
    users = []
    for user, pairs in histories.items():
        moments, bought = zip(*sorted(pairs if args.peers else dict.fromkeys(pairs), key=lambda pair: pair[0]))
        users.append({"user_id": user, "items": list(bought), "timestamps": list(moments)})
    users = k_core(users, args.min_count)
    known = {i for user in users for i in user["items"]}
    print(f"amazon {args.year} {args.amazon} | {by_user.total()} ratings in the window | {args.min_count}-core: "
          f"{len(users)} users, {len(known)} items, {sum(len(u['items']) for u in users)} interactions")
    if not users:
        stop(f"--amazon {args.amazon}: nothing is left; a longer --since to --until, or a lower --min-count")
    write_jsonl(Path(args.data) / "items.jsonl", [item for i, item in items.items() if i in known])
    write_jsonl(Path(args.data) / "interactions.jsonl", users)


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def month(text: str) -> int:
    """The first second of a month, UTC: "1970-02" -> 2678400; ValueError at anything else."""
    return calendar.timegm(time.strptime(text, "%Y-%m"))


def within(kind: type, low: float, below: float = math.inf) -> Callable:
    """An argparse type: low <= number < below."""
    def read(text: str) -> float:
        value = kind(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low} and below {below}")
        return value
    read.__name__ = kind.__name__
    return read


SEED = within(int, 0, 2 ** 31)          # what random, numpy and torch all take


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument_group("files").add_argument
    flag("--run", default="runs/demo", help="folder that the outputs are written to")
    flag("--data", help="folder with items.jsonl and interactions.jsonl or train/valid/test.jsonl",
         default=str(Path(__file__).parent / "tests" / "demo"))
    flag("--items", help="catalogue, instead of DATA/items.jsonl")
    flag("--interactions", help="interactions, instead of DATA/interactions.jsonl")
    flag("--sids", help="take the SIDs from this file ({item_id, sid} lines), collisions kept")
    flag("--codebook", help="append the new items in --items to the run's, SIDs from this codebook.pt; nothing moves")
    flag = parser.add_argument_group("Amazon reviews").add_argument
    flag("--amazon", metavar="CATEGORY", help="make RUN/data from this category, as the host spells it, and read it")
    flag("--year", type=int, choices=AMAZON, default=2018, help="release of the reviews")
    flag("--since", type=month, metavar="YYYY-MM", help="first month, UTC")
    flag("--until", type=month, metavar="YYYY-MM", help="the month after the last one, UTC")
    flag("--peers", action="store_true", help="as MiniOneRec: only titles of 1 to 20 words, repeated ratings kept")
    flag("--cache", default="~/.cache/amazon_reviews", help="folder that downloads are kept in")
    flag("--amazon-url", default=AMAZON_URL, help="host of the dumps, or a mirror with the same paths")
    flag = parser.add_argument_group("encoder").add_argument
    flag("--encoder", default="lsa", help="lsa, or a Hugging Face model name or folder")
    flag("--pooling", choices=("mean", "last"), default="mean", help="of the tokens; Qwen3-Embedding: last")
    flag("--max-length", type=within(int, 1), default=512, help="tokens that a Hugging Face encoder reads per item")
    flag("--batch-size", type=within(int, 1), default=32, help="items that a Hugging Face encoder reads at once")
    flag("--dim", type=within(int, 0), default=0, help="PCA to this width first, 0 for none; the paper: 32")
    flag = parser.add_argument_group("quantizer").add_argument
    flag("--num-levels", type=within(int, 2, len(LEVELS) + 1), default=3, help="L, codes per item")
    flag("--codebook-size", type=within(int, 0), default=0,
         help="K, codes per level; 0: 256, or by the number of items")
    flag("--collision", choices=("nearest", "random"), default="nearest", help="last code of a colliding item")
    flag = parser.add_argument_group("samples").add_argument
    flag("--split", choices=("official", "leave-one-out", "chronological"),
         help="default: official where DATA/train.jsonl exists and no --interactions, else leave-one-out")
    flag("--max-history", type=within(int, 1), default=10, help="most recent items kept; STAR: 20")
    flag("--min-count", type=within(int, 1),
         help="drop items and users with fewer, repeatedly; 5 with --amazon, else 1")
    parser.add_argument("--seed", type=SEED, default=42, help="seed of the K-means and of --collision random")
    parser.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda where there is one")
    args = parser.parse_args(argv)
    for wrong, message in (
            (args.codebook and not args.items, "--codebook encodes new items: name their file with --items"),
            (args.codebook and args.sids, "--codebook and --sids exclude each other"),
            (args.amazon and (args.data != parser.get_default("data") or args.items or args.interactions),
             "--amazon makes RUN/data and reads it: leave out --data, --items and --interactions"),
            (not args.amazon and (args.since or args.until or args.peers),
             "--since, --until and --peers choose from what --amazon downloads: name its category"),
            ((args.since or 0) >= (args.until or math.inf), "--since must be before --until"),
            (not args.amazon_url.startswith("http"), "--amazon-url must begin with http")):
        if wrong:
            parser.error(message)
    check_key(args.num_levels, args.codebook_size)
    args.data = str(Path(args.run) / "data") if args.amazon else args.data
    args.min_count = args.min_count or (5 if args.amazon else 1)
    official = not args.interactions and (Path(args.data) / "train.jsonl").exists()
    args.split = args.split or ("official" if official else "leave-one-out")
    return args


def append_items(args: argparse.Namespace, device: torch.device) -> None:
    """Give SIDs to new items from an existing codebook and append them to the run's catalogue."""
    path = Path(args.run) / "items.jsonl"
    old, new = read_catalogue(path), read_items(args.items)
    twice = {item["item_id"] for item in old} & {item["item_id"] for item in new}
    if twice:
        stop(f"{args.items}: item_id {sorted(twice, key=str)[0]!r} has a SID already in {path}; leave it out")
    book, highest = load_codebook(args.codebook), codes_of(old).max()
    levels, k, _ = book["centroids"].shape
    if levels != len(old[0]["sid"]) or k <= highest:
        stop(f"{args.codebook} holds {levels} x {k} codes, {path} needs {len(old[0]['sid'])} x {highest + 1}; "
             "name the run's own one")
    x = encode([item_text(item) for item in new], book["encoder"], args.batch_size, device)
    give_sids(new, x, book["centroids"], args, old)
    write_jsonl(path, old + new)
    print(f"wrote {path}: {len(old)} items as they were, {len(new)} new ones, e.g. "
          f"{new[0]['item_id']!r} {''.join(new[0]['sid'])} {new[0]['title']!r}")


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    run = Path(args.run)
    if args.codebook:
        return append_items(args, device)
    if args.amazon:
        prepare_amazon(args)

    items = read_items(args.items or Path(args.data) / "items.jsonl")
    split, items = make_samples(args, items)
    print(f"device {device} | {len(items)} items | split {args.split}: "
          + ", ".join(f"{len(samples)} {name}" for name, samples in split.items()))
    if args.sids:
        given = {str(row["item_id"]): row["sid"] for row in read_jsonl(args.sids, ("item_id", "sid"))}
        for item in items:
            item["sid"] = given.get(str(item["item_id"]))
        check_sids(args.sids, items)
        print(f"SIDs from {args.sids}: collisions {colliding(codes_of(items))}, kept; no codebook.pt")
    else:
        texts = [item_text(item) for item in items]
        encoder = fit_lsa(texts) if args.encoder == "lsa" else {
            "name": args.encoder, "pooling": args.pooling, "max_length": args.max_length}
        x = encode(texts, encoder, args.batch_size, device)
        if args.dim:
            encoder |= fit_pca(x, args.dim)
            x = (x - encoder["pca_mean"]) @ encoder["pca_components"]
        x = x.to(device)
        centroids = choose_codebook(x, args)
        give_sids(items, x, centroids, args)
        with replacing(run / "codebook.pt") as temporary:
            torch.save({"centroids": centroids.cpu(), "encoder": encoder, "args": vars(args)}, temporary)
    for name, samples in split.items():
        write_jsonl(run / f"{name}.jsonl", samples)
    write_jsonl(run / "items.jsonl", items)
    if args.sids and (run / "codebook.pt").is_file():
        (run / "codebook.pt").unlink()                                  # an older run's, of other SIDs
    print(f"example | {items[0]['item_id']!r} {''.join(items[0]['sid'])} {items[0]['title']!r}")
    print(f"wrote {run}/items.jsonl, train.jsonl, valid.jsonl, test.jsonl" + ("" if args.sids else ", codebook.pt"))


if __name__ == "__main__":
    main()
