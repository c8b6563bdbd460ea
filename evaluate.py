"""Stage 6: rank the whole catalogue by trie-constrained beam search and report HR@K and NDCG@K.

The search reads each prompt once. Beams are query positions of one sequence: a 4-D mask lets each beam token see
its user's prompt and its own ancestors, so the prompt's KV cache is never copied and nothing is re-ordered.
Logits are taken against the K rows of the level only. Given a generator, the same search draws SIDs without
replacement (stochastic beam search, Kool et al. 2019, arXiv 1903.06059). TS-Rec (arXiv 2602.22632), section 5.1.2:
full ranking, 20 beams, K = 3, 5, 10. With one relevant item HR@K = Recall@K, NDCG@K = 1 / log2(rank + 1).
`--task` ranks for any other task whose response is a SID (search: STAR, section 3.2), and decodes texts freely for
the tasks whose response is one (SID comprehension: TS-Rec, section 5.5, 5 beams).

Reads   RUN/sft.pt (or --checkpoint), RUN/items.jsonl, RUN/test.jsonl (or valid), RUN/train.jsonl (yardsticks),
        RUN/queries.jsonl (search), RUN/semantics.jsonl (meanings of tokens, where it exists)
Writes  RUN/metrics.jsonl (appended), RUN/predictions.jsonl; with --plot DIR instead DIR/curves.png (validation losses
        of RUN/*_log.jsonl), spectra.png, cosine.png and pca.png (rows of RUN/init*.pt, align*.pt, the checkpoint)

Differs from the papers
  1. A hit is the target item. Where SIDs collide, the items of one SID follow each other in catalogue order; the
     SID-level figure, which the papers report, is printed beside.
  2. Yardsticks counted on train.jsonl stand in the same table: popularity, and last-item bigram.
  3. Beside the accuracy of decoded texts (exact but for blanks and case) stands the F1 of their words.
  4. The policy is normalised over the trie's children at each level (`--normalize trie`), a proper distribution
     over items; `level` is the softmax over all K codes of the level.
  5. Items that joined later and were no target in training count as the average of their siblings (`--new-items`).

Examples
  python evaluate.py                                               # the demo's test users
  python evaluate.py --show 3                                      # and three of them in words
  python evaluate.py --history 12,55,89                            # ten recommendations for that history
  python evaluate.py --task title2sid                              # comprehension, ACC1 (sid2title: ACC2)
  python evaluate.py --plot runs/demo/figures                      # losses and embeddings drawn (needs matplotlib)
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
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from init_embeddings import autocast, load_model, new_items, sid_token_ids, to_bfloat16
from tokenize_items import (check_key, check_output, codes_of, fit_pca, parse_sid_token, pick_device, read_catalogue,
                            read_jsonl, read_samples, replacing, stop, within, write_jsonl)
from train import (TASKS, check_lengths, find_parents, geometry, length_batches, prompt_ids,
                   read_meanings, read_queries, recommends_by, task_rows)

# Letters used in shapes: B users, T prompt tokens, W beams, L levels, K codes per level, M most children of a
# node, N items, D width.
CUTOFFS = (1, 3, 5, 10, 20, 50)
HEAT_MAP_ROWS = 50                      # of text and of SID tokens each (STAR, figure 5)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")     # Okabe and Ito, but yellow


# ---------------------------------------------------------------------------------------------------------
# The trie as flat tensors
# ---------------------------------------------------------------------------------------------------------

class Trie(NamedTuple):
    """All SIDs as a prefix tree; node n of depth l has children first_child[l][n] ... first_child[l][n + 1] - 1,
    numbered at depth l + 1, whose codes are codes[l][child]. Depth L nodes are leaves, one per distinct SID."""
    first_child: list[torch.Tensor]     # per level: (nodes at depth l + 1 boundary,)
    codes: list[torch.Tensor]           # per level: (nodes at depth l + 1,)
    max_children: list[int]             # per level: M
    is_new: list[torch.Tensor]          # per level: (nodes at depth l + 1,), are all items below new? Or []: none is
    leaf_start: np.ndarray              # (leaves + 1,) into leaf_items
    leaf_items: np.ndarray              # (N,) rows of the catalogue, ascending within a leaf


def build_trie(codes: torch.Tensor, codebook_size: int, device: torch.device, new: torch.Tensor | None = None) -> Trie:
    """Build the trie of a code matrix, (N, L) -> Trie: one sort, O(N) memory; `new` (N,): see average_siblings."""
    num_levels = codes.shape[1]
    check_key(num_levels, codebook_size)
    key = torch.zeros(len(codes), dtype=torch.long)
    for level in range(num_levels):
        key = key * codebook_size + codes[:, level]
    key, order = key.sort(stable=True)                                  # catalogue order within a leaf
    nodes, items = torch.unique_consecutive(key, return_counts=True)
    leaf_start = F.pad(items.cumsum(0), (1, 0))
    known = None if new is None else F.pad((~new)[order].cumsum(0), (1, 0))[leaf_start]     # known before each
    first_child, level_codes, max_children, is_new = [], [], [], []
    for _ in range(num_levels):                                         # from the leaves up
        parents, counts = torch.unique_consecutive(nodes // codebook_size, return_counts=True)
        start = F.pad(counts.cumsum(0), (1, 0))
        level_codes.insert(0, (nodes % codebook_size).to(device, torch.int32))
        first_child.insert(0, start.to(device, torch.int32))
        max_children.insert(0, int(counts.max()))
        if known is not None:
            is_new.insert(0, (known.diff() == 0).to(device))
            known = known[start]
        nodes = parents
    return Trie(first_child, level_codes, max_children, is_new, leaf_start.numpy(), order.numpy())


# ---------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------

def any_allowed(trie: Trie, depth: int, nodes: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Whether any leaf below each node of that depth is allowed; nodes (B, W, M), counts (B, leaves + 1).

    The leaves below a node are neighbours, so prefix sums of `allowed` count the live ones below any node at any
    depth: a filter costs one cumsum per search and leaves the trie as it is.
    """
    low, high = nodes, nodes + 1
    for first_child in trie.first_child[depth:]:
        low, high = first_child[low], first_child[high]
    below, until = (counts.gather(1, n.flatten(1).long()) for n in (low, high))
    return (until > below).view_as(nodes)


def average_siblings(logits: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Give new children the mean probability of their known siblings, where there are any; logits, new (B, W, M).

    A model has learned that a code which no item had never follows its prefix, so that by its own scores an item that
    joined later is never recommended, however well it fits. Where n children share a prefix, a new one gets 1/n.
    """
    known = logits.masked_fill(new, -torch.inf)
    count = (known > -torch.inf).sum(-1, keepdim=True)
    return torch.where(new & (count > 0), known.logsumexp(-1, keepdim=True) - count.log(), logits)


def expand(trie: Trie, level: int, nodes: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor,
           normalize: str, counts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Score all children of all beams; nodes, scores (B, W), logits (B, W, K) -> children, scores (B, W, M).

    Slots beyond a node's children, and children without an allowed leaf (see any_allowed), score -inf.
    """
    start = trie.first_child[level][nodes]
    slot = torch.arange(trie.max_children[level], device=nodes.device)
    live = slot < (trie.first_child[level][nodes + 1] - start)[..., None]
    children = torch.where(live, start[..., None] + slot, 0)
    if counts is not None:
        live = live & any_allowed(trie, level + 1, children, counts)
    if normalize == "level":
        logits = logits.log_softmax(-1)
    gain = logits.gather(-1, trie.codes[level][children].long()).masked_fill(~live, -torch.inf)
    if trie.is_new:
        gain = average_siblings(gain, trie.is_new[level][children] & live)
    if normalize == "trie":
        gain = gain.log_softmax(-1).masked_fill(~live, -torch.inf)      # no child alive: -inf, not NaN
    return children, scores[..., None] + gain


def add_gumbel(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """x plus standard Gumbel noise; the generator lives on x's device."""
    return x - torch.empty_like(x).exponential_(generator=generator).clamp_(min=2 ** -25).log()


def perturb(scores: torch.Tensor, parent: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gumbel-perturbed scores of all children; scores (B, W, M), the beams' own perturbed ones (B, W) -> (B, W, M).

    Kool, van Hoof and Welling 2019 (arXiv 1903.06059), algorithm 1: the largest of a node's children must equal the
    node's own perturbed score G. Free noise gives g with maximum Z; conditioned, in stable form (appendix B.3),
        v = G - g + log(1 - exp(g - Z)),    G_child = G - max(0, v) - log(1 + exp(-|v|)).
    """
    free = add_gumbel(scores, generator)
    v = parent[..., None] - free + torch.log(-torch.expm1(free - free.amax(-1, keepdim=True)))
    bound = parent[..., None] - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    return bound.masked_fill(scores == -torch.inf, -torch.inf)


def tree_mask(lengths: torch.Tensor, width: int, ancestors: list[torch.Tensor], slots: list[int]) -> torch.Tensor:
    """Who sees whom: each beam its user's prompt and its own ancestors (itself included).

    lengths (B,), prompt width T, ancestors: per depth the slot (B, W) of each beam's ancestor among that depth's
    `slots` beams -> (B, 1, W, T + sum(slots)), True where the key may be read.
    """
    batch, beams = ancestors[0].shape
    prompt = torch.arange(width, device=lengths.device) < lengths[:, None]
    parts = [prompt[:, None].expand(batch, beams, width)]
    parts += [a[..., None] == torch.arange(n, device=a.device) for a, n in zip(ancestors, slots)]
    return torch.cat(parts, -1)[:, None]


def prefill(model, prompts: list[list[int]], precision: str = "auto") -> tuple:
    """Read the prompts, once; their keys and values, lengths (B,), and hidden states of the last tokens (B, 1, D)."""
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(model.device)     # zeros behind
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    with autocast(model.device, precision):
        out = model.base_model(input_ids=ids, use_cache=True)                        # (B, T, D)
    last = torch.arange(len(prompts), device=model.device), lengths - 1
    return out.past_key_values, lengths, out.last_hidden_state[last][:, None]


@torch.no_grad()
def beam_search(model, trie: Trie, sid_ids: torch.Tensor, prompts: list[list[int]], num_beams: int,
                normalize: str = "trie", allowed: torch.Tensor | None = None, sample: torch.Generator | None = None,
                temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    """The `num_beams` best SIDs of each prompt under the trie, best first; -> leaves (B, W), scores (B, W).

    L forward passes: the prompts, then one per further level with a token per beam. A catalogue (or a part of
    it) with fewer SIDs than beams leaves scores of -inf at the end of a row: those are not results.

    `allowed` (B or 1, leaves), bool: only these SIDs exist for that prompt; probabilities are over what is left.
    `sample`, a generator on the model's device: W distinct SIDs drawn without replacement from the policy at
    `temperature`, in the order of the draws; scores are their log-probabilities, a third result (B, W) their
    perturbed scores. Weights exp(score) / (1 - exp(-exp(score - t))), t the last perturbed score, make a sum over
    all draws but the last an unbiased mean. Only for normalize="trie": there the policy sums to one.
    """
    if sample is not None and normalize != "trie":
        raise ValueError('sampling needs normalize="trie": at "level" the trie\'s SIDs do not sum to one')
    device, num_levels = trie.codes[0].device, len(trie.codes)
    head = model.get_output_embeddings().weight
    counts = None if allowed is None else F.pad(
        allowed.to(device).cumsum(1, dtype=torch.int32), (1, 0)).expand(len(prompts), -1)

    cache, lengths, hidden = prefill(model, prompts)
    nodes = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
    scores = torch.zeros(len(prompts), 1, device=device)
    perturbed = scores if sample is None else add_gumbel(scores, sample)
    ancestors, slots = [], []
    for level in range(num_levels):
        logits = hidden.float() @ head[sid_ids[level]].float().T / temperature       # (B, W, K)
        children, total = expand(trie, level, nodes, scores, logits, normalize, counts)
        rank_by = total if sample is None else perturb(total, perturbed, sample)
        beams = min(num_beams, total[0].numel(), len(trie.codes[level]))
        perturbed, best = rank_by.flatten(1).topk(beams)
        scores = total.flatten(1).gather(1, best)
        nodes = children.flatten(1).gather(1, best)                                  # (B, W)
        if level + 1 == num_levels:
            return (nodes, scores) if sample is None else (nodes, scores, perturbed)
        parent = best // trie.max_children[level]
        ancestors = [a.gather(1, parent) for a in ancestors] + [torch.arange(beams, device=device).expand_as(nodes)]
        slots.append(beams)
        with autocast(device):
            hidden = model.base_model(
                input_ids=sid_ids[level][trie.codes[level][nodes]], past_key_values=cache, use_cache=True,
                attention_mask=tree_mask(lengths, max(map(len, prompts)), ancestors, slots),
                position_ids=(lengths[:, None] + level).expand_as(nodes)).last_hidden_state      # (B, W, D)


def leaf_filter(trie: Trie, excluded: list[list[int]]) -> torch.Tensor:
    """Which SIDs each user has left without those catalogue rows: any that names another item; -> (B, leaves)."""
    keep = np.ones((len(excluded), len(trie.leaf_items)), dtype=bool)
    for user, rows in enumerate(excluded):
        keep[user, rows] = False
    return torch.from_numpy(np.logical_or.reduceat(keep[:, trie.leaf_items], trie.leaf_start[:-1], axis=1))


def search_all(model, trie: Trie, sid_ids: torch.Tensor, prompts: list[list[int]], num_beams: int, normalize: str,
               batch_tokens: int, excluded: list[list[int]] | None = None) -> list[list[tuple[int, float]]]:
    """Beam search for every prompt, less the catalogue rows `excluded` for it; (leaf, score) pairs, best first."""
    results: list = [None] * len(prompts)
    model.eval()
    with tqdm(total=len(prompts), desc="search", unit="user", disable=None) as bar:
        for rows in length_batches(prompts, batch_tokens):
            batch = [prompts[r] for r in rows]
            allowed = leaf_filter(trie, [excluded[r] for r in rows]) if excluded else None
            leaves, scores = beam_search(model, trie, sid_ids, batch, num_beams, normalize, allowed)
            for row, leaf, score in zip(rows, leaves.tolist(), scores.tolist()):
                results[row] = [(n, s) for n, s in zip(leaf, score) if s > -math.inf]
            bar.update(len(rows))
    return results


def name_items(trie: Trie, candidates: list[dict], found: list, skip: list[set]) -> tuple[list, list, list]:
    """Per user the item_ids behind the leaves found, but those to `skip`; their scores; the leaves' SIDs."""
    ranked, scores, sids, start = [], [], [], trie.leaf_start
    for pairs, no in zip(found, skip):
        items = [(candidates[r], score)
                 for leaf, score in pairs for r in trie.leaf_items[start[leaf]:start[leaf + 1]]]
        ranked.append([item["item_id"] for item, _ in items if item["item_id"] not in no])
        scores.append([score for item, score in items if item["item_id"] not in no])
        sids.append(list(dict.fromkeys(tuple(item["sid"]) for item, _ in items)))
    return ranked, scores, sids


@torch.no_grad()
def decode_texts(model, prompts: list[list[int]], num_beams: int, max_tokens: int, eos: int) -> list[list[list[int]]]:
    """Beam search over the whole vocabulary; per prompt the ids of `num_beams` texts up to EOS, best first.

    The same tree attention, a slot per beam and step; a beam that has ended goes on with EOS at no cost. Scores are
    sums of log-probabilities, not divided by lengths.
    """
    head, width = model.get_output_embeddings().weight, max(map(len, prompts))
    cache, lengths, hidden = prefill(model, prompts)
    scores = torch.zeros(len(prompts), 1, device=head.device)
    texts = lengths.new_zeros(len(prompts), 1, 0)                                    # (B, W, step)
    seen = torch.zeros(len(prompts), 1, 0, dtype=torch.bool, device=head.device)     # (B, W, slots)
    prompt = (torch.arange(width, device=head.device) < lengths[:, None])[:, None]   # (B, 1, T)
    for step in range(max_tokens):
        gain = (hidden.float() @ head.float().T).log_softmax(-1)                     # (B, W, V)
        if step:
            ended = texts[..., -1] == eos
            gain[ended] = torch.where(torch.arange(len(head), device=head.device) == eos, 0.0, -torch.inf)
        scores, best = (scores[..., None] + gain).flatten(1).topk(min(num_beams, scores.shape[1] * len(head)))
        parent, token = best // len(head), best % len(head)                          # (B, W)
        texts = torch.cat([texts.gather(1, parent[..., None].expand(-1, -1, step)), token[..., None]], -1)
        if (token == eos).all() or step + 1 == max_tokens:
            break
        own = torch.eye(token.shape[1], dtype=torch.bool, device=head.device).expand(len(prompts), -1, -1)
        seen = torch.cat([seen.gather(1, parent[..., None].expand(-1, -1, seen.shape[2])), own], -1)
        mask = torch.cat([prompt.expand(-1, token.shape[1], -1), seen], -1)[:, None]
        with autocast(head.device):
            hidden = model.base_model(
                input_ids=token, past_key_values=cache, attention_mask=mask, use_cache=True,
                position_ids=(lengths[:, None] + step).expand_as(token)).last_hidden_state
    return [[text[:text.index(eos)] if eos in text else text for text in beams] for beams in texts.tolist()]


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


def text_metrics(wanted: list[str], found: list[list[str]]) -> dict[str, float]:
    """Of each example's texts, best first: is the best one the wanted one, is any, and the best one's token F1."""
    totals = Counter()
    for want, texts in zip(wanted, found):
        want, *texts = (text.casefold().split() for text in (want, *texts))
        shared = (Counter(want) & Counter(texts[0])).total()
        totals.update({"accuracy": texts[0] == want, "accuracy_any": want in texts,
                       "token_f1": 2 * shared / max(1, len(want) + len(texts[0]))})
    return {name: totals[name] / len(wanted) for name in ("accuracy", "accuracy_any", "token_f1")}


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


def yardsticks(train: list[dict], samples: list[dict], candidates: list[dict], skip: list[set], depth: int) -> dict:
    """Both rankings per user, `depth` items each, without what that user is to `skip`."""
    popular, more = popularity_ranking(train, candidates), depth + max(map(len, skip))
    rankings = {"popularity": [popular[:more]] * len(samples),
                "bigram": bigram_rankings(train, samples, popular, more)}
    return {name: [[i for i in ranking if i not in no][:depth] for ranking, no in zip(per_user, skip)]
            for name, per_user in rankings.items()}


# ---------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------

def print_table(rows: list[dict]) -> None:
    """One line per method: HR and NDCG at the papers' cut-offs, or the figures of decoded texts."""
    heads = [f"{name}@{k}" for name in ("HR", "NDCG") for k in (1, 3, 5, 10)]
    heads = [h for h in (*heads, "accuracy", "accuracy_any", "token_f1") if h in rows[0]]
    print(f"{'method':<24}{'level':<6}" + "".join(f"{h:>{max(9, len(h) + 1)}}" for h in heads))
    for row in rows:
        print(f"{row['method']:<24}{row['level']:<6}" + "".join(f"{row[h]:>{max(9, len(h) + 1)}.4f}" for h in heads))


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
        place = f"rank {rank}" if rank else "not found"
        print(f"target: {place}, {describe(items[sample['target']], meaning)}\n")


# ---------------------------------------------------------------------------------------------------------
# Figures (--plot): matplotlib is needed here only
# ---------------------------------------------------------------------------------------------------------

def read_rows(path: Path, items: list[dict], names: list[str]) -> dict[str, torch.Tensor]:
    """Rows of a checkpoint's input matrix: of all text tokens (V, D), of the words that titles use most (n, D), and of
    the SID tokens `names` (n, D)."""
    model, tokenizer, checkpoint = load_model(path, torch.device("cpu"), items)
    rows, sid = model.get_input_embeddings().weight.detach().float(), checkpoint["sid"]
    pieces = tokenizer([item["title"] for item in items], add_special_tokens=False).input_ids
    used = Counter(i for ids in pieces for i in ids).most_common()
    common = [i for i, _ in used if tokenizer.decode([i]).strip().isalpha()][:HEAT_MAP_ROWS]
    return {"text": rows[:int(sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).min())],
            "common": rows[common], "sid": rows[tokenizer.convert_tokens_to_ids(names)]}


def draw_lines(figure, lines: dict[str, tuple], marker: str = "", heading: str = "", **labels) -> None:
    """A line per name, {name: (xs, ys)}; the names stand at the right."""
    axes = figure.subplots()
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        axes.plot(xs, ys, marker=marker, label=name, color=COLOURS[number % 7],
                  linestyle=("-", "--", ":")[number // 7 % 3])
    axes.set(**labels)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title=heading)


def draw_curves(figure, logs: dict[str, list[dict]]) -> None:
    """Validation loss against update, a line per log (TS-Rec, figure 4); --stage align has examples of its own."""
    lines = {name: ([row["step"] for row in rows], [row["valid_loss"] for row in rows]) for name, rows in logs.items()}
    draw_lines(figure, lines, marker=".", title="Validation loss", xlabel="update", ylabel="nats per supervised token")


def draw_spectra(figure, spaces: dict[Path, dict], parents: list[set]) -> None:
    """Singular values of the SID rows in use, the largest set to 1, and their effective rank (STAR, figure 2)."""
    lines = {}
    for path, rows in spaces.items():
        values, rank = torch.linalg.svdvals(rows["sid"]), geometry(rows["sid"], parents)["effective_rank"]
        lines[f"{path.stem}: {rank:.1f}"] = range(1, len(values) + 1), (values / values[0]).tolist()
    draw_lines(figure, lines, heading="effective rank", title="Singular values of the SID rows in use",
               xlabel="place in descending order", ylabel="relative to the largest", yscale="log",
               ylim=(1e-3, 1.3))                                        # less is rounding errors


def draw_cosine(figure, pair: dict[Path, dict], levels: list[int]) -> None:
    """Cosines between the rows of words that titles use most and SID rows of all levels (STAR, figure 5)."""
    figure.set_size_inches(6 * len(pair), 5)
    count = min(HEAT_MAP_ROWS, len(levels))
    chosen = [n * len(levels) // count for n in range(count)]                        # evenly spaced
    for axes, (path, rows) in zip(np.ravel(figure.subplots(1, len(pair))), pair.items()):
        unit = F.normalize(torch.cat([rows["common"], rows["sid"][chosen]]), dim=1)
        image = axes.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        blocks = {"text": len(rows["common"]), **Counter(f"level {levels[n] + 1}" for n in chosen)}
        sizes = np.array(list(blocks.values()))
        for edge in sizes.cumsum()[:-1] - 0.5:
            axes.axhline(edge, color="black", linewidth=1)
            axes.axvline(edge, color="black", linewidth=1)
        middles = sizes.cumsum() - sizes / 2 - 0.5
        axes.set(title=path.name, xticks=middles, xticklabels=blocks, yticks=middles, yticklabels=blocks)
    figure.suptitle("Cosine between text rows and SID rows")
    figure.colorbar(image, ax=figure.axes, label="cosine")


def draw_pca(figure, pair: dict[Path, dict], levels: list[int]) -> None:
    """Text rows and SID rows on the two principal axes of both together (TS-Rec, figure 1; STAR, figure 2)."""
    figure.set_size_inches(6 * len(pair), 5.5)
    for axes, (path, rows) in zip(np.ravel(figure.subplots(1, len(pair))), pair.items()):
        both = torch.cat([rows["text"], rows["sid"]])
        pca = fit_pca(both, 2)
        points = (both - pca["pca_mean"]) @ pca["pca_components"]                    # (V + n, 2)
        share = points.square().sum(0) / (both - pca["pca_mean"]).square().sum()
        text, sid = points.numpy()[:-len(levels)], points.numpy()[-len(levels):]
        axes.scatter(*text.T, s=3, color="0.75", label="text tokens")
        for level in sorted(set(levels)):
            axes.scatter(*sid[np.array(levels) == level].T, s=18, color=COLOURS[level % 7], marker="o^sDvP*"[level % 7],
                         label=f"SID tokens, level {level + 1}")
        axes.set(title=path.name, xlabel=f"axis 1: {share[0]:.0%} of the variance",
                 ylabel=f"axis 2: {share[1]:.0%} of the variance")
    figure.suptitle("Embedding rows on their two principal axes")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(pair))


def plot(args: argparse.Namespace, path: Path, items: list[dict]) -> None:
    """Draw what the run's files hold, a PNG per figure, into the folder that --plot names."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        stop(f"--plot draws with matplotlib, which cannot be imported ({error}); pip install matplotlib")
    run, parents = Path(args.run), find_parents(items)
    names = sorted(parents, key=parse_sid_token)
    levels = [parse_sid_token(name)[0] for name in names]
    logs = {p.stem.removesuffix("_log"): [row for row in read_jsonl(p, ("step",)) if "valid_loss" in row]
            for p in sorted(run.glob("*_log.jsonl"))}
    found = [p for p in (*sorted(run.glob("init*.pt")), *sorted(run.glob("align*.pt"))) if "_resume" not in p.stem]
    spaces = {p: read_rows(p, items, names) for p in dict.fromkeys([*found, path])}
    pair = {p: spaces[p] for p in (run / "init.pt", path) if p in spaces}
    for name, draw, *what in (("curves", draw_curves, {name: rows for name, rows in logs.items() if rows}),
                              ("spectra", draw_spectra, spaces, [parents[n] for n in names]),
                              ("cosine", draw_cosine, pair, levels), ("pca", draw_pca, pair, levels)):
        if not what[0]:
            print(f"no validation loss in {run}/*_log.jsonl: no {name}.png")
            continue
        figure, out = Figure(figsize=(8, 5), dpi=150, layout="constrained"), Path(args.plot) / f"{name}.png"
        draw(figure, *what)
        with replacing(out) as temporary:
            figure.savefig(temporary, format="png")
        print(f"wrote {out}")


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/demo", help="folder of the run")
    files.add_argument("--checkpoint", help="instead of RUN/sft.pt")
    files.add_argument("--task", choices=[name for name, task in TASKS.items() if task.source != "users"],
                       help="what is asked, see train.py; default: what the checkpoint was trained to recommend by")
    files.add_argument("--split", choices=("test", "valid"), default="test", help="which samples to rank")
    files.add_argument("--metrics", help="instead of RUN/metrics.jsonl")
    files.add_argument("--predictions", help="instead of RUN/predictions.jsonl")
    search = parser.add_argument_group("search")
    search.add_argument("--num-beams", type=within(int, 1),
                        help="W, SIDs kept per level and returned; default: 20, and 5 for tasks about single items and "
                        "tokens")
    search.add_argument("--normalize", choices=("trie", "level"), default="trie",
                        help="what a level's probabilities sum to one over: a node's children, or all K codes")
    search.add_argument("--candidates", help="recommend only the item_ids in this file ({item_id} lines)")
    search.add_argument("--new-items", choices=("average", "learned"), default="average",
                        help="items that joined by tokenize_items.py --codebook and were never a target in training "
                        "count as their average sibling in the trie, or as the model scores them")
    search.add_argument("--exclude-history", action="store_true",
                        help="never recommend an item of the history; the data repeat items, so figures may drop")
    search.add_argument("--batch-tokens", type=within(int, 1), default=16384,
                        help="prompt tokens per batch, padding included")
    search.add_argument("--limit", type=within(int, 0), default=0, help="only the first so many samples; 0 for all")
    show = parser.add_argument_group("in words and pictures")
    show.add_argument("--show", type=within(int, 0), default=0, help="print so many users' recommendations")
    show.add_argument("--history", help="comma-separated item_ids: print ten recommendations and stop")
    show.add_argument("--plot", metavar="DIR",
                      help="draw the run's losses and embeddings into DIR, four PNGs, and stop; needs matplotlib")
    parser.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda where there is one")
    args = parser.parse_args(argv)
    if args.history and args.task and (TASKS[args.task].source != "samples" or TASKS[args.task].text):
        parser.error(f"--history asks for the next item, --task {args.task} does not")
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


def read_examples(args: argparse.Namespace, items: list[dict]) -> tuple[list[dict], list[str], list[str]]:
    """What the task asks: samples {"user_id", "history", "target"}, instructions, responses."""
    run, known, data = Path(args.run), {item["item_id"] for item in items}, {"items": items}
    source = TASKS[args.task].source
    if args.history:
        data["samples"] = [{"target": items[0]["item_id"], **read_history(args.history, items)}]
    elif source == "samples":
        data["samples"] = read_samples(run / f"{args.split}.jsonl", known)
    elif source == "queries":
        data["queries"] = read_queries(run / "queries.jsonl", known, "test")
    elif source == "tokens":
        data["tokens"] = read_meanings(run / "semantics.jsonl", items)
    rows = task_rows(args.task, data)[:args.limit or None]
    if not rows:
        stop(f"--task {args.task}: this run has no examples of it")
    samples = [row for row, _, _ in rows]
    if args.history:
        del samples[0]["target"]                                        # it was only there for the templates
    if source != "samples":
        who, what = {"items": ("item_id", "item_id"), "queries": ("query", "item_id"), "tokens": ("token",) * 2}[source]
        samples = [{"user_id": str(row[who]), "history": [], "target": row[what]} for row in samples]
    return samples, [i for _, i, _ in rows], [r for _, _, r in rows]


def evaluate_texts(model, tokenizer, prompts: list, responses: list[str], args: argparse.Namespace) -> dict:
    """Decode a text for every prompt and compare it with the response; the figures."""
    most = max(map(len, tokenizer(responses, add_special_tokens=False).input_ids)) + 1
    found: list = [None] * len(prompts)
    model.eval()
    with tqdm(total=len(prompts), desc="decode", unit="text", disable=None) as bar:
        for rows in length_batches(prompts, max(1, args.batch_tokens // 8)):
            beams = decode_texts(model, [prompts[r] for r in rows], args.num_beams, most, tokenizer.eos_token_id)
            for row, texts in zip(rows, beams):
                found[row] = tokenizer.batch_decode(texts)
            bar.update(len(rows))
    for prompt, want, texts in list(zip(prompts, responses, found))[:args.show]:
        print(f"{tokenizer.decode(prompt).strip()}\n   wanted  {want}\n   decoded {texts[0]}")
    return text_metrics(responses, found)


def evaluate_tokens(model, tokenizer, prompts: list, samples: list[dict], args: argparse.Namespace) -> dict:
    """Rank all SID tokens that have a description: a trie of one level."""
    names = sorted({s["target"] for s in samples}, key=parse_sid_token)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(names)], device=model.device)
    trie = build_trie(torch.arange(len(names))[:, None], len(names), model.device)
    found = search_all(model, trie, ids, prompts, args.num_beams, "trie", args.batch_tokens)
    ranks = [rank_of(s["target"], [names[leaf] for leaf, _ in pairs]) for s, pairs in zip(samples, found)]
    return rank_metrics(ranks, tuple(k for k in CUTOFFS if k <= args.num_beams))


def evaluate_items(model, tokenizer, sid: dict, items: list[dict], prompts: list, samples: list[dict], path: Path,
                   args: argparse.Namespace) -> list[dict]:
    """Rank the catalogue for every sample, beside the yardsticks where there are histories; the table's rows."""
    by_id, candidates = {item["item_id"]: item for item in items}, pick_candidates(args.candidates, items)
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(model.device)
    unmet = {*new_items(sid, items)} if args.new_items == "average" else ()
    new = torch.tensor([item["item_id"] in unmet for item in candidates]) if unmet else None
    trie = build_trie(torch.from_numpy(codes_of(candidates)), sid["codebook_size"], model.device, new)
    skip = [set(s["history"]) if args.exclude_history else set() for s in samples]
    row_of = {item["item_id"]: row for row, item in enumerate(candidates)}
    excluded = [[row_of[i] for i in no if i in row_of] for no in skip] if args.exclude_history else None
    start = time.time()
    found = search_all(model, trie, sid_ids, prompts, args.num_beams, args.normalize, args.batch_tokens, excluded)
    seconds = time.time() - start
    ranked, scores, ranked_sids = name_items(trie, candidates, found, skip)
    semantics = Path(args.run) / "semantics.jsonl"
    meaning = {r["token"]: r["keywords"] for r in read_jsonl(semantics, ("token", "keywords"))} \
        if semantics.exists() else {}
    for sample, r, s in list(zip(samples, ranked, scores))[:1 if args.history else args.show]:
        show_user(sample, r, s, by_id, meaning)
    if args.history:
        return []
    targets = [s["target"] for s in samples]
    lists = []
    if TASKS[args.task].source == "samples":
        train = read_samples(Path(args.run) / "train.jsonl", set(by_id))
        lists = [(name, "item", targets, rankings, 0.0)
                 for name, rankings in yardsticks(train, samples, candidates, skip, args.num_beams).items()]
    lists.append((path.name, "item", targets, ranked, seconds))
    if len(trie.leaf_start) - 1 < len(candidates):
        lists.append((path.name, "sid", [tuple(by_id[t]["sid"]) for t in targets], ranked_sids, seconds))
    print(f"{len(samples)} examples of {args.task} | {len(candidates)} items | {args.num_beams} beams | "
          f"device {model.device} | {seconds:.1f} s, {len(samples) / seconds:.0f} per second")
    predictions = Path(args.predictions or Path(args.run) / "predictions.jsonl")
    write_jsonl(predictions, [{"user_id": s["user_id"], "target": s["target"], "items": r, "scores": sc}
                              for s, r, sc in zip(samples, ranked, scores)])
    print(f"wrote {predictions}")
    cutoffs = tuple(k for k in CUTOFFS if k <= args.num_beams)
    return [{"method": method, "level": level, "seconds": round(took, 2),
             **rank_metrics([rank_of(t, r) for t, r in zip(wanted, lists_)], cutoffs)}
            for method, level, wanted, lists_, took in lists]


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    items = read_catalogue(Path(args.run) / "items.jsonl")
    path = Path(args.checkpoint or Path(args.run) / "sft.pt")
    if args.plot:
        return plot(args, path, items)
    model, tokenizer, checkpoint = load_model(path, device, items)
    if device.type == "cuda":
        to_bfloat16(model)                                              # scores are still computed in float32
    args.task = args.task or recommends_by(checkpoint["args"])
    task = TASKS[args.task]
    args.num_beams = args.num_beams or (20 if task.source in ("samples", "queries") else 5)
    samples, instructions, responses = read_examples(args, items)
    prompts = prompt_ids(tokenizer, instructions)
    check_lengths(max(map(len, prompts)) + checkpoint["sid"]["num_levels"] - 1, model, "shorten the histories")
    metrics = Path(args.metrics or Path(args.run) / "metrics.jsonl")
    check_output(metrics)

    start = time.time()
    if task.text:
        rows = [{"level": "text", **evaluate_texts(model, tokenizer, prompts, responses, args)}]
    elif task.source == "tokens":
        rows = [{"level": "token", **evaluate_tokens(model, tokenizer, prompts, samples, args)}]
    else:
        rows = evaluate_items(model, tokenizer, checkpoint["sid"], items, prompts, samples, path, args)
    if args.history:
        return
    base = {"method": path.name, "task": args.task, "split": args.split if task.source == "samples" else "test",
            "n": len(samples), "num_beams": args.num_beams, "normalize": args.normalize,
            "exclude_history": args.exclude_history, "candidates": args.candidates, "new_items": args.new_items,
            "seconds": round(time.time() - start, 2)}
    print_table(rows := [{**base, **row} for row in rows])
    with open(metrics, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {metrics}")


if __name__ == "__main__":
    main()
