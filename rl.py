"""Stage 5: reinforcement learning on the trie (GRPO), from the SFT model, on the recommendation tasks.

For each prompt x the policy pi names a group of G SIDs y through the trie; rewards r are compared within the group:

    advantage    A_i = (r_i - m) / (s + 1e-4)          m, s: the group's weighted mean and deviation
    objective    J = sum_i w_i 1/L sum_l [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta k3 ]
                 rho = pi / pi_old of one token        k3 = pi_ref / pi - 1 - log(pi_ref / pi), its gradient, averaged
                                                       over pi, is that of KL(pi_ref || pi)
    TS-Rec (arXiv 2602.22632), section 5.4; GRPO: DeepSeekMath (arXiv 2402.03300), eqs. 3-4; recipe of MiniOneRec

Reads   RUN/sft.pt, RUN/items.jsonl, RUN/train.jsonl, RUN/valid.jsonl (only to validate), RUN/codebook.pt (only for
        the reward `semantic`)
Writes  RUN/rl.pt (the weights with the best validation NDCG@10, the SFT model's included), RUN/rl_log.jsonl; while
        it runs, RUN/rl_resume.pt

Differs from the paper and from MiniOneRec
  1. Probabilities are over the trie's children at each level, in rollouts and update alike, so that the policy that
     learns is the one that was drawn from; all three tokens count, SIDs have no end token.
  2. The prompt is read once for its group: drafts are query positions of one sequence under a tree mask.
  3. The group is MiniOneRec's beams; `--rollout sample` draws distinct SIDs without replacement. With `--weights
     policy` each counts by its probability over its chance to be in the group, so that the group's mean estimates
     the policy's own; with `group`, GRPO's, each counts 1/G, which presses on whatever the group holds.
  4. A group without differences in reward is dropped from both terms and costs no forward pass; it still counts in
     the batch's mean. Deviations are the population's, MiniOneRec's the sample's.
  5. The reference stays the SFT model. Dropout is off. The best model by validation is kept, not the last.

Examples
  python rl.py                                                     # the demo
  python rl.py --reward hit:1,rank:1                               # MiniOneRec's reward
  torchrun --nproc-per-node 8 -- rl.py --run runs/qwen             # Qwen2.5-1.5B, the same update as on one GPU
"""
import argparse
import copy
import hashlib
import os
import random
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from tqdm import tqdm

from evaluate import (Trie, beam_search, build_trie, expand, name_items, prefill, rank_metrics, rank_of, search_all,
                      tree_mask)
from init_embeddings import autocast, load_model, save_model, sid_token_ids
from tokenize_items import (SEED, check_output, codes_of, load_pt, read_catalogue, read_samples, stop, within,
                            write_jsonl)
from train import (TASKS, Progress, ResponseLoss, all_sum, check_lengths, data_digest, join_processes,
                   learning_rate, length_batches, on_interrupt, parse_weights, prompt_ids, read_data,
                   recommends_by, resume, save_progress, task_pairs)

# Letters used in shapes: B prompts, T prompt tokens, G rollouts of a prompt, L levels, K codes per level, M most
# children of a node, N items, D width.
REWARDS = ("hit", "rank", "prefix", "semantic")
CUTOFFS = (1, 5, 10, 50)                # of the validation; 50 beams
GAUGED = ["HR@1", "HR@5", "HR@10", "HR@50", "NDCG@10"]

# Settings that depend on the backbone, in one place. "hf" is MiniOneRec's script.
PRESETS = {
    "hf": dict(epochs=2, lr=1e-5, batch_size=64, warmup=50, clip=0.3, eval_every=100, micro_tokens=4096),
    "tiny": dict(epochs=1, lr=3e-5, batch_size=64, warmup=5, clip=1.0, eval_every=30, micro_tokens=4096),
}


# ---------------------------------------------------------------------------------------------------------
# Rewards: each (B, G), from the leaves drawn and the target's leaf
# ---------------------------------------------------------------------------------------------------------

def hit_reward(leaves: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 for the target's SID, else 0; (B, G), (B,) -> (B, G)."""
    return (leaves == targets[:, None]).float()


def rank_penalty(hits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """MiniOneRec's ranking-aware penalty; hits, scores (B, G) -> (B, G).

    In a group with a hit, a miss costs in proportion to 1 / log2(rank + 1), rank 1 being what the policy holds most
    likely in the group; the whole list's costs sum to one. Elsewhere, and for the hit, nothing.
    """
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    cost = 1 / torch.log2(rank + 1.0)
    return -cost / cost.sum(1, keepdim=True) * (1 - hits) * hits.amax(1, keepdim=True)


def prefix_reward(codes: torch.Tensor, leaves: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Share of the target's SID that a rollout shares from the left; codes (leaves, L) -> (B, G)."""
    same = codes[leaves] == codes[targets][:, None]
    return same.int().cumprod(-1).float().mean(-1)


def semantic_reward(vectors: torch.Tensor, leaves: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cosine, where positive, of the quantised embeddings (sums of centroids); vectors (leaves, D) -> (B, G).

    The paper's future work, a signal where no rollout hits. It can be hacked, and so can `prefix`: an item amid a
    crowd of similar ones earns a little from every target nearby, so a large weight teaches to recommend the middle
    of the crowd. Watch HR@1 on validation, keep the weight well below that of `hit`.
    """
    unit = F.normalize(vectors, dim=-1)
    return torch.einsum("bgd,bd->bg", unit[leaves], unit[targets]).clamp_min(0)


class Shop(NamedTuple):
    """What rollouts, rewards and validation know of the catalogue, on the model's device."""
    trie: Trie
    sid_ids: torch.Tensor               # (L, K) vocabulary ids
    items: list[dict]
    codes: torch.Tensor                 # (leaves, L)
    vectors: torch.Tensor | None        # (leaves, D), for the reward `semantic`


def group_rewards(shop: Shop, mix: dict[str, float], leaves: torch.Tensor, scores: torch.Tensor,
                  targets: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the rewards in the mix; leaves, scores (B, G), targets (B,) -> (B, G)."""
    hits = hit_reward(leaves, targets)
    rewards = {"hit": lambda: hits, "rank": lambda: rank_penalty(hits, scores),
               "prefix": lambda: prefix_reward(shop.codes, leaves, targets),
               "semantic": lambda: semantic_reward(shop.vectors, leaves, targets)}
    return sum(weight * rewards[name]() for name, weight in mix.items())


# ---------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------

def policy_weights(scores: torch.Tensor, perturbed: torch.Tensor | None) -> torch.Tensor:
    """Weights (B, G), rows summing to one, that make a sum over the group estimate a mean over the policy.

    For draws without replacement, probability over inclusion probability given the last draw, which is only the
    threshold (Kool et al. 2019, arXiv 1903.06059, section 4.2). For beams, which nobody drew, the probabilities.
    """
    if perturbed is None:
        return scores.softmax(1)
    weights = scores.exp() / -torch.expm1(-torch.exp(scores - perturbed[:, -1:]))
    weights[:, -1] = 0
    return weights / weights.sum(1, keepdim=True)


def advantages(rewards: torch.Tensor, weights: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards less the group's mean, over its deviation unless `mean-only` (Dr. GRPO, arXiv 2503.20783).

    rewards, weights (B, G) -> advantages (B, G), deviations (B,). The deviation is the population's: a group of one
    or of equal rewards gives zeros.
    """
    away = rewards - (weights * rewards).sum(1, keepdim=True)
    deviation = (weights * away.square()).sum(1).sqrt()
    return (away if kind == "mean-only" else away / (deviation[:, None] + 1e-4)), deviation


def k3(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """Schulman's estimator of the divergence from the reference: never negative, 0 where the two agree."""
    gap = ref_log_probs - log_probs
    return torch.expm1(gap) - gap


def policy_loss(log_probs: torch.Tensor, old_log_probs: torch.Tensor, ref_log_probs: torch.Tensor,
                advantage: torch.Tensor, weights: torch.Tensor, clip_eps: float, kl_coef: float
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-J of each group, its KL and the share of its tokens held by the clip; log-probs (B, G, L) -> three (B,).

    Ratio, clip and KL are per token; a token counts 1/L of its rollout, a rollout its weight in the group.
    """
    ratio, a = torch.exp(log_probs - old_log_probs), advantage[..., None]
    held = torch.minimum(ratio * a, ratio.clamp(1 - clip_eps, 1 + clip_eps) * a)
    kl = k3(log_probs, ref_log_probs)

    def group(x: torch.Tensor) -> torch.Tensor:
        return (x.mean(-1) * weights).sum(-1)
    return group(kl_coef * kl - held), group(kl.detach()), group((held < ratio * a).float())


# ---------------------------------------------------------------------------------------------------------
# One forward for a group
# ---------------------------------------------------------------------------------------------------------

def trie_paths(trie: Trie, leaves: torch.Tensor) -> list[torch.Tensor]:
    """The nodes from depth 1 down to each leaf; (B, G) -> L times (B, G)."""
    path = [leaves]
    for first_child in trie.first_child[:0:-1]:                 # parents hold ranges of children: find the range
        path.insert(0, torch.searchsorted(first_child, path[0].to(first_child.dtype), right=True) - 1)
    return path


def tree_log_probs(model, trie: Trie, sid_ids: torch.Tensor, prompts: list[list[int]], leaves: torch.Tensor,
                   temperature: float = 1.0, precision: str = "auto") -> torch.Tensor:
    """Log-probability of every token of every rollout among the trie's children, with gradients; (B, G) -> (B, G, L).

    Two passes: the prompts (B, T) under plain causal attention, then all drafts but the last level's, (B, G * (L-1)),
    against the prompts' keys and values, which are held once per prompt. Equal to repeating each prompt G times.
    """
    device, (batch, group), depth = trie.codes[0].device, leaves.shape, len(trie.codes) - 1
    path = trie_paths(trie, leaves)
    drafts = torch.cat([sid_ids[level][trie.codes[level][path[level]]] for level in range(depth)], 1)
    at = torch.arange(depth, device=device).repeat_interleave(group)                         # level of each draft
    own = torch.arange(group, device=device).repeat(depth)                                   # and its rollout
    ancestors = [torch.where(at >= level, own, -1).expand(batch, -1) for level in range(depth)]     # -1: none
    cache, lengths, last = prefill(model, prompts, precision)
    with autocast(device, precision):
        hidden = model.base_model(
            input_ids=drafts, past_key_values=cache, use_cache=True,
            attention_mask=tree_mask(lengths, max(map(len, prompts)), ancestors, [group] * depth),
            position_ids=lengths[:, None] + at).last_hidden_state                            # (B, G * (L-1), D)
    rows, log_probs = model.get_output_embeddings().weight[sid_ids].float(), []              # (L, K, D)
    for level, seen in enumerate((last, *hidden.split(group, 1))):
        parents = path[level - 1] if level else torch.zeros_like(leaves[:, :1])
        logits = seen.float() @ rows[level].T / temperature                                  # (B, 1 or G, K)
        _, gains = expand(trie, level, parents, torch.zeros_like(parents, dtype=torch.float), logits, "trie")
        slot = path[level] - trie.first_child[level][parents]
        log_probs.append(gains.expand(-1, group, -1).gather(-1, slot[..., None]).squeeze(-1))
    return torch.stack(log_probs, -1)


# ---------------------------------------------------------------------------------------------------------
# Rollouts and updates
# ---------------------------------------------------------------------------------------------------------

class Example(NamedTuple):
    """A prompt and the leaf of its own target."""
    prompt: list[int]
    target: int


class Group(NamedTuple):
    """A prompt's rollouts as the update needs them."""
    prompt: list[int]
    leaves: torch.Tensor                # (G,)
    advantage: torch.Tensor             # (G,)
    weights: torch.Tensor               # (G,)


def pieces_of(prompts: list[list[int]], drafts: int, micro_tokens: int) -> list[list[int]]:
    """Rows of prompts that fit one forward pass with `drafts` more tokens each."""
    return length_batches([range(len(p) + drafts) for p in prompts], micro_tokens) if prompts else []


def roll_out(model, shop: Shop, batch: list[Example], noise: torch.Generator, args: argparse.Namespace
             ) -> tuple[list[Group], torch.Tensor]:
    """Draw a group for each prompt and judge it; the groups whose rewards differ, and the sums behind the gauges.

    Sums (float64): groups, those dropped, hits, distinct SIDs, entropy, reward per rollout and its square.
    """
    groups, sums = [], torch.zeros(7, dtype=torch.float64, device=shop.sid_ids.device)
    for rows in pieces_of([e.prompt for e in batch], args.group_size, args.micro_tokens):
        prompts = [batch[r].prompt for r in rows]
        targets = torch.tensor([batch[r].target for r in rows], device=shop.sid_ids.device)
        leaves, scores, *perturbed = beam_search(
            model, shop.trie, shop.sid_ids, prompts, args.group_size, temperature=args.temperature,
            sample=noise if args.rollout == "sample" else None)
        rewards = group_rewards(shop, args.reward, leaves, scores, targets)
        policy = policy_weights(scores, *perturbed or (None,))
        weights = policy if args.weights == "policy" else torch.full_like(policy, 1 / policy.shape[1])
        advantage, deviation = advantages(rewards, weights, args.advantage)
        varied = deviation > 1e-6
        distinct = 1 + (leaves.sort(1).values.diff(dim=1) > 0).sum(1)
        per_group = (torch.ones_like(targets), ~varied, (leaves == targets[:, None]).any(1), distinct,
                     -(policy * scores).sum(1), rewards.mean(1), rewards.square().mean(1))
        sums += torch.stack([x.double().sum() for x in per_group])
        groups += [Group(prompts[i], leaves[i], advantage[i], weights[i]) for i in varied.nonzero()[:, 0].tolist()]
    return groups, sums


def update(model, reference, optimizer, shop: Shop, groups: list[Group], total: int, args: argparse.Namespace
           ) -> torch.Tensor:
    """The optimizer steps on one batch of rollouts, `total` groups over all processes; sums behind the gauges.

    The log-probs before the first step are the old ones: the same arithmetic, so that ratios start at exactly 1.
    Sums (float64): KL and clipped share over groups and steps, gradient norm over steps.
    """
    device, levels = shop.sid_ids.device, len(shop.sid_ids)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    if all_sum(torch.tensor(len(groups), device=device)) == 0:
        return sums
    pieces = [[groups[r] for r in rows] for rows in pieces_of(
        [g.prompt for g in groups], (levels - 1) * args.group_size, args.micro_tokens)]
    before: list = []
    for step in range(args.updates_per_rollout):
        optimizer.zero_grad(set_to_none=True)
        for place, piece in enumerate(pieces):
            prompts, (leaves, advantage, weights) = [g.prompt for g in piece], map(torch.stack, list(zip(*piece))[1:])
            how = (shop.trie, shop.sid_ids, prompts, leaves, args.temperature, args.precision)
            log_probs = tree_log_probs(model, *how)
            if step == 0:
                with torch.no_grad():
                    before.append((log_probs.detach(), tree_log_probs(reference, *how)))
            loss, kl, clipped = policy_loss(log_probs, *before[place], advantage, weights, args.clip_eps, args.kl_coef)
            (loss.sum() / total).backward()
            sums[:2] += torch.stack([kl.sum(), clipped.sum()]) / args.updates_per_rollout
        for p in model.parameters():                                    # one batch, however many processes share it
            p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        sums[2] += norm / args.updates_per_rollout
    return sums


def batch_rows(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The prompts of an update: each epoch its own shuffle, what is left over at its end is left out."""
    per_epoch = max(1, count // batch_size)
    order = random.Random(f"{seed} {step // per_epoch}").sample(range(count), count)
    return order[step % per_epoch * batch_size:][:batch_size]


# ---------------------------------------------------------------------------------------------------------
# Validation and the loop
# ---------------------------------------------------------------------------------------------------------

def validate(model, shop: Shop, prompts: list[list[int]], targets: list, args: argparse.Namespace) -> dict[str, float]:
    """HR@K and NDCG@K of the next item over all processes' users, by the search of evaluate.py."""
    found = search_all(model, shop.trie, shop.sid_ids, prompts, max(CUTOFFS), "trie", args.micro_tokens)
    ranked, _, _ = name_items(shop.trie, shop.items, found, [set()] * len(found))
    metrics = rank_metrics([rank_of(target, row) for target, row in zip(targets, ranked)], CUTOFFS)
    sums = all_sum(torch.tensor([1.0, *metrics.values()], device=model.device).double() * len(found))
    return dict(zip(metrics, (sums[1:] / sums[0]).tolist()))


def gauges(sums: torch.Tensor, group_size: int) -> dict[str, float]:
    """What the sums of some steps say: roll_out's and update's, their number, and the seconds they took."""
    groups, dropped, hits, distinct, entropy, reward, square, kl, clipped, norm, steps, seconds = sums.tolist()
    kept = max(groups - dropped, 1)
    return {"reward": reward / groups, "reward_std": max(square / groups - (reward / groups) ** 2, 0) ** 0.5,
            f"hit@{group_size}": hits / groups, "zero_variance": dropped / groups, "unique": distinct / groups,
            "entropy": entropy / groups, "kl": kl / kept, "clipped": clipped / kept, "grad_norm": norm / steps,
            "prompts_per_second": groups / seconds, "rollouts_per_second": groups * group_size / seconds}


def show(row: dict, names: list[str] | None = None) -> str:
    """A row of the log as one line."""
    return " | ".join(f"{name} {row[name]:.4g}" for name in names or row)


def fit(model, reference, optimizer, shop: Shop, train: list[Example], at: Progress, look: Callable[[], dict],
        save: Callable[[dict | None], None], args: argparse.Namespace) -> bool:
    """The loop: rollouts, update, gauges, validation; False if interrupted before its end.

    `look()` validates; `save(row)` keeps the run's progress and, given a row of the log, the weights as the best.
    """
    device, interrupted, steps = model.device, on_interrupt(), args.epochs * max(1, len(train) // args.batch_size)
    noise, at.sums = torch.Generator(device), at.sums.to(device)
    bar = tqdm(total=steps, initial=at.step, desc="rl", unit="step", disable=args.rank > 0 or None)
    while at.step < steps and at.bad < args.patience:
        start = time.time()
        noise.manual_seed((args.seed << 32) + at.step * args.world + args.rank)      # a resumed run draws the same
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(at.step, steps, args)
        rows = batch_rows(len(train), args.batch_size, at.step, args.seed)
        mine = [train[r] for r in rows[args.rank::args.world]]
        groups, drawn = roll_out(model, shop, mine, noise, args)
        learnt = update(model, reference, optimizer, shop, groups, len(rows), args)
        if not learnt.isfinite().all():
            stop(f"the gradient of step {at.step + 1} is no number; choose a lower --lr")
        took = torch.tensor([1, time.time() - start], device=device)
        at.sums += torch.cat([drawn, learnt[:2], torch.cat([learnt[2:], took]) / args.world])  # all saw the same norm
        at.step, row, better = at.step + 1, {"step": at.step + 1}, False
        bar.update()
        if at.step % args.log_every == 0 or at.step == steps:
            row |= {"lr": optimizer.param_groups[0]["lr"], **gauges(all_sum(at.sums.clone()), args.group_size)}
            at.sums.zero_()
            bar.write(show(row))
        if at.step % args.eval_every == 0 or at.step == steps:
            row |= look()
            better = row["NDCG@10"] > at.best
            at.best, at.bad = (row["NDCG@10"], 0) if better else (at.best, at.bad + 1)
            bar.write(f"step {at.step}/{steps} | valid {show(row, GAUGED)}"
                      + (" | best so far, saved" if better else f" | no better for {at.bad}"))
        if len(row) > 1:
            at.log.append(row)
        leave = interrupted(device)
        if leave or "NDCG@10" in row:
            save(row if better else None)
        if leave and at.step < steps:
            return False
    bar.close()
    return True


# ---------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------

def make_shop(items: list[dict], tokenizer, sid: dict, codebook: str | Path | None, device: torch.device) -> Shop:
    """The trie of the catalogue, each leaf's codes and, given a codebook, the sum of its centroids."""
    trie = build_trie(torch.from_numpy(codes_of(items)), sid["codebook_size"], device)
    path = trie_paths(trie, torch.arange(len(trie.codes[-1]), device=device))
    codes = torch.stack([level[nodes] for level, nodes in zip(trie.codes, path)], -1).long()
    vectors = None
    if codebook:
        centroids = load_pt(codebook, ("centroids",))["centroids"].to(device)
        if centroids.shape[0] != codes.shape[1] or centroids.shape[1] <= int(codes.max()):
            stop(f"{codebook}: {tuple(centroids.shape[:2])} levels and codes are not this catalogue's; run "
                 "tokenize_items.py again, or leave out the reward semantic")
        vectors = sum(book[codes[:, level]] for level, book in enumerate(centroids))
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(device)
    return Shop(trie, sid_ids, items, codes, vectors)


def read_prompts(tokenizer, tasks: list[str], data: dict, trie: Trie) -> list[Example]:
    """Every example of the tasks, each with the leaf of its own target."""
    order = trie.leaf_items[trie.leaf_start[:-1]].tolist()              # one catalogue row per leaf
    leaf_of = {"".join(data["items"][row]["sid"]): leaf for leaf, row in enumerate(order)}
    examples = []
    for name in tasks:
        pairs = task_pairs(name, data)
        if not pairs:
            stop(f"--tasks: {name} has no examples in this run; leave it out")
        prompts = prompt_ids(tokenizer, [prompt for prompt, _ in pairs])
        print(f"task {name:>16} | {len(pairs)} prompts | {pairs[0][0]!r} >>{pairs[0][1]}<<")
        examples += [Example(prompt, leaf_of[sid]) for prompt, (_, sid) in zip(prompts, pairs)]
    return examples


def read_valid(tokenizer, items: list[dict], args: argparse.Namespace) -> tuple[list[list[int]], list]:
    """Prompts and targets of this process's share of the validation users, at most --eval-users in all."""
    samples = read_samples(Path(args.run) / "valid.jsonl", {item["item_id"] for item in items})
    if 0 < args.eval_users < len(samples):
        samples = random.Random(args.seed).sample(samples, args.eval_users)
    samples = samples[args.rank::args.world]
    pairs = task_pairs(args.recommends, {"items": items, "samples": samples})
    return prompt_ids(tokenizer, [prompt for prompt, _ in pairs]), [s["target"] for s in samples]


def parse_rewards(text: str) -> dict[str, float]:
    """Rewards and their weights in the mix: "hit:1,rank,semantic:0.1"."""
    return parse_weights(text, REWARDS, "reward")


def parse_sid_tasks(text: str) -> str:
    """Check names of tasks whose response is an item's SID."""
    known = [name for name, task in TASKS.items() if task.response == "{sid}"]
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} does not ask for an item's SID; choose from {', '.join(known)}")
    return text


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/demo", help="folder of the run")
    files.add_argument("--from", dest="start", help="checkpoint to start from, instead of RUN/sft.pt")
    files.add_argument("--out", help="instead of RUN/rl.pt")
    files.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same flags stopped")
    method = parser.add_argument_group("method")
    method.add_argument("--tasks", type=parse_sid_tasks,
                        help="prompts, tasks that ask for a SID; default: what the checkpoint recommends by")
    method.add_argument("--reward", type=parse_rewards, default="hit:1", help=f"mix of {', '.join(REWARDS)}")
    method.add_argument("--rollout", choices=("beam", "sample"), default="beam",
                        help="G distinct SIDs: the best beams, or drawn without replacement")
    method.add_argument("--group-size", type=within(int, 2), default=16, help="G, rollouts per prompt")
    method.add_argument("--temperature", type=within(float, 1e-6), default=1.0,
                        help="of the policy that draws and learns")
    method.add_argument("--weights", choices=("policy", "group"), default="group",
                        help="a rollout counts by the policy's probability (see above), or 1/G")
    method.add_argument("--advantage", choices=("std", "mean-only"), default="std", help="over the deviation or not")
    method.add_argument("--kl-coef", type=within(float, 0), default=1e-3, help="weight of the KL to the SFT model")
    method.add_argument("--clip-eps", type=within(float, 1e-6, 1), default=0.2,
                        help="ratios beyond 1 -+ this earn nothing more")
    method.add_argument("--updates-per-rollout", type=within(int, 1), default=1,
                        help="optimizer steps per batch; 1: on-policy")
    preset = parser.add_argument_group("by backbone (see PRESETS)")
    preset.add_argument("--epochs", type=within(int, 1), help="passes over the prompts")
    preset.add_argument("--lr", type=within(float, 0), help="peak learning rate")
    preset.add_argument("--batch-size", type=within(int, 1), help="prompts per update, over all processes")
    preset.add_argument("--warmup", type=within(int, 0), help="updates of linear warm-up")
    preset.add_argument("--clip", type=within(float, 0), help="largest gradient norm")
    preset.add_argument("--eval-every", type=within(int, 1), help="updates between validations")
    preset.add_argument("--micro-tokens", type=within(int, 1),
                        help="tokens per forward pass, padding included: memory only")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--precision", choices=("fast", "float32", "bfloat16"), default="fast",
                      help="of the update, over float32 weights; fast: bf16 on CUDA and on CPUs that have it")
    loop.add_argument("--patience", type=within(int, 1), default=5,
                      help="stop after so many validations without a better NDCG@10")
    loop.add_argument("--eval-users", type=within(int, 0), default=0, help="validate on so many users; 0 for all")
    loop.add_argument("--log-every", type=within(int, 1), default=10, help="updates per log line")
    loop.add_argument("--seed", type=SEED, default=42,
                      help="seed of the order of prompts and of the draws")
    loop.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda where there is one")
    args = parser.parse_args(argv)
    if args.rollout == "sample" and args.weights == "policy" and args.group_size < 3:
        parser.error("--weights policy spends the last draw on a threshold: --group-size must be at least 3")
    return args


def finish(at: Progress, origin: str, out: Path) -> None:
    """Print the start against the best validation, and what the checkpoint holds."""
    best = next(row for row in at.log if row.get("NDCG@10") == at.best)
    for name, row in ((origin, at.log[0]), (out.name, best)):
        print(f"valid | {name:<12} | {show(row, GAUGED)}")
    print(f"wrote {out}: " + (f"step {best['step']}" if best["step"] else
                              f"no step has a better validation NDCG@10, these are the weights of {origin}"))


def main() -> None:
    args = parse_args()
    device, args.rank, args.world = join_processes(args.device)
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")      # its CPU backward is slow on short prompts
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # else gigabytes of kernels, one per shape
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    origin = Path(args.start or run / "sft.pt")
    model, tokenizer, checkpoint = load_model(origin, device, items)
    sid, args.backbone = checkpoint["sid"], checkpoint["args"].get("backbone")
    for key, value in PRESETS["tiny" if args.backbone == "tiny" else "hf"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    shop = make_shop(items, tokenizer, sid, run / "codebook.pt" if "semantic" in args.reward else None, device)
    args.recommends = recommends_by(checkpoint["args"])                 # by this it validates, whatever the prompts
    args.tasks = args.tasks or args.recommends
    args.data = data_digest(run)                                        # --resume goes on with no other,
    args.reference = hashlib.sha256(model.get_input_embeddings().weight[shop.sid_ids].detach().cpu().numpy().tobytes()
                                    ).hexdigest()[:16]                  # nor from another start
    names = args.tasks.split(",")
    train = read_prompts(tokenizer, names, read_data(run, items, names), shop.trie)
    prompts, targets = read_valid(tokenizer, items, args)
    longest = max(map(len, [*prompts, *(e.prompt for e in train)]))
    check_lengths(longest + sid["num_levels"] - 1, model, "lower --max-history in stage 1")

    model.eval()                                                        # no dropout: ratios start at one
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=device.type == "cuda")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"device {device} x {args.world} | {size:.2f} M parameters, twice | lr {args.lr} | "
          f"{len(train)} prompts, {len(prompts)} validation users a process | {args.epochs} epochs of "
          f"{max(1, len(train) // args.batch_size)} updates of {args.batch_size} x {args.group_size} rollouts")
    out = Path(args.out or run / "rl.pt")
    check_output(out)
    log_path, resume_path = (out.with_name(out.stem + tail) for tail in ("_log.jsonl", "_resume.pt"))

    def look() -> dict[str, float]:
        return validate(model, shop, prompts, targets, args)

    def keep(row: dict) -> None:
        if args.rank == 0:
            save_model(out, model, tokenizer, sid, stage="rl", args=vars(args), step=row["step"], metrics=row)

    def save(best: dict | None) -> None:
        if best:
            keep(best)
        if args.rank == 0:
            write_jsonl(log_path, at.log)
        state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        save_progress(resume_path, state, at, args)

    if args.resume and resume_path.exists():
        at = resume(resume_path, ResponseLoss(model), optimizer, args)
        print(f"going on after update {at.step}")
    else:
        if args.resume:
            print(f"no {resume_path}: starting from the beginning")
        first = {"step": 0, **look()}
        at = Progress(best=first["NDCG@10"], sums=torch.zeros(12, dtype=torch.float64), log=[first])
        print(f"the start | valid {show(first, GAUGED)}")
        keep(first)                                     # get_state_dict would count a step that AdamW never made
    finished = fit(model, reference, optimizer, shop, train, at, look, save, args)
    if finished:
        finish(at, origin.name, out)
        resume_path.unlink(missing_ok=True)
    else:
        print(f"stopped after update {at.step}: go on with --resume")
    if args.world > 1:
        dist.barrier()                                  # see train.py
        dist.destroy_process_group()
    if not finished:
        sys.exit(130)


if __name__ == "__main__":
    main()
