"""Stage 5: reinforcement learning on the trie (GRPO), from the SFT model.

For each prompt x the policy pi proposes a group of G SIDs y. Their rewards r are compared within the group:

    advantage    A_i = (r_i - mean r) / (std r + 1e-4)
    objective    J = 1/G sum_i 1/L sum_l [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta k3 ]
                 rho = pi / pi_old of one token
                 k3 = pi_ref / pi - 1 - log(pi_ref / pi) estimates the KL divergence from the SFT model
    TS-Rec (arXiv 2602.22632), section 5.4; DeepSeekMath (arXiv 2402.03300), eqs. 3-4; MiniOneRec

Reads   RUN/sft.pt (or --from), items.jsonl, train.jsonl, valid.jsonl (only to validate)
Writes  RUN/rl.pt (the weights with the best validation NDCG@10, the SFT model's included), rl_log.jsonl;
        rl_resume.pt with each new best and after Ctrl-C

Differs from the paper and from MiniOneRec
  1. Probabilities are over the trie's children at each level, in rollouts and in the update.
  2. The group is MiniOneRec's beams. `--rollout sample` draws distinct SIDs without replacement.
  3. A group with equal rewards is dropped from both terms. It still counts in the batch's mean.
  4. Prompts: next item only. std is biased. The reference stays the SFT model. No dropout.

Examples
  python rl.py --reward hit:1,rank:1  # MiniOneRec's reward
"""
import argparse
import copy
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from evaluate import SID_TASKS, beam_search, prefill, rank_metrics, rank_of, read_tokens, search_all
from init_embeddings import (
    Trie, build_trie, catch_interrupts, check_lengths, count_parameters, fingerprint, join_processes,
    leaf_of_items, learning_rate, leave_processes, length_batches, load_model, load_progress, new_items,
    output_paths, path_log_probs, read_in_bf16, save_model, save_progress, sid_token_ids, sum_gradients,
    sum_over_processes, trie_paths, update_sid)
from tokenize_items import (
    codes_of, make_parser, number, read_catalogue, read_samples, stop, write_jsonl)
from train import make_pairs, parse_weights, prompt_ids, read_data

# Shapes: B prompts, T prompt tokens, G rollouts, L levels, K codes, M most children, D width.
REWARDS = ("hit", "rank", "prefix")
VALID_BEAMS, VALID_TOKENS, VALID_CUTOFFS = 50, 16384, (1, 5, 10, 50)
SHOWN = ("HR@1", "HR@5", "HR@10", "HR@50", "NDCG@10")

# Settings by backbone. "hf" is MiniOneRec's script.
PRESETS = {
    "hf": dict(epochs=2, lr=1e-5, batch_size=64, warmup=50, max_grad_norm=0.3, eval_every=100),
    "tiny": dict(epochs=1, lr=3e-5, batch_size=64, warmup=5, max_grad_norm=1.0, eval_every=30),
}

class Catalogue(NamedTuple):
    """What rollouts, rewards and validation know of the items."""
    trie: Trie
    sid_ids: Tensor  # (L, K) vocabulary ids
    codes: Tensor    # (leaves, L)
    item_ids: list

# ---- Rewards, from the leaves of rollouts (B, G) and of targets (B,) ----
def rank_penalty(hits: Tensor, scores: Tensor) -> Tensor:
    """MiniOneRec's ranking-aware penalty; hits, scores (B, G) -> (B, G).

    In a group with a hit, a miss gets -c(rank) / sum of c, where c = 1 / log2(rank + 1) and rank 1 is the
    policy's most likely. The hit, and groups without one, get 0.
    """
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    cost = 1 / torch.log2(rank + 1.0)
    return -cost / cost.sum(1, keepdim=True) * (1 - hits) * hits.amax(1, keepdim=True)

def group_rewards(mix: dict, codes: Tensor, leaves: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
    """The weighted sum of the rewards in the mix; codes (leaves, L).

    hit: 1 for the target's SID. prefix: the share of the target's SID that a rollout begins with.
    """
    hits = (leaves == targets[:, None]).float()
    same = codes[leaves] == codes[targets][:, None]  # (B, G, L)
    prefix = same.int().cumprod(-1).float().mean(-1)
    rewards = {"hit": hits, "rank": rank_penalty(hits, scores), "prefix": prefix}
    return sum(weight * rewards[name] for name, weight in mix.items())

# ---- The objective -----------------------------
def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards less the group's mean, over its deviation; (B, G). Equal rewards give 0."""
    away = rewards - rewards.mean(1, keepdim=True)
    return away / (rewards.std(1, keepdim=True, unbiased=False) + 1e-4)

def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's estimator of the KL: never negative, 0 where policy and reference agree."""
    gap = ref_log_probs - log_probs
    return torch.expm1(gap) - gap

def policy_loss(log_probs: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor, advantages: Tensor,
                clip_eps: float, kl_coef: float) -> dict[str, Tensor]:
    """-J, KL and share of clipped tokens of each group; (B, G, L), advantages (B, G) -> (B,)."""
    ratio, advantages = torch.exp(log_probs - old_log_probs), advantages[..., None]
    clipped = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    kl = k3(log_probs, ref_log_probs)
    return {"loss": (kl_coef * kl - clipped).mean((1, 2)), "kl": kl.detach().mean((1, 2)),
            "clipped": (clipped < ratio * advantages).float().mean((1, 2))}

# ---- One forward pass for a group --------------
def tree_log_probs(model, catalogue: Catalogue, prompts: list[list[int]], leaves: Tensor,
                   precision: str = "cuda") -> Tensor:
    """Log-probability of each token of each rollout among the trie's children; (B, G) -> (B, G, L).

    Two passes: the prompts (B, T), then all rollouts but their last tokens, (B, G * (L-1)). Equal, with
    its gradients, to repeating each prompt G times.
    """
    trie, sid_ids, device = catalogue.trie, catalogue.sid_ids, leaves.device
    (batch, group), depth = leaves.shape, len(sid_ids) - 1
    path = trie_paths(trie, leaves)
    tokens = torch.cat([sid_ids[level][trie.codes[level][path[level]]] for level in range(depth)], 1)
    level_of = torch.arange(depth, device=device).repeat_interleave(group)  # (G * (L-1),)
    rollout_of = torch.arange(group, device=device).repeat(depth)  # whose token; below, -1 sees none
    ancestors = [torch.where(level_of >= level, rollout_of, -1).expand(batch, -1) for level in range(depth)]
    prefix = prefill(model, prompts, precision)
    hidden = read_tokens(model, tokens, prefix, level_of, ancestors, [group] * depth, precision)
    head, log_probs = model.get_output_embeddings().weight, []
    for level, seen in enumerate((prefix.last, *hidden.split(group, 1))):  # (B, 1 or G, D)
        logits = seen.float() @ head[sid_ids[level]].float().T             # (B, 1 or G, K)
        log_probs.append(path_log_probs(trie, level, path, logits))
    return torch.stack(log_probs, -1)

# ---- Rollouts and updates ----------------------
class Prompt(NamedTuple):
    """A prompt and the leaf of its own target."""
    ids: list[int]
    target: int

class Group(NamedTuple):
    """The rollouts of a prompt, as the update needs them."""
    prompt: list[int]
    leaves: Tensor      # (G,)
    advantages: Tensor  # (G,)

def roll_out(model, catalogue: Catalogue, batch: list[Prompt], group_size: int, mix: dict[str, float],
             sample: torch.Generator | None, micro_tokens: int) -> tuple[list[Group], Counter]:
    """Propose and judge a group per prompt; -> groups to train on, sums for the log."""
    groups, sums = [], Counter(groups=0, dropped=0, reward=0.0, hits=0, entropy=0.0)
    for rows in length_batches([len(prompt.ids) + group_size for prompt in batch], micro_tokens):
        prompts = [batch[row].ids for row in rows]
        targets = torch.tensor([batch[row].target for row in rows], device=model.device)
        leaves, scores = beam_search(model, catalogue.trie, catalogue.sid_ids, prompts, group_size,
                                     sample=sample)
        rewards = group_rewards(mix, catalogue.codes, leaves, scores, targets)
        advantages = group_advantages(rewards)
        differ = rewards.amax(1) - rewards.amin(1) > 1e-6
        for row in differ.nonzero()[:, 0].tolist():
            groups.append(Group(prompts[row], leaves[row], advantages[row]))
        sums.update(
            groups=len(rows), dropped=(~differ).sum().item(), reward=rewards.mean(1).sum().item(),
            hits=(leaves == targets[:, None]).any(1).sum().item(),
            entropy=-(scores.softmax(1) * scores.log_softmax(1)).sum().item())
    return groups, sums

def update(model, reference, optimizer, catalogue: Catalogue, groups: list[Group], num_groups: int,
           updates: int, clip_eps: float, kl_coef: float, max_grad_norm: float, micro_tokens: int,
           precision: str) -> Counter:
    """The optimizer steps on one batch, of `num_groups` over all processes; -> sums for the log."""
    sums = Counter(kl=0.0, clipped=0.0, grad_norm=0.0)
    if sum_over_processes(torch.tensor(len(groups), device=model.device)) == 0:
        return sums
    lengths = [len(group.prompt) + (len(catalogue.sid_ids) - 1) * len(group.leaves) for group in groups]
    pieces = [[groups[row] for row in rows] for rows in length_batches(lengths, micro_tokens)]
    before = []  # of each piece: log-probabilities before the first step, and the reference's
    for step in range(updates):
        optimizer.zero_grad(set_to_none=True)
        for place, piece in enumerate(pieces):
            prompts = [group.prompt for group in piece]
            leaves = torch.stack([group.leaves for group in piece])
            advantages = torch.stack([group.advantages for group in piece])
            log_probs = tree_log_probs(model, catalogue, prompts, leaves, precision)  # (B, G, L)
            if step == 0:
                with torch.no_grad():
                    ref_log_probs = tree_log_probs(reference, catalogue, prompts, leaves, precision)
                before.append((log_probs.detach(), ref_log_probs))
            result = policy_loss(log_probs, *before[place], advantages, clip_eps, kl_coef)
            (result["loss"].sum() / num_groups).backward()
            for name in ("kl", "clipped"):
                sums[name] += result[name].sum().item() / updates
        sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        sums["grad_norm"] += norm.item() / updates
    return sums

def batch_rows(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The prompts of an update. Each epoch is shuffled, and drops what is left over."""
    per_epoch = max(1, count // batch_size)
    order = random.Random(f"{seed} {step // per_epoch}").sample(range(count), count)
    return order[step % per_epoch * batch_size:][:batch_size]

# ---- Validation and log ------------------------
def sum_dict(sums: dict[str, float], device: torch.device) -> dict[str, float]:
    """The sums over all processes, by name."""
    values = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    return dict(zip(sums, sum_over_processes(values).tolist()))

def validate(model, catalogue: Catalogue, prompts: list[list[int]], targets: list) -> dict[str, float]:
    """HR@K and NDCG@K of the next item, over the users of all processes."""
    rankings = search_all(model, catalogue.trie, catalogue.sid_ids, catalogue.item_ids, prompts,
                          VALID_BEAMS, VALID_TOKENS)
    ranks = [rank_of(target, ranking.items) for target, ranking in zip(targets, rankings)]
    metrics = rank_metrics(ranks or [None], VALID_CUTOFFS)  # a process may have no users
    sums = {name: value * len(ranks) for name, value in metrics.items()}
    sums = sum_dict({**sums, "users": len(ranks)}, model.device)
    return {name: sums[name] / sums["users"] for name in metrics}

def log_row(sums: dict[str, float], group_size: int, seconds: float) -> dict[str, float]:
    """What the sums over some steps say."""
    groups, kept = sums["groups"], max(1, sums["groups"] - sums["dropped"])
    return {"reward": sums["reward"] / groups, f"hit@{group_size}": sums["hits"] / groups,
            "zero_variance": sums["dropped"] / groups, "entropy": sums["entropy"] / groups,
            "kl": sums["kl"] / kept, "clipped": sums["clipped"] / kept,
            "grad_norm": sums["grad_norm"] / sums["steps"],
            "rollouts_per_second": groups * group_size / seconds}

def show(row: dict, names) -> str:
    """Figures of a row of the log, in one line."""
    return " | ".join(f"{name} {row[name]:.4g}" for name in names)

# ---- Data --------------------------------------
def load_catalogue(items: list[dict], tokenizer, sid: dict, device: torch.device) -> Catalogue:
    """The trie; new items count as the average of their siblings."""
    unseen, codes = new_items(sid, items), torch.from_numpy(codes_of(items))
    is_new = torch.tensor([item["item_id"] in unseen for item in items])
    trie = build_trie(codes, sid["codebook_size"], device, is_new)
    codes = codes[trie.leaf_items[trie.leaf_start[:-1]]].to(device)  # of each leaf's first item
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(device)
    return Catalogue(trie, sid_ids, codes, [item["item_id"] for item in items])

def read_prompts(tokenizer, tasks: list[str], data: dict, trie: Trie) -> list[Prompt]:
    """Every example of the tasks, each with the leaf of its own target."""
    names, prompts = ("".join(item["sid"]) for item in data["items"]), []
    leaf_of = dict(zip(names, leaf_of_items(trie).tolist()))
    for name in tasks:
        pairs = make_pairs(name, data)
        if not pairs:
            stop(f"--tasks: {name} has no examples in this run; leave it out")
        print(f"task {name} | {len(pairs)} prompts | {pairs[0].instruction!r} >>{pairs[0].response}<<")
        ids = prompt_ids(tokenizer, [pair.instruction for pair in pairs])
        prompts += [Prompt(prompt, leaf_of[pair.response]) for prompt, pair in zip(ids, pairs)]
    return prompts

# ---- Command line ------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed", "device")
    flag = parser.add_argument
    flag("--from", dest="start", help="checkpoint to start from, instead of RUN/sft.pt")
    flag("--out", help="checkpoint to write, instead of RUN/rl.pt")
    flag("--resume", action="store_true", help="continue an interrupted run")
    flag("--tasks", type=lambda text: list(parse_weights(text, SID_TASKS, "task with an item's SID")),
         help="None: the checkpoint's; all prompts count alike")
    flag("--reward", type=lambda text: parse_weights(text, REWARDS, "reward"), default="hit:1",
         help=f"weighted sum of {', '.join(REWARDS)}")
    flag("--rollout", choices=("beam", "sample"), default="beam", help="sample: without replacement")
    flag("--group-size", type=number(int, 2), default=16, help="G, rollouts per prompt")
    flag("--kl-coef", type=number(float, 0), default=1e-3, help="weight of the KL")
    flag("--clip-eps", type=number(float, 1e-6, 1), default=0.2, help="clip range of the ratio")
    flag("--updates-per-rollout", type=number(int, 1), default=1, help="above 1, the clip acts")
    flag("--epochs", type=number(int, 1), help="passes over the prompts")
    flag("--lr", type=number(float, 0), help="peak learning rate")
    flag("--batch-size", type=number(int, 1), help="prompts per update")
    flag("--eval-every", type=number(int, 1), help="updates between validations")
    flag("--micro-tokens", type=number(int, 1), default=4096, help="tokens per forward pass")
    flag("--precision", choices=("fast", "float32", "bfloat16"), default="fast", help="as in train.py")
    flag("--patience", type=number(int, 1), default=5, help="validations without gain, then stop")
    flag("--log-every", type=number(int, 1), default=10, help="updates per log line")
    return parser.parse_args(argv)

def main() -> None:
    args = parse_args()
    device, rank, world = join_processes(args.device, args.seed)
    run = Path(args.run)
    source = args.start or run / "sft.pt"
    out, log_path, resume_path = output_paths(Path(args.out or run / "rl.pt"), source)
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(source, device, items)
    args.backbone = checkpoint["args"]["backbone"]
    for key, value in PRESETS["tiny" if args.backbone == "tiny" else "hf"].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.recommends = checkpoint["args"].get("recommends", "next")  # to validate by
    args.tasks = args.tasks or [args.recommends]

    # Data; valid.jsonl is only read to validate
    data = read_data(run, items, args.tasks)
    sid = update_sid(checkpoint["sid"], items, {sample["target"] for sample in data.get("samples", ())})
    catalogue = load_catalogue(items, tokenizer, sid, device)
    train = read_prompts(tokenizer, args.tasks, data, catalogue.trie)
    valid = read_samples(run / "valid.jsonl", set(catalogue.item_ids))
    pairs = make_pairs(args.recommends, {"items": items, "samples": valid})
    prompts = prompt_ids(tokenizer, [pair.instruction for pair in pairs])
    longest = max(len(ids) for ids in [*prompts, *(prompt.ids for prompt in train)])
    check_lengths(longest + sid["num_levels"] - 1, model.config, in_search=True)
    prompts, targets = prompts[rank::world], [pair.row["target"] for pair in pairs][rank::world]
    steps = args.epochs * max(1, len(train) // args.batch_size)

    reference = copy.deepcopy(model).requires_grad_(False)
    if device.type == "cuda":
        read_in_bf16(reference)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=device.type == "cuda")
    print(f"device {device} x {world} | {count_parameters(model):.2f} M parameters | {len(train)} prompts | "
          f"{len(valid)} to validate | {steps} updates of {args.batch_size} x {args.group_size} rollouts")
    settings = {**vars(args), "prompts": hash(tuple((*prompt.ids, prompt.target) for prompt in train)),
                "processes": world, "catalogue": sid["digest"],
                "SID rows": fingerprint(model, catalogue.sid_ids)}
    if args.resume and resume_path.exists():
        state = load_progress(resume_path, model, optimizer, settings)
        print(f"continuing after update {state['step']}")
    else:
        row = {"step": 0, **validate(model, catalogue, prompts, targets)}
        state = {"step": 0, "best": row["NDCG@10"], "bad_evals": 0, "log": [row]}
        print(f"start | valid {show(row, SHOWN)}")
        if rank == 0:
            save_model(out, model, tokenizer, sid, stage="rl", args=vars(args), step=0, metrics=row)
    step, best, bad_evals, log = (state[name] for name in ("step", "best", "bad_evals", "log"))
    interrupted, leave = catch_interrupts(device), False
    noise, sums, start = torch.Generator(device), Counter(), time.time()
    bar = tqdm(total=steps, initial=step, desc="rl", unit="step", disable=rank > 0 or None)

    while step < steps and bad_evals < args.patience and not leave:
        # Draws follow from seed and step: a resumed run repeats them
        noise.manual_seed(args.seed + 1_000_003 * (step * world + rank))
        lr = learning_rate(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Propose groups, compare their rewards, update the policy
        rows = batch_rows(len(train), args.batch_size, step, args.seed)
        groups, rollout_sums = roll_out(
            model, catalogue, [train[row] for row in rows[rank::world]], args.group_size, args.reward,
            noise if args.rollout == "sample" else None, args.micro_tokens)
        update_sums = update(
            model, reference, optimizer, catalogue, groups, len(rows), args.updates_per_rollout,
            args.clip_eps, args.kl_coef, args.max_grad_norm, args.micro_tokens, args.precision)
        sums.update(rollout_sums)
        sums.update(update_sums, steps=1)
        step += 1
        bar.update()

        # Log, validate, save
        row, better = {"step": step}, False
        if step % args.log_every == 0 or step == steps:
            row |= {"lr": lr, **log_row(sum_dict(sums, device), args.group_size, time.time() - start)}
            sums, start = Counter(), time.time()
            bar.write(show(row, row))
        validated = step % args.eval_every == 0 or step == steps
        if validated:
            began = time.time()
            row |= validate(model, catalogue, prompts, targets)
            start += time.time() - began  # rollouts per second leave it out
            better = row["NDCG@10"] > best
            best, bad_evals = (row["NDCG@10"], 0) if better else (best, bad_evals + 1)
            news = "best so far, saved" if better else f"no better for {bad_evals} validations"
            bar.write(f"step {step}/{steps} | valid {show(row, SHOWN)} | {news}")
        if not all(math.isfinite(value) for value in row.values()):
            stop(f"a figure of step {step} is not finite; choose a lower --lr")
        if len(row) > 1:
            log.append(row)
        leave = interrupted()
        if rank == 0 and better:
            save_model(out, model, tokenizer, sid, stage="rl", args=vars(args), step=step, metrics=row)
        if rank == 0 and (validated or leave):
            write_jsonl(log_path, log)
        if rank == 0 and (leave or better):
            state = {"step": step, "best": best, "bad_evals": bad_evals, "log": log}
            save_progress(resume_path, model, optimizer, state, settings)

    bar.close()
    for row in (log[0], max(log, key=lambda row: row.get("NDCG@10", 0))):
        print(f"valid | step {row['step']} | {show(row, SHOWN)}")
    leave_processes(leave, step, resume_path, f"wrote {out}, {log_path}")

if __name__ == "__main__":
    main()
