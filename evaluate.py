"""Stage 6: rank the whole catalogue by trie-constrained beam search, and report HR@K and NDCG@K.

The search reads each prompt once. Beams are query positions of one sequence: a 4-D mask lets each beam
token see its user's prompt and its own ancestors. The prompt's keys and values are never copied per beam,
and nothing is re-ordered when beams change parents.
TS-Rec (arXiv 2602.22632), 5.1.2: full ranking, 20 beams. `--task` asks another task of train.py: search
(STAR, 3.2), or title2sid (TS-Rec, 5.5).

A memory stands beside the model, as in kNN-LM (arXiv 1911.00172), with counts of item pairs:

    p(item | history) = (1 - lambda m) p_LM(item | history) + lambda p_memory(item | history)

p_memory sums to m: near 1 if the history's items have many counts, 0 if they have none. A prefix has the
sum of its items, so beams are compared by all that is below them.

Reads   RUN/sft.pt (or --checkpoint), items.jsonl, test.jsonl (or valid), train.jsonl (what is counted),
        queries.jsonl (for search), semantics.jsonl (meanings of tokens, if it exists)
Writes  RUN/metrics.jsonl (appended), predictions.jsonl

Differs from the papers
  1. A hit is the target item. MiniOneRec's code counts the SID: level "sid", if SIDs collide.
  2. The memory; --memory 0 is the papers' system. Counts alone are in the table.
  3. Probabilities are normalised over the trie's children at each level.
  4. Items added later, and never a target yet, count as the average of their siblings.

Examples
  python evaluate.py --show 3  # three test users in words
"""
import argparse
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig

from extract_semantics import read_queries, read_semantics
from init_embeddings import (
    Trie, autocast, build_trie, check_lengths, expand, leaf_of_items, length_batches, load_model, new_items,
    read_in_bf16, sid_token_ids)
from tokenize_items import (
    ID, codes_of, make_parser, number, read_catalogue, read_jsonl, read_samples, set_up, stop,
    write_jsonl)
from train import TASKS, history_fields, make_pairs, prompt_ids

# Shapes: B users, T prompt tokens, W beams, L levels, K codes, M most children, N items.
CUTOFFS = (1, 3, 5, 10, 20, 50, 100)
MEMORY_STEPS, MEMORY_DECAY, MEMORY_REVERSE, MEMORY_PRIOR = 10, 0.5, 0.5, 10
KINDS = ("in the history", "followed the last item in train", "paired in train with the history",
         "seen in train", "never seen")
EXPORTED = """# A recommender that generates semantic IDs (SIDs)

A prompt is plain text, without a chat template: {prompt!r}
The answer is {levels} tokens, the SID of the next item; sids.jsonl says which item that is. Give the
engine the SIDs as its list of choices, or the answer may be no SID. The memory is not in this folder.
"""
SID_TASKS = [name for name, task in TASKS.items() if task.response == "{sid}"]

# ---- The memory: counts of item pairs ----------
def count_pairs(samples: list[dict]) -> dict:
    """Skip-gram counts as shares n / (total + 10): item_id -> {item_id: share}.

    Each of the last ten items of a sample's history is a pair with the target. It counts 0.5 ** (items
    between them), the reverse pair half as much. Pairs within the history are those of earlier samples.
    """
    counts: defaultdict = defaultdict(Counter)
    for sample in samples:
        for steps, item_id in enumerate(sample["history"][:-MEMORY_STEPS - 1:-1]):
            counts[item_id][sample["target"]] += MEMORY_DECAY ** steps
            counts[sample["target"]][item_id] += MEMORY_REVERSE * MEMORY_DECAY ** steps
    for item_id, row in counts.items():
        total = row.total() + MEMORY_PRIOR
        counts[item_id] = {other: n / total for other, n in row.items()}
    return dict(counts)

def recall(history: list, pairs: dict) -> dict:
    """p_memory(item | history), most likely first; sums to at most 1.

    It is the mean of the shares of the history's items, with weights 0.5 ** (steps from the end).
    """
    found: Counter = Counter()
    weights = [MEMORY_DECAY ** steps for steps in range(len(history))]
    for weight, item_id in zip(weights, reversed(history)):
        for other, share in pairs.get(item_id, {}).items():
            found[other] += weight / sum(weights) * share
    return dict(found.most_common())

class Memory(NamedTuple):
    """What the memory says to each prompt, sparse: S leaves at most, ascending."""
    leaves: Tensor  # (B, S), padded with a number beyond all leaves
    before: Tensor  # (B, S + 1), lambda * mass of the leaves before each one
    share: Tensor   # (B, 1, 1), lambda * mass of all

def make_memory(recalled: list[dict], leaf_of: dict, weight: float, device: torch.device) -> Memory:
    """Sort what was recalled for each prompt, {item_id: mass}, by leaf; weight: lambda."""
    rows = [sorted((leaf_of[item_id], mass) for item_id, mass in found.items()) for found in recalled]
    leaves = [torch.tensor([leaf for leaf, _ in row], dtype=torch.long) for row in rows]
    masses = [torch.tensor([weight * mass for _, mass in row], dtype=torch.double) for row in rows]
    before = F.pad(pad_sequence(masses, batch_first=True).cumsum(1), (1, 0)).to(device)
    leaves = pad_sequence(leaves, batch_first=True, padding_value=2 ** 62).to(device)
    return Memory(leaves, before, before[:, -1:, None].float())

def remembered(trie: Trie, depth: int, nodes: Tensor, memory: Memory) -> Tensor:
    """lambda * the memory's mass below each node of that depth; nodes (B, W, M) -> (B, W, M)."""
    first, end = nodes, nodes + 1  # the leaves below a node are a range
    for first_child in trie.first_child[depth:]:
        first, end = first_child[first], first_child[end]
    bounds = (bound.flatten(1).long().contiguous() for bound in (first, end))
    low, high = (torch.searchsorted(memory.leaves, bound) for bound in bounds)
    return (memory.before.gather(1, high) - memory.before.gather(1, low)).view_as(nodes).float()

# ---- Sampling ----------------------------------
def add_gumbel(x: Tensor, generator: torch.Generator) -> Tensor:
    """x plus standard Gumbel noise."""
    return x - torch.empty_like(x).exponential_(generator=generator).clamp_(min=2 ** -25).log()

def perturb(scores: Tensor, parent: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel-perturbed scores of all children; scores (B, W, M), perturbed parents (B, W) -> (B, W, M).

    Stochastic beam search (arXiv 1903.06059, algorithm 1): the largest of a node's children must equal
    the node's own perturbed score G. Free noise gives g with maximum Z; in stable form (B.3)
        v = G - g + log(1 - exp(g - Z)),    G_child = G - max(0, v) - log(1 + exp(-|v|)).
    """
    free = add_gumbel(scores, generator)
    v = parent[..., None] - free + torch.log(-torch.expm1(free - free.amax(-1, keepdim=True)))
    bound = parent[..., None] - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    return bound.masked_fill(scores == -torch.inf, -torch.inf)

# ---- Tree attention and the search -------------
class Prefix(NamedTuple):
    """The prompts, read once."""
    cache: DynamicCache  # keys and values; tree tokens are appended
    lengths: Tensor      # (B,) tokens of each prompt
    width: int           # T
    last: Tensor         # (B, 1, D) hidden states of the last tokens

def prefill(model, prompts: list[list[int]], precision: str = "cuda") -> Prefix:
    """Read the prompts. A plain DynamicCache keeps them whole, even with a sliding window."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    cache = DynamicCache()
    with autocast(model.device, precision):
        hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    last = hidden[torch.arange(len(prompts), device=model.device), lengths - 1]
    return Prefix(cache, lengths, ids.shape[1], last[:, None])

def tree_mask(lengths: Tensor, width: int, ancestors: list[Tensor], slots: list[int]) -> Tensor:
    """Who may see whom: each beam its user's prompt, its ancestors and itself.

    ancestors, slots: one entry per depth. ancestors[d] (B, W) says which of the slots[d] beams of depth d
    is each beam's ancestor. -> (B, 1, W, T + sum(slots)), True where a key may be read.
    """
    prompt = torch.arange(width, device=lengths.device) < lengths[:, None]
    parts = [prompt[:, None].expand(-1, ancestors[0].shape[1], -1)]
    for ancestor, count in zip(ancestors, slots):
        parts.append(ancestor[..., None] == torch.arange(count, device=lengths.device))
    return torch.cat(parts, -1)[:, None]

def read_tokens(model, tokens: Tensor, prefix: Prefix, depth: Tensor | int, ancestors: list[Tensor],
                slots: list[int], precision: str = "cuda") -> Tensor:
    """One pass of tree tokens (B, W) at their depth after the prompts; -> (B, W, D)."""
    with autocast(model.device, precision):
        return model.base_model(
            input_ids=tokens, past_key_values=prefix.cache, use_cache=True,
            attention_mask=tree_mask(prefix.lengths, prefix.width, ancestors, slots),
            position_ids=(prefix.lengths[:, None] + depth).expand_as(tokens)).last_hidden_state

def follow(ancestors: list[Tensor], parent: Tensor) -> list[Tensor]:
    """The ancestors of new beams: those of their parents (B, W), and themselves."""
    own = torch.arange(parent.shape[1], device=parent.device).expand_as(parent)
    return [ancestor.gather(1, parent) for ancestor in ancestors] + [own]

@torch.no_grad()
def beam_search(model, trie: Trie, sid_ids: Tensor, prompts: list[list[int]], num_beams: int,
                sample: torch.Generator | None = None,
                memory: Memory | None = None) -> tuple[Tensor, Tensor]:
    """The best SIDs of each prompt; -> leaves (B, W), their log-probabilities (B, W), best first.

    L forward passes: the prompts, then one per further level. W is less than `num_beams` if there are
    fewer SIDs.
    sample, a generator: draw distinct SIDs without replacement from the policy, in the order of the draws.
    memory: a prefix has the probability (1 - lambda m) p_LM + lambda p_memory, and so has each SID.
    """
    head, batch = model.get_output_embeddings().weight, len(prompts)
    prefix = prefill(model, prompts)
    hidden, best, ancestors, slots = prefix.last, None, [], []
    nodes = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    scores = torch.zeros(batch, 1, device=model.device)
    perturbed = add_gumbel(scores, sample) if sample else scores
    for level in range(len(trie.codes)):
        if level:
            tokens = sid_ids[level - 1][trie.codes[level - 1][nodes]]  # (B, W)
            ancestors = follow(ancestors, best // trie.max_children[level - 1])
            slots.append(tokens.shape[1])
            hidden = read_tokens(model, tokens, prefix, level - 1, ancestors, slots)
        logits = hidden.float() @ head[sid_ids[level]].float().T  # (B, W, K)
        children, log_probs = expand(trie, level, nodes, logits)
        by_model = mixed = scores[..., None] + log_probs  # (B, W, M); scores: the model's alone
        if memory:
            mass = remembered(trie, level + 1, children, memory).masked_fill(by_model == -torch.inf, 0)
            mixed = torch.logaddexp((1 - memory.share).log() + by_model, mass.log())
        rank_by = perturb(mixed, perturbed, sample) if sample else mixed
        beams = min(num_beams, mixed[0].numel(), len(trie.codes[level]))
        perturbed, best = rank_by.flatten(1).topk(beams)  # best: places in W * M
        scores, nodes = by_model.flatten(1).gather(1, best), children.flatten(1).gather(1, best)
    return nodes, mixed.flatten(1).gather(1, best)

class Ranking(NamedTuple):
    """What the search found for one user, best first."""
    items: list          # item_ids
    scores: list[float]  # their log-probabilities
    leaves: list[int]    # the SIDs

def search_all(model, trie: Trie, sid_ids: Tensor, item_ids: list, prompts: list[list[int]],
               num_beams: int, batch_tokens: int, skip: list[set] | None = None,
               recalled: list[dict] | None = None, weight: float = 0.0, hidden=()) -> list[Ranking]:
    """Rank the catalogue `item_ids` (N,) for every prompt; -> up to `num_beams` SIDs for each.

    skip: items to leave out, by searching with as many more beams.
    recalled: p_memory for every prompt, {item_id: mass}, with its weight (lambda); it sorts a SID's items.
    hidden: items left out for all; the trie hides a SID if all its items are hidden.
    """
    leaf_of = dict(zip(item_ids, leaf_of_items(trie).tolist()))
    skip = skip or [set()] * len(prompts)
    rankings: list = [None] * len(prompts)
    batches = length_batches([len(prompt) for prompt in prompts], batch_tokens)
    beams = num_beams + max(map(len, skip), default=0)
    for users in tqdm(batches, desc="search", unit="batch", disable=None):
        memory = None
        if weight:
            memory = make_memory([recalled[user] for user in users], leaf_of, weight, model.device)
        found = beam_search(model, trie, sid_ids, [prompts[user] for user in users], beams, memory=memory)
        for user, leaves, scores in zip(users, *(part.tolist() for part in found)):
            rankings[user] = ranking = Ranking([], [], [])
            for leaf, score in zip(leaves, scores):
                rows = trie.leaf_items[trie.leaf_start[leaf]:trie.leaf_start[leaf + 1]]
                items = [i for i in (item_ids[row] for row in rows) if not (i in hidden or i in skip[user])]
                items.sort(key=lambda item_id: -recalled[user].get(item_id, 0) if weight else 0)
                if items and score > -torch.inf and len(ranking.leaves) < num_beams:
                    ranking.items.extend(items)
                    ranking.scores.extend([score] * len(items))
                    ranking.leaves.append(leaf)
    return rankings

# ---- Metrics and yardsticks --------------------
def rank_of(target, ranked: list) -> int | None:
    """1-based place of the target, None if it is missing."""
    return ranked.index(target) + 1 if target in ranked else None

def rank_metrics(ranks: list[int | None], cutoffs: tuple[int, ...]) -> dict[str, float]:
    """HR@K and NDCG@K from each target's rank, averaged over users."""
    found = [rank for rank in ranks if rank is not None]
    metrics = {f"HR@{k}": sum(rank <= k for rank in found) / len(ranks) for k in cutoffs}
    for k in cutoffs:
        metrics[f"NDCG@{k}"] = sum(1 / math.log2(rank + 1) for rank in found if rank <= k) / len(ranks)
    return metrics

def yardsticks(train: list[dict], samples: list[dict], item_ids: list, skip: list[set],
               recalled: list[dict], depth: int) -> dict[str, list[list]]:
    """Three counts of train.jsonl as rankings, one per sample; popular items follow.

    popularity: how often an item is a target. bigram: what followed the history's last item.
    skip-gram: the memory alone.
    """
    popular, followers = Counter(sample["target"] for sample in train), defaultdict(Counter)
    for sample in train:
        followers[sample["history"][-1]][sample["target"]] += 1
    by_popularity = sorted(item_ids, key=lambda item_id: -popular[item_id])
    place = {item_id: n for n, item_id in enumerate(by_popularity)}
    rankings = {"popularity": [], "bigram": [], "skip-gram": []}
    for sample, skipped, memory in zip(samples, skip, recalled):
        after = followers[sample["history"][-1]]
        top = by_popularity[:depth + len(skipped)]
        for name, counts in (("popularity", {}), ("bigram", after), ("skip-gram", memory)):
            seen = sorted((i for i in counts if i in place), key=lambda i: (-counts[i], place[i]))
            ranked = [i for i in dict.fromkeys(seen + top) if i not in skipped]
            rankings[name].append(ranked[:depth])
    return rankings

def what_training_showed(train: list[dict], pairs: dict, samples: list[dict]) -> list[str]:
    """For each sample one of KINDS: how train.jsonl connects history and target."""
    adjacent = {(sample["history"][-1], sample["target"]) for sample in train}
    seen = {i for sample in train for i in (*sample["history"], sample["target"])}
    kinds = []
    for sample in samples:
        history, target = sample["history"], sample["target"]
        facts = (target in history, (history[-1], target) in adjacent,  # the first true one counts
                 any(target in pairs.get(i, ()) for i in history), target in seen, True)
        kinds.append(KINDS[facts.index(True)])
    return kinds

def hits_by_kind(ranks: list[int | None], kinds: list[str]) -> dict[str, dict]:
    """HR and NDCG at 1 and 10 by kind of target."""
    found = {}
    for kind in sorted(set(kinds), key=KINDS.index):
        of_kind = [rank for rank, k in zip(ranks, kinds) if k == kind]
        found[kind] = {"n": len(of_kind), **rank_metrics(of_kind, (1, 10))}
    return found

def hits_by_level(targets: list, ranked: list[list], sid_of: dict) -> list[float]:
    """How often the best item has the target's first code, its first two, and so on; (L,)."""
    depths = range(1, len(sid_of[targets[0]]) + 1)
    best = [(sid_of[target], sid_of[items[0]]) for target, items in zip(targets, ranked) if items]
    return [sum(a[:depth] == b[:depth] for a, b in best) / len(targets) for depth in depths]

def measure(facts: dict, items: list[dict], targets: list, rankings: dict[str, list], by_sid,
            kinds: list[str]) -> list[dict]:
    """One row per method: figures by item; if SIDs collide, for `by_sid` also by SID."""
    cutoffs, results = tuple(k for k in CUTOFFS if k <= facts["num_beams"]), []
    sid_of = {item["item_id"]: tuple(item["sid"]) for item in items}
    for method, ranked in rankings.items():
        ranks = [rank_of(target, ranking) for target, ranking in zip(targets, ranked)]
        results.append({**facts, "method": method, "level": "item", **rank_metrics(ranks, cutoffs),
                        "codes": hits_by_level(targets, ranked, sid_of), "kinds": hits_by_kind(ranks, kinds)})
    for method in by_sid if len(set(sid_of.values())) < len(sid_of) else ():
        ranked = [list(dict.fromkeys(sid_of[i] for i in ranking)) for ranking in rankings[method]]
        ranks = [rank_of(sid_of[target], sids) for target, sids in zip(targets, ranked)]
        results.append({**facts, "method": method, "level": "sid", **rank_metrics(ranks, cutoffs)})
    return results

# ---- Output ------------------------------------
def print_table(rows: list[dict]) -> None:
    """One line per method: HR and NDCG at the papers' cut-offs."""
    heads = [f"{name}@{k}" for name in ("HR", "NDCG") for k in (1, 3, 5, 10) if f"HR@{k}" in rows[0]]
    print(f"{'method':<24}{'level':<6}" + "".join(f"{head:>9}" for head in heads))
    for row in rows:
        print(f"{row['method'][-23:]:<24}{row['level']:<6}" + "".join(f"{row[head]:>9.4f}" for head in heads))

def print_details(rows: list[dict]) -> None:
    """HR@1 / HR@10 by kind of target; how often the best item's codes are right."""
    heads = "".join(f"{row['method'][-19:]:>20}" for row in rows)
    title, n = ("HR@1 / HR@10 of targets", "n") if rows[0]["kinds"] else ("", "")
    print(f"\n{title:<34}{n:>6}{heads}")
    for kind, first in rows[0]["kinds"].items():
        hits = [f"{row['kinds'][kind]['HR@1']:.3f} / {row['kinds'][kind]['HR@10']:.3f}" for row in rows]
        print(f"{kind:<34}{first['n']:>6}" + "".join(f"{hit:>20}" for hit in hits))
    for level in range(len(rows[0]["codes"])):
        name = f"code {level + 1} of the best item" + (", if all before" if level else "")
        shares = [row["codes"][level] / max(1e-9, [1, *row["codes"]][level]) for row in rows]
        print(f"{name:<40}" + "".join(f"{share:>20.3f}" for share in shares))

def show_user(history: list, ranking: Ranking, item_of: dict, keywords: dict[str, list[str]],
              masses: dict, target=None) -> None:
    """Print a history, ten recommendations in words, and the target's rank.

    masses: what the memory adds to the probability of each item, lambda * p_memory.
    """
    def in_words(item_id) -> str:
        item = item_of[item_id]
        tokens = [f"{token} {', '.join(map(str, keywords.get(token, [])[:3]))}" for token in item["sid"]]
        return f"{item_id!r} {item['title'][:80]}\n          {' | '.join(tokens)}"

    for item_id in history:
        print(f"history   {item_id!r} {item_of[item_id]['title'][:80]}")
    print("recommendations (rank, log-probability, memory's share):")
    for n, (item_id, score) in enumerate(zip(ranking.items[:10], ranking.scores), 1):
        mark = "  <-- target" if item_id == target else ""
        share = min(1, masses.get(item_id, 0) / max(1e-300, math.exp(score)))
        print(f"  {n:>2} {score:>6.2f} {share:>4.0%} {in_words(item_id)}{mark}")
    if target is not None:
        rank = rank_of(target, ranking.items)
        print(f"target: {f'rank {rank}' if rank else 'not found'}, {in_words(target)}\n")

def export(folder: Path, model, tokenizer, items: list[dict], instruction: str) -> None:
    """Write the checkpoint as a Hugging Face folder, and sids.jsonl."""
    if folder.exists():
        stop(f"--export {folder}: exists already; name a new folder")
    write_jsonl(folder / "sids.jsonl", [{"sid": "".join(item["sid"]), "item_id": item["item_id"],
                                         "title": item["title"]} for item in items])
    levels = len(items[0]["sid"])
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=levels)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(EXPORTED.format(levels=levels, prompt=instruction), encoding="utf-8")
    print(f"wrote {folder}")

# ---- Command line ------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "device")
    flag = parser.add_argument
    flag("--checkpoint", help="instead of RUN/sft.pt")
    flag("--task", choices=SID_TASKS, help="None: the checkpoint's")
    flag("--split", choices=("test", "valid"), default="test", help="which samples to rank")
    flag("--metrics", help="instead of RUN/metrics.jsonl")
    flag("--predictions", help="instead of RUN/predictions.jsonl")
    flag("--num-beams", type=number(int, 1), help="W; None: 20, for tasks about items 5")
    flag("--memory", type=number(float, 0, 1), default=0.6, metavar="LAMBDA", help="0: the papers' system")
    flag("--memory-from", metavar="FILE", help="samples to count, instead of RUN/train.jsonl")
    flag("--candidates", help="the item_ids that may be recommended ({item_id} lines)")
    flag("--exclude-history", action="store_true", help="never recommend an item of the history")
    flag("--batch-tokens", type=number(int, 1), default=16384, help="prompt tokens per batch")
    flag("--limit", type=number(int, 0), default=0, help="how many samples; 0: all")
    flag("--show", type=number(int, 0), default=0, help="print so many users' recommendations")
    flag("--history", type=lambda text: text.split(","), metavar="ID,ID", help="recommend for it and stop")
    flag("--export", metavar="DIR", help="write a Hugging Face folder and stop")
    args = parser.parse_args(argv)
    if args.history and args.task and not TASKS[args.task].recommends:
        parser.error(f"--history needs a task with a history, --task {args.task} has none")
    return args

def read_history(names: list[str], items: list[dict]) -> list:
    """The item_ids that were named."""
    id_of = {str(item["item_id"]): item["item_id"] for item in items}
    for name in names:
        if name.strip() not in id_of:
            stop(f"--history: {name!r} is not in the catalogue; give item_ids, with commas")
    return [id_of[name.strip()] for name in names]

def read_pairs(run: Path, task: str, split: str, items: list[dict], limit: int) -> list:
    """What the task asks: instructions and responses, each with its row of data."""
    known, data = {item["item_id"] for item in items}, {"items": items}
    if TASKS[task].source == "samples":
        data["samples"] = read_samples(run / f"{split}.jsonl", known)
    elif TASKS[task].source == "queries":
        data["queries"] = read_queries(run / "queries.jsonl", known, "test")
    pairs = make_pairs(task, data)[:limit or None]
    if not pairs:
        stop(f"--task {task}: this run has no examples of it")
    return pairs

def main() -> None:
    args = parse_args()
    device, run = set_up(args.device), Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    path = Path(args.checkpoint or run / "sft.pt")
    model, tokenizer, checkpoint = load_model(path, device, items)
    sid = checkpoint["sid"]
    item_of = {item["item_id"]: item for item in items}
    task = args.task or checkpoint["args"].get("recommends", "next")
    of_users = TASKS[task].source == "samples"
    if not of_users and task not in checkpoint["args"].get("tasks", ()):
        print(f"note: {path} was last trained without {task}")

    # What is asked
    if args.history:
        rows = [{"history": read_history(args.history, items)}]
        fields = history_fields(rows[0]["history"], item_of)
        instructions = [TASKS[task].instructions[0].format(**fields) + TASKS[task].end]
    else:
        pairs = read_pairs(run, task, args.split, items, args.limit)
        instructions, rows = [pair.instruction for pair in pairs], [pair.row for pair in pairs]
    if args.export:
        return export(Path(args.export), model, tokenizer, items, instructions[0])
    prompts = prompt_ids(tokenizer, instructions)
    longest = max(len(prompt) for prompt in prompts) + sid["num_levels"] - 1
    check_lengths(longest, model.config, in_search=True)

    # What may be recommended, and the memory
    item_ids = list(item_of)
    hidden = set()
    if args.candidates:
        wanted = read_jsonl(args.candidates, {"item_id": ID}, known=set(item_ids))
        hidden = set(item_ids) - {row["item_id"] for row in wanted}
    shown = [item_id for item_id in item_ids if item_id not in hidden]
    histories = [row["history"] if of_users else [] for row in rows]
    skip = [set(history) if args.exclude_history else set() for history in histories]
    train = []
    recalled = [{}] * len(rows)
    if of_users:
        train = read_samples(run / "train.jsonl", set(item_of))
        counted = counts = count_pairs(train)
        if args.memory_from:
            counted = count_pairs(read_samples(args.memory_from, set(item_of)))
        recalled = [recall(history, counted) for history in histories]

    # The search
    if device.type == "cuda":
        read_in_bf16(model)
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(device)
    new, codes = new_items(sid, items), torch.from_numpy(codes_of(items))
    is_new, is_hidden = (torch.tensor([i in some for i in item_ids]) for some in (new, hidden))
    trie = build_trie(codes, sid["codebook_size"], device, is_new, is_hidden)
    num_beams = args.num_beams or (5 if TASKS[task].source == "items" else 20)
    start, found = time.time(), {}
    for weight in sorted({0.0, args.memory if any(recalled) else 0.0}):  # the last one is shown
        name = f"{path.name} + memory {weight:g}" if weight else path.name
        found[name] = rankings = search_all(model, trie, sid_ids, item_ids, prompts, num_beams,
                                            args.batch_tokens, skip, recalled, weight, hidden)
    seconds = max(0.01, round(time.time() - start, 2))

    # Some users in words
    targets = [row.get("target" if of_users else "item_id") for row in rows]
    path, keywords = run / "semantics.jsonl", {}
    if (args.show or args.history) and path.exists():
        keywords = {row["token"]: row["keywords"] for row in read_semantics(path, items)}
    for n in range(1 if args.history else min(args.show, len(rows))):
        masses = {item_id: weight * mass for item_id, mass in recalled[n].items()}
        print(f"prompt: {instructions[n].strip()}")
        show_user(histories[n], rankings[n], item_of, keywords, masses, targets[n])
    if args.history:
        return

    # Figures
    ranked = {name: [ranking.items for ranking in found[name]] for name in found}
    kinds = what_training_showed(train, counts, rows) if train and num_beams >= 10 else []
    if train:
        ranked = yardsticks(train, rows, shown, skip, recalled, num_beams) | ranked
    facts = {"task": task, "split": args.split if of_users else "test", "n": len(rows),
             "num_beams": num_beams, "seconds": seconds, "exclude_history": args.exclude_history,
             "candidates": args.candidates, "memory_from": args.memory_from}
    results = measure(facts, items, targets, ranked, found, kinds)
    asked = {"samples": "user_id", "queries": "query", "items": "title"}[TASKS[task].source]
    predictions = [{asked: row[asked], "target": target, "items": ranking.items, "scores": ranking.scores}
                   for row, target, ranking in zip(rows, targets, rankings)]
    out, metrics = args.predictions or run / "predictions.jsonl", args.metrics or run / "metrics.jsonl"
    print(f"{len(rows)} examples of {task} | {len(shown)} items | {num_beams} beams | "
          f"device {device} | {seconds:.1f} s, {len(found) * len(rows) / seconds:.0f} per second")
    print_table(results)
    print_details([row for row in results if row["level"] == "item"])
    write_jsonl(out, predictions)
    write_jsonl(metrics, (read_jsonl(metrics, {}) if Path(metrics).exists() else []) + results)
    print(f"wrote {metrics}, {out}")

if __name__ == "__main__":
    main()
