"""Stage 6: rank the whole catalogue by trie-constrained beam search and report HR@K and NDCG@K.

The search reads each prompt once. Beams are query positions of one sequence: a 4-D mask lets each beam token see
its user's prompt and its own ancestors, so the prompt's KV cache is never copied and nothing is re-ordered.
Logits are taken against the K rows of the level only. TS-Rec (arXiv 2602.22632), section 5.1.2: full ranking,
20 beams, K = 3, 5, 10. With one relevant item HR@K = Recall@K and NDCG@K = 1 / log2(rank + 1) for rank <= K.

Reads   RUN/sft.pt (or --checkpoint), RUN/items.jsonl, RUN/test.jsonl (or valid), RUN/train.jsonl (yardsticks),
        RUN/semantics.jsonl (meanings of tokens, where it exists)
Writes  RUN/metrics.jsonl (appended), RUN/predictions.jsonl

Differs from the papers
  1. A hit is the target item. Where SIDs collide, the items of one SID follow each other in catalogue order; the
     SID-level figure, which the papers report, is printed beside.
  2. Yardsticks counted on train.jsonl stand in the same table: popularity, and last-item bigram.
  3. The policy is normalised over the trie's children at each level (`--normalize trie`), a proper distribution
     over items; `level` is the softmax over all K codes of the level.

Examples
  python evaluate.py                                               # the demo's test users
  python evaluate.py --show 3                                      # and three of them in words
  python evaluate.py --history 12,55,89                            # ten recommendations for that history
"""
import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from init_embeddings import autocast, load_model, sid_token_ids
from tokenize_items import codes_of, pick_device, read_catalogue, read_jsonl, read_samples, stop, write_jsonl
from train import prompt_ids, task_pairs

# Letters used in shapes: B users, T prompt tokens, W beams, L levels, K codes per level, M most children of a
# node, N items, D width.
CUTOFFS = (1, 3, 5, 10, 20, 50)


# ---------------------------------------------------------------------------------------------------------
# The trie as flat tensors
# ---------------------------------------------------------------------------------------------------------

class Trie(NamedTuple):
    """All SIDs as a prefix tree; node n of depth l has children first_child[l][n] ... first_child[l][n + 1] - 1,
    numbered at depth l + 1, whose codes are codes[l][child]. Depth L nodes are leaves, one per distinct SID."""
    first_child: list[torch.Tensor]     # per level: (nodes at depth l + 1 boundary,)
    codes: list[torch.Tensor]           # per level: (nodes at depth l + 1,)
    max_children: list[int]             # per level: M
    leaf_start: np.ndarray              # (leaves + 1,) into leaf_items
    leaf_items: np.ndarray              # (N,) rows of the catalogue, ascending within a leaf


def build_trie(codes: torch.Tensor, codebook_size: int, device: torch.device) -> Trie:
    """Build the trie of a code matrix, (N, L) -> Trie, in O(N log N) time and O(N) memory."""
    num_levels = codes.shape[1]
    if codebook_size ** num_levels > 2 ** 62:
        stop(f"{num_levels} levels of {codebook_size} codes do not fit one 64-bit key; use fewer")
    key = torch.zeros(len(codes), dtype=torch.long)
    for level in range(num_levels):
        key = key * codebook_size + codes[:, level]
    leaves, item_leaf = torch.unique(key, return_inverse=True)          # sorted
    first_child, level_codes, max_children, nodes = [], [], [], leaves
    for _ in range(num_levels):                                         # from the leaves up
        parents, counts = torch.unique_consecutive(nodes // codebook_size, return_counts=True)
        level_codes.insert(0, (nodes % codebook_size).to(device))
        first_child.insert(0, F.pad(counts.cumsum(0), (1, 0)).to(device))
        max_children.insert(0, int(counts.max()))
        nodes = parents
    order = torch.argsort(item_leaf, stable=True)
    start = F.pad(torch.bincount(item_leaf, minlength=len(leaves)).cumsum(0), (1, 0))
    return Trie(first_child, level_codes, max_children, start.numpy(), order.numpy())


# ---------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------

def expand(trie: Trie, level: int, nodes: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor,
           normalize: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Score all children of all beams; nodes, scores (B, W), logits (B, W, K) -> children, scores (B, W, M)."""
    start = trie.first_child[level][nodes]
    slot = torch.arange(trie.max_children[level], device=nodes.device)
    live = slot < (trie.first_child[level][nodes + 1] - start)[..., None]
    children = torch.where(live, start[..., None] + slot, 0)
    if normalize == "level":
        logits = logits.log_softmax(-1)
    gain = logits.gather(-1, trie.codes[level][children]).masked_fill(~live, -torch.inf)
    if normalize == "trie":
        gain = gain.log_softmax(-1)
    return children, scores[..., None] + gain


def tree_mask(lengths: torch.Tensor, width: int, ancestors: list[torch.Tensor], slots: list[int]) -> torch.Tensor:
    """Who sees whom: each beam its user's prompt and its own ancestors (itself included).

    lengths (B,), prompt width T, ancestors: per depth the slot (B, W) of each beam's ancestor among that depth's
    `slots` beams -> (B, 1, W, T + sum(slots)), True where the key may be read.
    """
    batch, beams = ancestors[0].shape
    prompt = torch.arange(width, device=lengths.device) < lengths[:, None]
    parts = [prompt[:, None].expand(batch, beams, width)]
    parts += [F.one_hot(a, n).bool() for a, n in zip(ancestors, slots)]
    return torch.cat(parts, -1)[:, None]


@torch.no_grad()
def beam_search(model, trie: Trie, sid_ids: torch.Tensor, prompts: list[list[int]], num_beams: int,
                normalize: str = "trie") -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_beams` best SIDs of each prompt under the trie, best first; -> leaves (B, W), scores (B, W).

    L forward passes: the prompts, then one per further level with a token per beam. A catalogue (or a part of
    it) with fewer SIDs than beams leaves scores of -inf at the end of a row: those are not results.
    """
    device = trie.codes[0].device
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, :len(p)] = torch.tensor(p)
    ids, lengths = ids.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
    head = model.get_output_embeddings().weight

    with autocast(device):
        out = model.base_model(input_ids=ids, use_cache=True)
    hidden = out.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1][:, None]  # (B, 1, D)
    nodes = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
    scores = torch.zeros(len(prompts), 1, device=device)
    ancestors, slots = [], []
    for level in range(len(trie.codes)):
        logits = hidden.float() @ head[sid_ids[level]].float().T                     # (B, W, K)
        children, total = expand(trie, level, nodes, scores, logits, normalize)
        beams = min(num_beams, total[0].numel())
        scores, best = total.flatten(1).topk(beams)
        nodes = children.flatten(1).gather(1, best)                                  # (B, W)
        if level + 1 == len(trie.codes):
            return nodes, scores
        parent = best // trie.max_children[level]
        ancestors = [a.gather(1, parent) for a in ancestors] + [torch.arange(beams, device=device).expand_as(nodes)]
        slots.append(beams)
        with autocast(device):
            out = model.base_model(
                input_ids=sid_ids[level][trie.codes[level][nodes]], past_key_values=out.past_key_values,
                attention_mask=tree_mask(lengths, width, ancestors, slots),
                position_ids=(lengths[:, None] + level).expand_as(nodes), use_cache=True)
        hidden = out.last_hidden_state                                               # (B, W, D)


def length_batches(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Rows of prompts of similar length, at most `max_tokens` tokens each, padding included."""
    batches: list[list[int]] = [[]]
    for row in sorted(range(len(prompts)), key=lambda r: len(prompts[r])):
        if batches[-1] and len(prompts[row]) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def search_all(model, trie: Trie, sid_ids: torch.Tensor, prompts: list[list[int]], num_beams: int, normalize: str,
               batch_tokens: int) -> list[list[tuple[int, float]]]:
    """Beam search for every prompt; per prompt its (leaf, score) pairs, best first."""
    results: list = [None] * len(prompts)
    model.eval()
    with tqdm(total=len(prompts), desc="search", unit="user", disable=None) as bar:
        for rows in length_batches(prompts, batch_tokens):
            leaves, scores = beam_search(model, trie, sid_ids, [prompts[r] for r in rows], num_beams, normalize)
            for row, leaf, score in zip(rows, leaves.tolist(), scores.tolist()):
                results[row] = [(n, s) for n, s in zip(leaf, score) if s > -math.inf]
            bar.update(len(rows))
    return results


# ---------------------------------------------------------------------------------------------------------
# Metrics and yardsticks
# ---------------------------------------------------------------------------------------------------------

def rank_metrics(ranks: list[int | None], cutoffs: tuple[int, ...]) -> dict[str, float]:
    """HR@K and NDCG@K from each target's rank (1 is best, None is not found), averaged over users."""
    metrics = {f"HR@{k}": sum(r is not None and r <= k for r in ranks) / len(ranks) for k in cutoffs}
    for k in cutoffs:
        gains = (1 / math.log2(r + 1) for r in ranks if r is not None and r <= k)
        metrics[f"NDCG@{k}"] = sum(gains) / len(ranks)
    return metrics


def rank_of(target, ranked: list) -> int | None:
    """1-based position of the target in a ranked list, None where it is missing."""
    return ranked.index(target) + 1 if target in ranked else None


def popularity_ranking(train: list[dict], items: list[dict]) -> list:
    """All item_ids by their number of occurrences as a target in train.jsonl."""
    counts = Counter(s["target"] for s in train)
    return sorted((i["item_id"] for i in items), key=lambda i: -counts[i])


def bigram_rankings(train: list[dict], samples: list[dict], popular: list, depth: int) -> list[list]:
    """Targets seen after the history's last item in train.jsonl, most frequent first, then popular items."""
    after: dict = {}
    for s in train:
        after.setdefault(s["history"][-1], Counter())[s["target"]] += 1
    place = {item: p for p, item in enumerate(popular)}
    rankings = []
    for s in samples:
        counts = {i: n for i, n in after.get(s["history"][-1], {}).items() if i in place}
        seen = sorted(counts, key=lambda i: (-counts[i], place[i]))
        rankings.append((seen + [i for i in popular[:depth + len(seen)] if i not in counts])[:depth])
    return rankings


# ---------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------

def print_table(rows: list[dict], cutoffs: tuple[int, ...]) -> None:
    """One line per method: HR and NDCG at the cut-offs."""
    head = [f"{name}@{k}" for name in ("HR", "NDCG") for k in cutoffs]
    print(f"{'method':<24}{'level':<6}" + "".join(f"{h:>9}" for h in head))
    for row in rows:
        print(f"{row['method']:<24}{row['level']:<6}" + "".join(f"{row[h]:>9.4f}" for h in head))


def describe(item: dict, meaning: dict[str, list[str]]) -> str:
    """An item in words: title, then each SID token with its first keywords."""
    tokens = " | ".join(f"{t} {', '.join(meaning.get(t, [])[:3])}".strip() for t in item["sid"])
    return f"{item['item_id']!r} {item['title'][:80]}\n          {tokens}"


def show_user(sample: dict, ranked: list, scores: list[float], items: dict, meaning: dict, top: int = 10) -> None:
    """Print a history, the recommendations with their tokens' meanings and where the target ranked."""
    print("history:")
    for i in sample["history"]:
        print(f"     -    {i!r} {items[i]['title'][:80]}")
    print("recommendations (rank, log-probability):")
    for rank, (i, score) in enumerate(zip(ranked[:top], scores), 1):
        mark = "  <-- target" if i == sample.get("target") else ""
        print(f"  {rank:>2} {score:>6.2f} {describe(items[i], meaning)}{mark}")
    if "target" in sample:
        rank = rank_of(sample["target"], ranked)
        print(f"target: {'rank ' + str(rank) if rank else 'not found'}, {describe(items[sample['target']], meaning)}\n")


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/demo", help="folder of the run")
    files.add_argument("--checkpoint", help="instead of RUN/sft.pt")
    files.add_argument("--split", choices=("test", "valid"), default="test", help="which samples to rank")
    files.add_argument("--metrics", help="instead of RUN/metrics.jsonl")
    files.add_argument("--predictions", help="instead of RUN/predictions.jsonl")
    search = parser.add_argument_group("search")
    search.add_argument("--num-beams", type=int, default=20, help="W, SIDs kept per level and returned")
    search.add_argument("--normalize", choices=("trie", "level"), default="trie",
                        help="what a level's probabilities sum to one over: a node's children, or all K codes")
    search.add_argument("--candidates", help="recommend only the item_ids in this file ({item_id} lines)")
    search.add_argument("--batch-tokens", type=int, default=16384, help="prompt tokens per batch, padding included")
    search.add_argument("--limit", type=int, default=0, help="only the first so many samples; 0 for all")
    show = parser.add_argument_group("in words")
    show.add_argument("--show", type=int, default=0, help="print so many users' recommendations")
    show.add_argument("--history", help="comma-separated item_ids: print ten recommendations and stop")
    parser.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda where there is one")
    args = parser.parse_args(argv)
    if args.num_beams < 1 or args.batch_tokens < 1 or args.limit < 0:
        parser.error("--num-beams and --batch-tokens must be at least 1, --limit at least 0")
    return args


def pick_candidates(path: str | None, items: list[dict]) -> list[dict]:
    """The items that may be recommended: all, or those that `--candidates FILE` names."""
    if not path:
        return items
    wanted = [row["item_id"] for row in read_jsonl(path, ("item_id",))]
    known = {item["item_id"] for item in items}
    for i in wanted:
        if not isinstance(i, (int, str)) or i not in known:
            stop(f"{path}: item {i!r} is not in the catalogue; leave it out")
    wanted = set(wanted)
    return [item for item in items if item["item_id"] in wanted]


def read_history(text: str, items: list[dict]) -> dict:
    """Turn "12,55,89" into a sample without a target."""
    by_name = {str(item["item_id"]): item["item_id"] for item in items}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in by_name:
            stop(f"--history: item {name!r} is not in the catalogue")
    return {"user_id": "you", "history": [by_name[name] for name in names]}


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    by_id = {item["item_id"]: item for item in items}
    candidates = pick_candidates(args.candidates, items)
    if args.history:
        samples = [read_history(args.history, items)]
    else:
        samples = read_samples(run / f"{args.split}.jsonl", set(by_id))[:args.limit or None]
        train = read_samples(run / "train.jsonl", set(by_id))
    path = Path(args.checkpoint or run / "sft.pt")
    model, tokenizer, checkpoint = load_model(path, device, items)
    sid = checkpoint["sid"]
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(device)
    trie = build_trie(torch.from_numpy(codes_of(candidates)), sid["codebook_size"], device)
    semantics = run / "semantics.jsonl"
    meaning = {r["token"]: r["keywords"] for r in read_jsonl(semantics, ("token", "keywords"))} \
        if semantics.exists() else {}

    pairs = task_pairs("next", {"items": items, "samples": [{"target": s["history"][0], **s} for s in samples]})
    prompts = prompt_ids(tokenizer, [p for p, _ in pairs])
    longest, limit = max(map(len, prompts)) + sid["num_levels"] - 1, getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        stop(f"the longest prompt and its SID have {longest} tokens, the backbone reads {limit}; shorten the history")
    start = time.time()
    found = search_all(model, trie, sid_ids, prompts, args.num_beams, args.normalize, args.batch_tokens)
    seconds = time.time() - start
    ranked, ranked_sids, scores = [], [], []
    for pairs_ in found:
        rows = [(int(r), s) for leaf, s in pairs_ for r in trie.leaf_items[trie.leaf_start[leaf]:trie.leaf_start[leaf + 1]]]
        ranked.append([candidates[r]["item_id"] for r, _ in rows])
        scores.append([s for _, s in rows])
        ranked_sids.append([tuple(candidates[trie.leaf_items[trie.leaf_start[leaf]]]["sid"]) for leaf, _ in pairs_])
    if args.history:
        return show_user(samples[0], ranked[0], scores[0], by_id, meaning)

    cutoffs = tuple(k for k in CUTOFFS if k <= args.num_beams)
    base = {"task": "next", "split": args.split, "n": len(samples), "num_beams": args.num_beams}
    targets = [s["target"] for s in samples]
    popular = popularity_ranking(train, candidates)
    bigram = bigram_rankings(train, samples, popular, args.num_beams)
    lists = [("popularity", "item", targets, [popular[:args.num_beams]] * len(samples), 0.0),
             ("bigram", "item", targets, bigram, 0.0), (path.name, "item", targets, ranked, seconds)]
    if len(trie.leaf_start) - 1 < len(candidates):
        lists.append((path.name, "sid", [tuple(by_id[t]["sid"]) for t in targets], ranked_sids, seconds))
    rows = []
    for method, level, wanted, lists_, took in lists:
        ranks = [rank_of(t, r) for t, r in zip(wanted, lists_)]
        rows.append({"method": method, **base, "level": level, **rank_metrics(ranks, cutoffs), "seconds": round(took, 2)})
    for sample, r, s in list(zip(samples, ranked, scores))[:args.show]:
        show_user(sample, r, s, by_id, meaning)
    print(f"{len(samples)} {args.split} users | {len(candidates)} items | {args.num_beams} beams | device {device} | "
          f"{seconds:.1f} s, {len(samples) / seconds:.0f} users/s")
    print_table(rows, tuple(k for k in cutoffs if k in (1, 3, 5, 10)))

    predictions = Path(args.predictions or run / "predictions.jsonl")
    write_jsonl(predictions, [{"user_id": s["user_id"], "target": s["target"], "items": r, "scores": sc}
                              for s, r, sc in zip(samples, ranked, scores)])
    metrics = Path(args.metrics or run / "metrics.jsonl")
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with open(metrics, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {metrics}, {predictions}")


if __name__ == "__main__":
    main()
