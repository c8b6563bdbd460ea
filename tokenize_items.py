"""Stage 1: turn a catalogue into semantic IDs (SIDs), and user histories into samples.

A frozen encoder turns each item's text into a vector. K-means on the vectors gives the first code of
every item, K-means on what is left over the second, and so on: an item becomes <a_12><b_7><c_3>.
TS-Rec (arXiv 2602.22632), section 3.2.1:

    Eq. 1   C_l = K-means(R_l, K)                      R_1 = X, the (N, D) item vectors
    Eq. 2   s_il = argmin_k || R_il - C_lk ||          Eq. 3   R_i,l+1 = R_il - C_l,s_il

Reads   DATA/items.jsonl; DATA/train|valid|test.jsonl (a ready split) or DATA/interactions.jsonl
Writes  RUN/items.jsonl (the input plus "sid": ["<a_12>", "<b_7>", "<c_3>"]), train|valid|test.jsonl,
        codebook.pt (centroids (L, K, D) and the encoder, for new items later)

Differs from the papers
  1. `--encoder lsa` (default) needs no download. TS-Rec: Qwen3-Embedding-4B. 512 tokens; STAR: 2,048.
  2. A colliding item gets the free last code nearest to its residual; in TS-Rec any (--collision random).
  3. K is 256 as in the papers, but less for fewer than 3,072 items.
  4. `--quantizer rqvae`: no dropout, no diversity loss, fewer updates and levels than STAR.

Examples
  python tokenize_items.py --run runs/industrial --data ../shared/data/industrial
  python tokenize_items.py --run runs/demo --add new_items.jsonl
"""
import argparse
import contextlib
import json
import math
import os
import pickle
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

# Shapes: N items, B a batch, D width of the vectors, L levels, K codes per level, V terms.
LEVELS = "abcdefgh"  # code 12 of level 0 is <a_12>, of level 1 <b_12>
ID = (int, str)      # the types of item_id and user_id
SID_TOKEN = re.compile(r"<([a-h])_(0|[1-9][0-9]{0,6})>")
LSA_WIDTH, LSA_TERMS = 128, 50_000  # D; only the most frequent terms are kept
MAX_LENGTH, BATCH = 512, 32         # tokens of an item, items of a batch
KMEANS_ITERATIONS, DISTANCE_BYTES = 100, 64 << 20  # at most, per level; per block of distances
RQVAE_WIDTH, RQVAE_BETA = 32, 0.25  # width of its codes; commitment weight (TIGER)
RQVAE_UPDATES, RQVAE_BATCH, RQVAE_LR, RQVAE_RESTART = 6000, 128, 2e-3, 100
SINKHORN_ROUNDS, SINKHORN_STEPS, SINKHORN_EPSILON = 20, 50, 0.0015  # LC-Rec: 0.003 of half the range
DEMO = Path(__file__).parent / "tests" / "demo"

# ---- Encoders: texts -> (N, D) -----------------
def item_text(item: dict) -> str:
    """Title and description as one text (section 3.2.1)."""
    return ". ".join(item[name].strip() for name in ("title", "description") if item[name].strip())

def terms_of(text: str) -> list[str]:
    """Words and word pairs, lower case: "Steel rod" -> ["steel", "rod", "steel rod"]."""
    words = re.findall(r"[^\W_]+", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]

def tfidf_matrix(texts: list[str], terms: list[str], idf: Tensor) -> Tensor:
    """Terms weighed by (1 + log tf) * idf, rows of length 1; idf (V,) -> sparse (N, V)."""
    column_of = {term: column for column, term in enumerate(terms)}
    entries = [(row, column_of[term], count) for row, text in enumerate(texts)
               for term, count in Counter(terms_of(text)).items() if term in column_of]
    rows, columns, counts = torch.tensor(entries, dtype=torch.long).reshape(-1, 3).T
    values = (1 + counts.double().log()).float() * idf[columns]
    norms = torch.zeros(len(texts)).index_add_(0, rows, values ** 2).sqrt().clamp_min(1e-12)
    shape = (len(texts), len(terms))
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values / norms[rows], shape,
                                   check_invariants=False).coalesce()

def fit_lsa(texts: list[str]) -> dict:
    """LSA: the leading right singular vectors (V, D) of the TF-IDF matrix."""
    frequency = Counter(term for text in texts for term in set(terms_of(text)))
    repeated = [term for term, count in frequency.items() if count > 1]
    terms = sorted(repeated, key=lambda term: (-frequency[term], term))[:LSA_TERMS]
    if not terms:
        stop("no word occurs in two item texts, which the lsa encoder needs")
    idf = torch.tensor([math.log(len(texts) / frequency[term]) + 1 for term in terms])
    matrix = tfidf_matrix(texts, terms, idf)
    width = min(LSA_WIDTH, *matrix.shape)
    _, _, components = torch.svd_lowrank(matrix, q=min(2 * width, *matrix.shape), niter=4)
    return {"name": "lsa", "terms": terms, "idf": idf, "components": components[:, :width].contiguous()}

@torch.no_grad()
def encode_hf(texts: list[str], encoder: dict, device: torch.device) -> Tensor:
    """Embed texts with a frozen Hugging Face encoder; -> (N, D), rows of length 1."""
    from transformers import AutoModel  # slow to import, not needed for lsa
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_pretrained(AutoModel, encoder["name"], dtype=dtype)
    model = model.get_encoder() if model.config.is_encoder_decoder else model  # of T5
    model.to(device)
    max_length = min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", 0) or MAX_LENGTH)
    texts = [text.encode(errors="replace").decode() for text in texts]  # half an emoji
    ids = tokenizer(texts, truncation=True, max_length=max_length).input_ids
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for rows in tqdm(torch.tensor([*map(len, ids)]).argsort().split(BATCH), desc="encode", disable=None):
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, padding_side="right",
                              return_tensors="pt").to(device)
        hidden = model(**batch).last_hidden_state.float()  # (B, T, D)
        mask = batch["attention_mask"]
        if encoder["pooling"] == "last":
            pooled = hidden[torch.arange(len(rows), device=device), mask.sum(1) - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors[rows] = F.normalize(pooled, dim=1).cpu()
    return vectors

def fit_pca(x: Tensor, dim: int) -> dict:
    """The mean (D,) and the leading principal axes (D, dim) of x (N, D)."""
    if dim > min(x.shape):
        stop(f"--dim {dim} is more than the {min(x.shape)} items or dimensions")
    mean = x.mean(0)
    axes = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.flip(1)  # largest first
    return {"pca_mean": mean, "pca_axes": axes[:, :dim].contiguous()}

def encode(texts: list[str], encoder: dict, device: torch.device) -> Tensor:
    """Texts to vectors: lsa or a named encoder, then PCA and RQ-VAE if any; -> (N, D)."""
    if encoder["name"] == "lsa":
        matrix = tfidf_matrix(texts, encoder["terms"], encoder["idf"])
        x = F.normalize(torch.sparse.mm(matrix, encoder["components"]), dim=1)
    else:
        x = encode_hf(texts, encoder, device)
    x = (x - encoder["pca_mean"]) @ encoder["pca_axes"] if "pca_axes" in encoder else x
    return mlp(x, encoder["rqvae"]) if "rqvae" in encoder else x

# ---- RQ-KMeans (eqs. 1-3) ----------------------
def seed_centroids(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: draw rows by squared distance to those before, also twice if need be; (N, D) -> (K, D)."""
    if k > len(x):
        stop(f"codebook size {k} is larger than the {len(x)} items; choose a smaller --codebook-size")
    square = (x * x).sum(1)
    distance = torch.full_like(square, torch.inf)  # to the nearest centroid so far
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    for _ in range(k - 1):
        last = chosen[-1]
        to_last = square - 2 * (x @ x[last]) + square[last]  # |x - c|^2 = |x|^2 - 2 x.c + |c|^2
        to_last[to_last <= 1e-6 * (square + square[last])] = 0  # the same point
        distance = torch.minimum(distance, to_last)
        total = distance.double().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * total[-1]
        row = int(torch.searchsorted(total, draw, right=True).clamp_max(len(x) - 1))
        chosen.append(row if distance[row] > 0 else int(distance.argmax()))
    return x[chosen].clone()

def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each row and the squared distance (eq. 2); (N, D), (K, D) -> (N,), (N,)."""
    rows_per_block = max(1, DISTANCE_BYTES // (4 * len(centroids)))  # bounded memory
    square = (centroids * centroids).sum(1)
    blocks = [torch.addmm(square, block, centroids.T, alpha=-2).min(1) for block in x.split(rows_per_block)]
    distance = torch.cat([block.values for block in blocks]) + (x * x).sum(1)
    return torch.cat([block.indices for block in blocks]), distance.clamp_min(0)

def kmeans(x: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm (eq. 1); (N, D) -> (K, D). Empty clusters restart at the farthest points."""
    centroids = seed_centroids(x, k, generator)
    previous = None
    for _ in range(iterations):
        codes, distance = assign(x, centroids)
        if previous is not None and torch.equal(codes, previous):
            break
        previous = codes
        counts = torch.bincount(codes, minlength=k)
        centroids = torch.zeros_like(centroids).index_add_(0, codes, x) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().squeeze(1)
        centroids[empty] = x[distance.topk(len(empty)).indices]
    return centroids

def fit_codebooks(x: Tensor, num_levels: int, k: int, seed: int) -> Tensor:
    """One codebook per level, on the residuals (eqs. 1-3); (N, D) -> (L, K, D)."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = []
    for _ in range(num_levels):
        codebooks.append(kmeans(x, k, KMEANS_ITERATIONS, generator))
        x = x - codebooks[-1][assign(x, codebooks[-1])[0]]
    return torch.stack(codebooks)

def quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Encode by residuals (eqs. 2-3); (N, D), (L, K, D) -> codes (N, L), residual R_L (N, D)."""
    codes = []
    for centroids in codebooks:
        residual = x  # of the last level
        codes.append(assign(x, centroids)[0])
        x = x - centroids[codes[-1]]
    return torch.stack(codes, 1), residual

def print_levels(x: Tensor, z: Tensor, codebooks: Tensor, decode: Callable) -> None:
    """Print the error after each level, decoded, and how evenly its codes are used."""
    print(f"level   - | mse {float((x * x).sum(1).mean()):.4f} (without codes)")
    residual = z
    for level, centroids in zip(LEVELS, codebooks):
        codes, _ = assign(residual, centroids)
        residual = residual - centroids[codes]
        mse = float(((x - decode(z - residual)) ** 2).sum(1).mean())
        counts = torch.bincount(codes)
        perplexity = float(torch.special.entr(counts.double() / len(x)).sum().exp())
        print(f"level   {level} | mse {mse:.4f} | codes in use {counts.count_nonzero()}/{len(centroids)} | "
              f"perplexity {perplexity:.1f} | largest cluster {counts.max()}")

# ---- RQ-VAE (TIGER, arXiv 2305.05065, section 3.1) ----
def mlp(x: Tensor, layers: list) -> Tensor:
    """Linear layers (weight, bias) with a ReLU between them; (N, D) -> (N, D')."""
    for weight, bias in layers[:-1]:
        x = F.relu(F.linear(x, weight, bias))
    return F.linear(x, *layers[-1])

def rqvae_loss(x: Tensor, encoder: list, codebooks: Tensor, decoder: list) -> Tensor:
    """The loss of a batch, (B, D) -> (). sg[.] stops the gradient, c_l is nearest to r_l.

        z = Enc(x)     r_1 = z     r_l+1 = r_l - sg[c_l]     z' = sum_l c_l
        L = || x - Dec(z') ||^2 + sum_l || sg[r_l] - c_l ||^2 + beta || r_l - sg[c_l] ||^2
    """
    z = mlp(x, encoder)
    codes, _ = quantize(z.detach(), codebooks.detach())
    c = codebooks[range(len(codebooks)), codes]  # (B, L, D)
    r = z[:, None] - (c.cumsum(1) - c).detach()
    straight_through = z + (c.sum(1) - z).detach()  # z' with the gradient of z
    commitment = (r.detach() - c) ** 2 + RQVAE_BETA * (r - c.detach()) ** 2
    return ((x - mlp(straight_through, decoder)) ** 2).sum(1).mean() + commitment.sum((1, 2)).mean()

def fit_rqvae(x: Tensor, num_levels: int, k: int, seed: int) -> tuple[Tensor, list]:
    """Train an RQ-VAE, He initialised; (N, D) -> codebooks (L, K, RQVAE_WIDTH), encoder layers."""
    top = min(1024, 4 * x.shape[1])  # for D = 1024 STAR's, for LSA's 128 TIGER's
    widths = [x.shape[1], top, top // 2, top // 4, RQVAE_WIDTH]
    pairs = list(zip(widths, widths[1:]))
    encoder = [(torch.randn(b, a).to(x) * (2 / a) ** 0.5, x.new_zeros(b)) for a, b in pairs]
    decoder = [(torch.randn(a, b).to(x) * (2 / b) ** 0.5, x.new_zeros(a)) for a, b in pairs[::-1]]
    codebooks = fit_codebooks(mlp(x, encoder), num_levels, k, seed)
    optimizer = torch.optim.Adam([part.requires_grad_() for part in sum(encoder + decoder, (codebooks,))])
    for update in tqdm(range(RQVAE_UPDATES), desc="rq-vae", disable=None):
        optimizer.param_groups[0]["lr"] = RQVAE_LR * (1 - update / RQVAE_UPDATES)
        optimizer.zero_grad()
        rqvae_loss(x[torch.randint(len(x), (RQVAE_BATCH,))], encoder, codebooks, decoder).backward()
        optimizer.step()
        if update % RQVAE_RESTART == 0:
            z = mlp(x, encoder).data
            for centroids in codebooks.data:  # dead codes restart, as in kmeans
                codes, distance = assign(z, centroids)
                dead = torch.bincount(codes, minlength=k) == 0
                centroids[dead] = z[distance.topk(int(dead.sum())).indices]
                z = z - centroids[codes]
    print_levels(x, mlp(x, encoder).data, codebooks.data, lambda z: mlp(z, decoder).data)
    return codebooks.data, [(weight.data, bias.data) for weight, bias in encoder]

# ---- Collisions --------------------------------
def transport_plan(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Sinkhorn-Knopp: rows sum to 1 / N, columns to 1 / K; (N, D), (K, D) -> (N, K)."""
    cost = -x.astype(float) @ centroids.T  # |x|^2 and |c|^2 would cancel out
    plan = np.exp((cost.min() - cost) / max(SINKHORN_EPSILON * np.ptp(cost), 1e-30))
    for _ in range(SINKHORN_STEPS):
        plan /= len(centroids) * plan.sum(0)
        plan /= len(x) * plan.sum(1, keepdims=True)
    return plan

def resolve_collisions(codes: np.ndarray, residuals: np.ndarray, centroids: np.ndarray, policy: str,
                       seed: int, num_fixed: int = 0) -> np.ndarray:
    """Give all but one item of each shared SID another last code; (N, L), (N, D), (K, D) -> (N, L).

    The item nearest to its centroid keeps the SID. The others get the free code nearest to their residual,
    or any ("random": TS-Rec, footnote 1). "sinkhorn" first spreads a prefix's items that share a SID.
    The first `num_fixed` rows never move.
    """
    codes = codes.copy()
    rng = np.random.default_rng(seed)
    rows_of_prefix = defaultdict(list)
    for row, code in enumerate(codes.tolist()):
        rows_of_prefix[tuple(code[:-1])].append(row)
    for prefix, rows in sorted(rows_of_prefix.items()):
        rows = np.array(rows)
        for _ in range(SINKHORN_ROUNDS if policy == "sinkhorn" else 0):
            shared = np.bincount(codes[rows, -1])[codes[rows, -1]] > 1
            movers = rows[shared & (rows >= num_fixed)]
            if len(movers) > 1:
                codes[movers, -1] = transport_plan(residuals[movers], centroids).argmax(1)
        distance = ((residuals[rows] - centroids[codes[rows, -1]]) ** 2).sum(1)
        rows = rows[np.lexsort((distance, rows >= num_fixed))]  # fixed rows first, then the nearest
        taken, keepers = np.unique(codes[rows, -1], return_index=True)  # a code's first row keeps it
        movers = [row for row in np.delete(rows, keepers) if row >= num_fixed]
        free = np.setdiff1d(np.arange(len(centroids)), taken)
        if len(free) < len(movers):
            name = "".join(map(sid_token, range(len(prefix)), prefix))
            stop(f"prefix {name} has {len(rows)} items but only {len(centroids)} last codes; "
                 "make a new run with a larger --codebook-size or more --num-levels")
        for row in movers:
            pick = ((residuals[row] - centroids[free]) ** 2).sum(1).argmin()
            if policy == "random":
                pick = rng.integers(len(free))
            codes[row, -1] = free[pick]
            free = np.delete(free, pick)
    return codes

def count_collisions(codes: np.ndarray) -> int:
    """How many items have the SID of an earlier item."""
    return len(codes) - len(np.unique(codes, axis=0))

def assign_sids(items: list[dict], x: Tensor, codebooks: Tensor, policy: str, seed: int,
                old_items: list[dict] | tuple = ()) -> None:
    """Set each item's "sid" from its vector; (N, D), (L, K, D). The SIDs of `old_items` stay."""
    codes, residuals = (part.cpu().numpy() for part in quantize(x, codebooks))
    if old_items:
        codes = np.concatenate([codes_of(old_items), codes])
        residuals = np.pad(residuals, ((len(old_items), 0), (0, 0)))
    unique = resolve_collisions(codes, residuals, codebooks[-1].cpu().numpy(), policy, seed, len(old_items))
    print(f"collisions {count_collisions(codes)} of {len(codes)} items before, "
          f"{count_collisions(unique)} after (--collision {policy})")
    for item, row in zip(items, unique[len(old_items):].tolist()):
        item["sid"] = [sid_token(level, code) for level, code in enumerate(row)]

# ---- Samples -----------------------------------
def split_samples(users: list[dict], split: str) -> dict[str, list[dict]]:
    """Make one sample per interaction but a user's first; its history is all that came before.

    leave-one-out: a user's last target is for test, the one before for validation, the others train.
    chronological: all samples by the time of their target, cut 8:1:1, as MiniOneRec does.
    """
    samples = [[{"user_id": user["user_id"], "history": user["items"][:place], "target": target}
                for place, target in enumerate(user["items"]) if place > 0] for user in users]
    if split == "leave-one-out":
        slices = {"train": slice(-2), "valid": slice(-2, -1), "test": slice(-1, None)}
        return {name: [sample for own in samples for sample in own[part]] for name, part in slices.items()}
    timed = [pair for user, own in zip(users, samples) for pair in zip(user["timestamps"][1:], own)]
    ordered = [sample for _, sample in sorted(timed, key=lambda pair: pair[0])]
    a, b = len(ordered) * 8 // 10, len(ordered) * 9 // 10
    return {"train": ordered[:a], "valid": ordered[a:b], "test": ordered[b:]}

def load_samples(folder: Path, split: str, known: set, max_history: int) -> dict[str, list[dict]]:
    """Read or make the samples of each split, and keep the end of each history."""
    if split == "official":
        parts = {name: read_samples(folder / f"{name}.jsonl", known) for name in ("train", "valid", "test")}
    else:
        path = folder / "interactions.jsonl"
        users = read_jsonl(path, {"user_id": ID, "items": list}, unique="user_id", known=known)
        for user in users if split == "chronological" else ():
            times = user.get("timestamps")
            numbers = isinstance(times, list) and all(isinstance(time, (int, float)) for time in times)
            if not numbers or len(times) != len(user["items"]) or times != sorted(times):
                stop(f"{path}: user {user['user_id']!r} needs ascending timestamps, one for each item")
        parts = split_samples(users, split)
    for name, samples in parts.items():
        if not samples:
            stop(f"{folder}: the {name} split is empty; give more interactions per user")
        for sample in samples:
            sample["history"] = sample["history"][-max_history:]
    return parts

# ---- Files and helpers that all stages share ----
def stop(message: str):
    """End with one line on stderr and exit code 2, for the user's mistakes."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

def read_jsonl(path: str | Path, fields: dict, unique: str = "", known: set | None = None) -> list[dict]:
    """Read a JSONL file of objects; stops at the first bad line and names it.

    fields: required name -> type(s). unique: a field that may not repeat. known: item_ids to choose from.
    """
    rows, seen, nth = [], set(), 0
    try:
        with open(path, "rb") as file:
            for nth, line in enumerate(file, 1):
                if not (text := line.decode("utf-8-sig").strip()):
                    continue
                row = json.loads(text)
                problem = field_problem(row, fields, known)
                if not problem and unique and row[unique] in seen:
                    problem = f"{unique} {row[unique]!r} is there twice; keep one"
                if problem:
                    stop(f"{path}, line {nth}: {problem}")
                seen.add(row[unique] if unique else None)
                rows.append(row)
    except OSError as error:
        stop(f"{path}: cannot be read ({error.strerror}); check the name, or run the stage that writes it")
    except (ValueError, RecursionError) as error:  # broken JSON, or not UTF-8
        stop(f"{path}, line {max(1, nth)}: not valid JSON in UTF-8 ({error}); correct that line")
    if not rows and fields:
        stop(f"{path}: is empty; it needs at least one object with {', '.join(fields)}")
    return rows

def field_problem(row: object, fields: dict, known: set | None) -> str | None:
    """Say which field is missing, of the wrong type, or names an unknown item."""
    for name, types in fields.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), types):
            return f"{name!r} is missing or of the wrong type; a line has {', '.join(fields)}"
        if known is not None and name in ("item_id", "items", "history", "target"):
            for item_id in row[name] if isinstance(row[name], list) else [row[name]]:
                if not isinstance(item_id, ID) or item_id not in known:
                    return f"item {item_id!r} is not in the catalogue (5 is not '5'); add it, or drop it"
            if row[name] == []:
                return f"{name!r} is empty; it needs at least one item"
    return None

def read_items(path: str | Path) -> list[dict]:
    """Read a catalogue; missing optional fields become ""."""
    items = read_jsonl(path, {"item_id": ID, "title": str}, unique="item_id")
    for item in items:
        for name in ("description", "brand", "categories"):
            if isinstance(item.get(name), (list, dict)):
                stop(f"{path}: item {item['item_id']!r}: {name!r} must be a string")
            item[name] = str(item.get(name) or "")
        if not item_text(item):
            stop(f"{path}: item {item['item_id']!r} has neither title nor description; leave it out")
    return items

def check_sids(path: str | Path, items: list[dict]) -> list[dict]:
    """The items; stops unless each "sid" has one token per level, and as many as the others."""
    for item in items:
        sid = item["sid"] if isinstance(item.get("sid"), list) else []
        levels = [match[1] for token in sid if (match := SID_TOKEN.fullmatch(str(token)))]
        if len(sid) < 2 or levels != list(LEVELS[:len(sid)]) or len(sid) != len(items[0]["sid"]):
            stop(f"{path}: item {item['item_id']!r} has no valid SID, but {sid!r}")
    return items

def read_catalogue(path: str | Path) -> list[dict]:
    """Read a run's items.jsonl: items with their "sid"."""
    return check_sids(path, read_items(path))

def read_samples(path: str | Path, known: set) -> list[dict]:
    """Read train/valid/test.jsonl: {"user_id", "history": [item_id, ...], "target": item_id}."""
    return read_jsonl(path, {"user_id": ID, "history": list, "target": ID}, known=known)

@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Give a temporary path, renamed to `path` if all went well."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        stop(f"{path}: cannot be written ({error})")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write one object per line, atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

def load_pt(path: str | Path, keys: tuple[str, ...]) -> dict:
    """Load a .pt file of this project, a dict with at least `keys`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        stop(f"{path}: cannot be loaded (missing, or not a .pt file); run the stage that writes it")
    if not isinstance(content, dict) or not all(key in content for key in keys):
        stop(f"{path}: not a file of this project with {', '.join(keys)}; run the stage that writes it")
    return content

def sid_token(level: int, code: int) -> str:
    """Spell a code: (0, 12) -> "<a_12>"."""
    return f"<{LEVELS[level]}_{code}>"

def parse_sid_token(token: str) -> tuple[int, int]:
    """Read a SID token: "<a_12>" -> (0, 12)."""
    return LEVELS.index(token[1]), int(token[3:-1])

def codes_of(items: list[dict]) -> np.ndarray:
    """The code matrix of a catalogue, (N, L)."""
    return np.array([[parse_sid_token(token)[1] for token in item["sid"]] for item in items])

def load_pretrained(auto_class, name: str, **options):
    """Load a Hugging Face model; -> model in eval mode, tokenizer."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = auto_class.from_pretrained(name, **options)
    except Exception as error:  # of several libraries
        stop(f"{name}: cannot be loaded as a Hugging Face model ({' '.join(str(error).split())[:300]})")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.eval(), tokenizer

def explain(kind, error, trace) -> None:
    """The hook for uncaught errors: one line for Ctrl-C, `| head`, and a full GPU."""
    full = "the GPU's memory is full; lower --micro-tokens or --batch-tokens"
    if kind in (KeyboardInterrupt, BrokenPipeError, torch.OutOfMemoryError):
        sys.stdout = None  # a closed pipe cannot be flushed
        stop(full if kind is torch.OutOfMemoryError else "interrupted")
    sys.__excepthook__(kind, error, trace)

def set_up(device_name: str, seed: int = 0) -> torch.device:
    """Seed torch and choose the device."""
    sys.excepthook = explain
    torch.manual_seed(seed)
    try:
        device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device, dtype=torch.double)
    except (RuntimeError, AssertionError, TypeError) as error:
        stop(f"--device {device_name}: not available here ({str(error).splitlines()[0]})")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # or it takes gigabytes
    return device

# ---- Command line ------------------------------
def number(kind: type, low: float, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number with low <= number < below."""
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) < below:
                return kind(text)
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is no {name} x with {low} <= x < {below}")
    return read

SHARED_FLAGS = {
    "run": dict(default="runs/demo", help="folder of the run, for inputs and outputs"),
    "seed": dict(type=number(int, 0, 2 ** 31), default=42, help="random seed"),
    "device": dict(default="", help="cpu, cuda or cuda:1; empty: cuda if there is one"),
}

def make_parser(docstring: str, *shared: str) -> argparse.ArgumentParser:
    """An argument parser with the named flags of SHARED_FLAGS; help shows every default."""
    parser = argparse.ArgumentParser(description=docstring.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name in shared:
        parser.add_argument(f"--{name}", **SHARED_FLAGS[name])
    return parser

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed", "device")
    flag = parser.add_argument
    flag("--data", default=str(DEMO), help="folder with items.jsonl and interactions.jsonl or a split")
    flag("--sids", help="SIDs to take, {item_id, sid} lines")
    flag("--add", metavar="FILE", help="add these items, by RUN/codebook.pt; not after --sids")
    flag("--encoder", default="lsa", help="lsa, or a Hugging Face model by name or folder")
    flag("--pooling", choices=("mean", "last"), default="mean", help="Qwen3-Embedding needs last")
    flag("--dim", type=number(int, 0), default=0, help="width after PCA; 0: no PCA; paper: 32")
    flag("--num-levels", type=number(int, 2, len(LEVELS) + 1), default=3, help="L, codes per item")
    flag("--codebook-size", type=number(int, 0), default=0, help="K; 0: up to 256")
    flag("--quantizer", choices=("kmeans", "rqvae"), default="kmeans", help="STAR: rqvae")
    flag("--collision", choices=("nearest", "random", "sinkhorn"), default="nearest", help="which free code")
    flag("--split", choices=("official", "leave-one-out", "chronological"), help="None: what DATA has")
    flag("--max-history", type=number(int, 1), default=10, help="items of a history; STAR: 20")
    return parser.parse_args(argv)

def add_items(run: Path, path: str, policy: str, seed: int, device: torch.device) -> None:
    """Append a file's items to the run, with SIDs from the run's codebook."""
    old_items, new_items = read_catalogue(run / "items.jsonl"), read_items(path)
    twice = {item["item_id"] for item in old_items} & {item["item_id"] for item in new_items}
    if twice:
        stop(f"{path}: item_id {twice.pop()!r} is in {run}/items.jsonl already; leave it out")
    codebook = load_pt(run / "codebook.pt", ("centroids", "encoder"))
    x = encode([item_text(item) for item in new_items], codebook["encoder"], device)
    assign_sids(new_items, x, codebook["centroids"], policy, seed, old_items)
    write_jsonl(run / "items.jsonl", old_items + new_items)
    print(f"wrote {run}/items.jsonl: {len(old_items)} old items, {len(new_items)} new")

def main() -> None:
    args = parse_args()
    device, run, data = set_up(args.device, args.seed), Path(args.run), Path(args.data)
    if args.add:
        return add_items(run, args.add, args.collision, args.seed, device)
    if run.resolve() == data.resolve():
        stop(f"--run and --data are both {run}; name another folder for the run")
    items = read_items(data / "items.jsonl")
    split = args.split or ("official" if (data / "train.jsonl").exists() else "leave-one-out")
    samples = load_samples(data, split, {item["item_id"] for item in items}, args.max_history)
    print(f"device {device} | {len(items)} items | split {split}: "
          + ", ".join(f"{len(rows)} {name}" for name, rows in samples.items()))
    if args.sids:
        rows = read_jsonl(args.sids, {"item_id": ID, "sid": list}, unique="item_id")
        sid_of = {row["item_id"]: row["sid"] for row in rows}
        for item in items:
            item["sid"] = sid_of.get(item["item_id"])
        check_sids(args.sids, items)
        (run / "codebook.pt").unlink(missing_ok=True)  # of an older run
        print(f"SIDs from {args.sids}: {count_collisions(codes_of(items))} collisions, kept")
    else:
        texts, n = [item_text(item) for item in items], len(items)
        encoder = fit_lsa(texts) if args.encoder == "lsa" else {"name": args.encoder, "pooling": args.pooling}
        x = encode(texts, encoder, device).to(device)
        if args.dim:
            encoder |= fit_pca(x, args.dim)
            x = (x - encoder["pca_mean"]) @ encoder["pca_axes"]
        # Default: N / 12, but at least min(32, N / 4); from 8 (or N) to 256, rounded down to a power of 2
        k = args.codebook_size or 2 ** int(math.log2(min(n, max(8, min(32, n // 4), min(256, n // 12)))))
        print(f"encoder {args.encoder} | vectors {tuple(x.shape)} | codebooks {args.num_levels} x {k}")
        if args.quantizer == "rqvae":
            codebooks, encoder["rqvae"] = fit_rqvae(x, args.num_levels, k, args.seed)
            x = mlp(x, encoder["rqvae"])
        else:
            codebooks = fit_codebooks(x, args.num_levels, k, args.seed)
            print_levels(x, x, codebooks, lambda z: z)
        assign_sids(items, x, codebooks, args.collision, args.seed)
        with atomic_write(run / "codebook.pt") as temporary:
            torch.save({"centroids": codebooks.cpu(), "encoder": encoder, "args": vars(args)}, temporary)
    for name, rows in {**samples, "items": items}.items():
        write_jsonl(run / f"{name}.jsonl", rows)
    print(f"example | {items[0]['item_id']!r} {''.join(items[0]['sid'])} {items[0]['title']!r}")
    print(f"wrote {run}: items, train, valid, test.jsonl" + ("" if args.sids else ", codebook.pt"))

if __name__ == "__main__":
    main()
