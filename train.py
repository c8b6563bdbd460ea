"""Stage 4: train the SID rows alone (align), then the whole model (sft), on recommendation and alignment tasks.

Every task is a template that turns data into (instruction, response); the loss counts response tokens only:

    Eq. 5        L_SFT = - sum_(X, Y) sum_j log pi(Y_j | X, Y_<j)       TS-Rec (arXiv 2602.22632), section 3.3
    Algorithm 1  grad E <- grad E * m,  m_i = [i is a SID token]        STAR, section 3.1: --stage align

    TS-Rec   next, title2sid, sid2title, next_title, next_description   appendix A.2.1 - A.2.4
             text2token, token2text (TS-Align)                          section 4.2
    STAR     title2sid, description2sid, text2sid, name_item, describe_item, sid2text       appendix A.2.1
             retrieve, search                                           appendix A.2.3, A.2.2
    MiniOneRec   titles2sid                                             (its title history -> SID)
    ours     next_brief; sequence: a user's items, each given those before it; basket: the same items shuffled

Reads   RUN/init.pt (or --from), RUN/items.jsonl, train.jsonl, valid.jsonl, semantics.jsonl (for TS-Align),
        queries.jsonl (for search)
Writes  RUN/align.pt or sft.pt, the weights with the lowest validation loss; RUN/sft_log.jsonl; while it runs,
        RUN/sft_resume.pt; with --keep, RUN/sft_00236.pt and so on, the weights at every validation

Differs from the papers
  1. The loss is the mean over the supervised tokens of a whole batch, however it is cut into micro-batches and
     spread over processes.
  2. A response that is a text ends with EOS; one that is a SID or a SID token does not: its length is fixed.
  3. The tiny backbone has settings of its own (PRESETS): smaller batches, a higher learning rate, a tenth of the
     weight for tokens of titles and descriptions, which are more than half of all supervised tokens, a prompt of
     half the length, and two tasks that ask for all items of a user at once: every transition is supervised at a
     fraction of the tokens (`sequence`), and what goes together is learnt in any order (`basket`).
  4. Each example's template is drawn once, by --seed; baskets are shuffled anew in every epoch. Descriptions inside
     instructions are cut to DESCRIPTION_WORDS.
  5. Prompts are plain lines, STAR's stand in a chat template (A.2); --lora keeps the backbone in float32, STAR's QLoRA
     in 4 bits, and trains the SID rows alone of the embedding and the head, QLoRA all of both (A.4).

Examples
  python train.py                                                  # the demo, minutes on two cores
  python train.py --stage align                                    # STAR, then: --from runs/demo/align.pt
  python train.py --tasks next,title2sid,sid2title                 # LC-Rec style: no TS-Align
  torchrun --nproc-per-node 8 -- train.py --run runs/qwen          # Qwen2.5-1.5B on GPUs: the paper's settings
"""
import argparse
import hashlib
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from init_embeddings import autocast, load_model, new_items, save_model, sid_digest, sid_token_ids
from tokenize_items import (SEED, check_known, check_output, check_text, load_pt, pick_device, read_catalogue,
                            read_jsonl, read_samples, replacing, stop, within, write_jsonl)

# Letters used in shapes: B sequences, T tokens, S supervised tokens, V vocabulary rows, D width, R rank.
PROMPT = "{instruction}\n"
DESCRIPTION_WORDS = 100                 # of a description inside an instruction
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")     # STAR, A.4


class Task(NamedTuple):
    """One task of the table: which data it reads, its templates and its response."""
    source: str                         # "samples", "users", "items", "tokens" or "queries"
    instructions: tuple[str, ...]       # one is drawn per example
    response: str

    @property
    def text(self) -> bool:
        """Is the response words, which EOS ends, and not SID tokens, which need no end?"""
        return "{title}" in self.response or "{description}" in self.response


TASKS = {
    "next": Task("samples", (
        "The user has interacted with items {history} in chronological order. Can you predict the next possible "
        "item that the user may expect?",), "{sid}"),
    "next_brief": Task("samples", ("The user has interacted with items {history}",), "{sid}"),
    "sequence": Task("users", ("The user has interacted with items",), "{sequence}"),
    "basket": Task("users", ("The user has interacted with items, in any order",), "{basket}"),
    "title2sid": Task("items", ("Which item has the title: {title}?",), "{sid}"),
    "sid2title": Task("items", ('What is the title of item "{sid}"?',), "{title}"),
    "next_title": Task("samples", (
        "The user has sequentially interacted with items {history}. Can you recommend the next item for him? Tell "
        "me the title of the item.",), "{title}"),
    "next_description": Task("samples", (
        "Please review the user's historical interactions: {history}, and describe what kind of item he still "
        "needs.",), "{description}"),
    "text2token": Task("tokens", (
        "Identify the specific SID token shared by items that exhibit the following scope and characteristics: "
        '"{description}"',), "{token}"),
    "token2text": Task("tokens", (
        'Describe the typical scope and shared features of items associated with the token: "{token}"',),
        "{description}"),
    "description2sid": Task("items", ("Can you tell me what item is described as {about}?",), "{sid}"),
    "text2sid": Task("items", ("What item is called {title} and described as {about}?",), "{sid}"),
    "name_item": Task("items", ("Could you please tell me what item {sid} is called?",), "{title}"),
    "describe_item": Task("items", ("Briefly describe item {sid}.",), "{description}"),
    "sid2text": Task("items", ("What is the title and description of item {sid}?",), "{title}\n\n{description}"),
    "retrieve": Task("samples", (
        "The user has interacted with items {history} in chronological order. Can you predict the next possible "
        "item that the user may expect?",
        "Based on the items that the user has interacted with: {history}, can you determine what item would be "
        "recommended to the user next?",
        "Here is the item interaction history of the user: {history}, what to recommend to the user next?"),
        "{sid}"),
    "titles2sid": Task("samples", (
        "The user has bought items with these titles, in chronological order: {titles}. Which item comes next?",),
        "{sid}"),
    "search": Task("queries", (
        "As a recommender system, you are assisting a user who expresses a desire to obtain an item with the "
        "following characteristics: {query}. Please recommend an item that meets these criteria.",
        "The user wants a new item and searches for: {query}. Please select a suitable item that matches the "
        "search intent.",
        "Based on the user's current query {query}, please generate an item that matches the user's intent."),
        "{sid}"),
}
TS_REC = "next,title2sid,sid2title,next_title,next_description,text2token,token2text"
STAR_ALIGN = "title2sid,description2sid,text2sid,name_item,describe_item,sid2text"

# Settings that depend on backbone and stage, in one place. "hf" is TS-Rec's section 5.1.4, "align" STAR's A.4.
PRESETS = {
    "hf": dict(tasks=TS_REC, epochs=3, lr=3e-4, beta2=0.999, batch_size=1024, warmup=20, dropout=0.0, weight_decay=0.0,
               evals_per_epoch=4, max_response=256, micro_tokens=4096),
    "tiny": dict(tasks="next_brief,sequence:0.5,basket:0.5,title2sid,sid2title:0.1,text2token,token2text:0.1", epochs=6,
                 lr=1.5e-3, beta2=0.95, batch_size=64, warmup=100, dropout=0.1, weight_decay=0.01, evals_per_epoch=1,
                 max_response=128, micro_tokens=3072),
    "align": dict(tasks=STAR_ALIGN, epochs=10, lr=1e-3, beta2=0.999, batch_size=16, weight_decay=0.0,
                  evals_per_epoch=1),
}


# ---------------------------------------------------------------------------------------------------------
# Prompts and examples: used by training, evaluation and RL alike
# ---------------------------------------------------------------------------------------------------------

def recommends_by(trained: dict) -> str:
    """The task by which a model trained with these arguments recommends: what its training says (rl.py's does), or of
    its tasks the first that turns a history of SIDs into a SID."""
    names = parse_tasks(trained.get("recommends") or trained.get("tasks") or "next")
    return next((n for n in names if "{history}" in TASKS[n].instructions[0] and not TASKS[n].text), "next")


def task_fields(source: str, data: dict, rng: random.Random) -> list[dict]:
    """The values that a task's templates take, one dict per example of its source; `rng` shuffles baskets."""
    item = {item["item_id"]: item for item in data["items"]}
    sid = {i: "".join(item[i]["sid"]) for i in item}

    def about(i) -> dict:
        return {"sid": sid[i], "title": item[i]["title"], "description": item[i]["description"],
                "about": " ".join(item[i]["description"].split()[:DESCRIPTION_WORDS])}

    if source == "samples":
        return [{"history": ", ".join(sid[i] for i in s["history"]), **about(s["target"]),
                 "titles": ", ".join(f'"{item[i]["title"]}"' for i in s["history"])} for s in data["samples"]]
    if source == "users":
        users = [[sid[i] for i in (*s["history"], s["target"])] for s in data["users"]]
        return [{"sequence": ", ".join(sids), "basket": ", ".join(rng.sample(sids, len(sids)))} for sids in users]
    if source == "items":
        return [about(i) for i in item]
    if source == "queries":
        return [{"query": row["query"], **about(row["item_id"])} for row in data["queries"]]
    return [{"token": row["token"], "description": row["description"]} for row in data["tokens"]]


def task_rows(name: str, data: dict, seed: str = "") -> list[tuple[dict, str, str]]:
    """(row of the source, instruction, response) for every example whose texts are not empty; `seed` draws
    templates and baskets."""
    task, rng, rows = TASKS[name], random.Random(f"{seed} {name}"), []
    for row, fields in zip(data[task.source], task_fields(task.source, data, rng)):
        instruction = rng.choice(task.instructions)
        if all(value.strip() for key, value in fields.items() if "{" + key + "}" in instruction + task.response):
            rows.append((row, instruction.format(**fields), task.response.format(**fields)))
    return rows


def task_pairs(name: str, data: dict, seed: str = "") -> list[tuple[str, str]]:
    """(instruction, response) for every example of a task."""
    return [(instruction, response) for _, instruction, response in task_rows(name, data, seed)]


def prompt_ids(tokenizer, instructions: list[str]) -> list[list[int]]:
    """Token ids of the whole prompt for each instruction, with BOS where the tokenizer adds one itself.

    Training, evaluation and RL all come here, so that their prompts are identical id for id.
    """
    empty = tokenizer("").input_ids
    bos = empty[:1] if tokenizer.bos_token_id is not None and empty[:1] == [tokenizer.bos_token_id] else []
    texts = [PROMPT.format(instruction=i) for i in instructions]
    return [bos + ids for ids in tokenizer(texts, add_special_tokens=False).input_ids]


class Example(NamedTuple):
    """Token ids of prompt + response; the response, from `start` on, is what the loss counts."""
    task: str
    ids: list[int]
    start: int
    weight: float = 1.0                 # of each of its supervised tokens


def encode_examples(tokenizer, name: str, pairs: list[tuple[str, str]], max_response: int,
                    weight: float = 1.0) -> list[Example]:
    """Tokenise a task's pairs, in parallel. EOS ends a text response, unless it was cut to `max_response` tokens;
    prompts are never cut."""
    if not pairs:
        return []
    end = [tokenizer.eos_token_id] if TASKS[name].text else []
    prompts = prompt_ids(tokenizer, [p for p, _ in pairs])
    responses = tokenizer([r for _, r in pairs], add_special_tokens=False).input_ids
    most = max_response if TASKS[name].text else None                   # a SID is never cut
    return [Example(name, prompt + (response + end)[:most], len(prompt), weight)
            for prompt, response in zip(prompts, responses)]


def collate(examples: list[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad; labels are the next token where it belongs to a response, else -100; (B, T), (B, T).

    ids     p0 p1 p2 r0 r1          with prompt p0 p1 p2 and response r0 r1: position t predicts token t + 1
    labels  -100 -100 r0 r1 -100
    """
    length = -(-max(len(e.ids) for e in examples) // 8) * 8     # few shapes: allocator and kernels can reuse
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, e in enumerate(examples):
        ids[row, :len(e.ids)] = torch.tensor(e.ids)
        labels[row, e.start - 1:len(e.ids) - 1] = torch.tensor(e.ids[e.start:])
    return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def length_batches(sequences: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Rows of sequences of similar length, at most `max_tokens` tokens each, padding included."""
    batches: list[list[int]] = [[]]
    for row in sorted(range(len(sequences)), key=lambda r: len(sequences[r])):
        if batches[-1] and len(sequences[row]) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def micro_batches(examples: list[Example], micro_tokens: int, rank: int = 0, world: int = 1) -> list[list[Example]]:
    """Cut a batch, sorted by length, into pieces of at most `micro_tokens` tokens, padding included; this process's.

    Every process gets as many pieces, since each forward pass of FSDP is an appointment of all: who has one less
    takes a piece of weight nothing.
    """
    share = -(-sum(len(e.ids) for e in examples) // world)
    rows = length_batches([e.ids for e in examples], min(micro_tokens, share) if world > 1 else micro_tokens)
    pieces = [[examples[row] for row in piece] for piece in rows]
    idle = [[e._replace(weight=0.0) for e in pieces[0][:1]]] * (-len(pieces) % world)
    return (pieces + idle)[rank::world]


def epoch_batches(examples: list[Example], batch_size: int, rng: random.Random) -> list[list[Example]]:
    """Shuffle; sort by length within pools of 16 batches, so that padding stays small; shuffle the batches."""
    order = rng.sample(examples, len(examples))
    pool = 16 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        block = sorted(order[start:start + pool], key=lambda e: len(e.ids))
        batches += [block[i:i + batch_size] for i in range(0, len(block), batch_size)]
    rng.shuffle(batches)
    return batches


# ---------------------------------------------------------------------------------------------------------
# What trains: everything, the SID rows alone (STAR), or adapters and SID rows (LoRA)
# ---------------------------------------------------------------------------------------------------------

def train_sid_rows(model, sid_ids: torch.Tensor) -> None:
    """Freeze the model but for its SID rows, in the embedding and, where untied, in the LM head.

    STAR, algorithm 1: a hook multiplies the matrix's gradient by a mask (V, 1) that is 1 on SID rows. With no weight
    decay and a fresh optimizer the other rows then stay bit-identical (decay or old momentum would move them).
    Cost, honestly: autograd knows no rows, so the gradient and AdamW's two moments are dense, 3 x V x D floats per
    matrix, of which L x K rows are used: 2.8 GB for Qwen2.5-1.5B, against 18.5 GB when everything trains.
    """
    model.requires_grad_(False)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        if not matrix.requires_grad:                                    # the second time round: tied
            mask = torch.zeros(len(matrix), 1, device=matrix.device)
            mask[sid_ids.flatten().to(matrix.device)] = 1
            matrix.requires_grad_(True)
            matrix.register_hook(lambda grad, mask=mask: grad * mask)


class LoRA(torch.nn.Module):
    """y = W x + alpha / R * B A dropout(x), W frozen, B = 0 at the start (Hu et al. 2021, arXiv 2106.09685)."""
    def __init__(self, linear: torch.nn.Linear, args: argparse.Namespace) -> None:
        super().__init__()
        self.linear, self.dropout, self.scale = linear, args.lora_dropout, args.lora_alpha / args.lora
        self.a = torch.nn.Parameter(torch.empty(args.lora, linear.in_features, device=linear.weight.device))
        self.b = torch.nn.Parameter(torch.zeros(linear.out_features, args.lora, device=linear.weight.device))
        torch.nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.a)
        return self.linear(x) + self.scale * F.linear(low, self.b)


def add_lora(model, args: argparse.Namespace) -> None:
    """Put an adapter around every projection named in LORA_TARGETS; all else stays as it was."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if name in LORA_TARGETS and isinstance(child, torch.nn.Linear)]
    if not found:
        stop(f"--lora: the backbone has no layer named {', '.join(LORA_TARGETS)}; train it without")
    for parent, name, child in found:
        setattr(parent, name, LoRA(child, args))


def merge_lora(model, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the same model without adapters: W + alpha / R * B A in the place of W."""
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            a, b = weights.pop(f"{name}.a"), weights.pop(f"{name}.b")
            weights[f"{name}.weight"] = weights.pop(f"{name}.linear.weight") + module.scale * b @ a
            if f"{name}.linear.bias" in weights:
                weights[f"{name}.bias"] = weights.pop(f"{name}.linear.bias")
    return weights


def add_dropout(model, p: float) -> None:
    """Drop parts of the embeddings and of every residual branch while training (Llama-like models have no
    residual dropout of their own)."""
    def hook(module, inputs, output):
        return F.dropout(output, p, model.training)
    branches = [m for name, m in model.named_modules() if name.endswith((".o_proj", ".down_proj"))]
    for module in [model.get_input_embeddings(), *branches] if p > 0 else []:
        module.register_forward_hook(hook)


# ---------------------------------------------------------------------------------------------------------
# Several processes, interrupts, random states (rl.py uses them too)
# ---------------------------------------------------------------------------------------------------------

def join_processes(flag: str) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; under torchrun joins the others. Only rank 0 speaks."""
    device = pick_device(flag)
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return device, dist.get_rank(), dist.get_world_size()


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place; alone, the value itself."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def on_interrupt() -> Callable[[torch.device], bool]:
    """From now on Ctrl-C and SIGTERM are only remembered; the function returned says whether any process got one."""
    heard = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: heard.append(number))
    return lambda device: bool(all_sum(torch.tensor(len(heard), device=device)).item())


def random_states() -> dict:
    """States of torch's generators in this process."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_states(states: dict) -> None:
    """Go on drawing where `random_states` was taken."""
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state_all(states["cuda"][:torch.cuda.device_count()])       # there may be fewer GPUs now


# ---------------------------------------------------------------------------------------------------------
# Loss and optimisation
# ---------------------------------------------------------------------------------------------------------

def response_loss(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each supervised token (eq. 5); (B, T), (B, T) -> (S,).

    Right padding under causal attention never reaches a real token, so no mask is needed; the LM head is
    multiplied with the S supervised positions only, not with all B * T.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state      # (B, T, D)
    wanted = labels != -100
    logits = hidden[wanted] @ model.get_output_embeddings().weight.T                 # (S, V)
    return F.cross_entropy(logits.float(), labels[wanted], reduction="none")


class ResponseLoss(torch.nn.Module):
    """`response_loss` as a module: what DistributedDataParallel and FSDP wrap."""
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return response_loss(self.model, ids, labels)


def spread(model, world: int, fsdp: bool) -> torch.nn.Module:
    """The loss as a module over all processes: replicated, or (FSDP) every layer's weights cut into shards."""
    loss = ResponseLoss(model)
    used = {id(p) for p in model.base_model.parameters()} | {id(model.get_output_embeddings().weight)}
    for p in model.parameters():                        # BERT's head has more, left out here: DDP would wait for it
        p.requires_grad_(p.requires_grad and id(p) in used)
    if fsdp:
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(model.device.type, (world,))
        for layer in [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]:
            fully_shard(layer, mesh=mesh)
        return fully_shard(loss, mesh=mesh)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True) if world > 1 else loss


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, steps - args.warmup)))


def make_optimizer(model, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW on what trains; weight decay on matrices, not on norms and biases, and never on masked rows."""
    params = [p for p in model.parameters() if p.requires_grad]
    decay = 0.0 if args.stage == "align" or args.lora else args.weight_decay
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=(0.9, args.beta2),
                             fused=model.device.type == "cuda")


@torch.no_grad()
def validation_loss(loss_of: ResponseLoss, examples: list[Example], args: argparse.Namespace) -> float:
    """Mean negative log-likelihood per supervised token of the validation examples, over all processes."""
    device = next(loss_of.parameters()).device
    loss_of.eval()
    total = torch.zeros(2, dtype=torch.double, device=device)
    for piece in micro_batches(examples, args.micro_tokens, args.rank, args.world):
        ids, labels = collate(piece, device)
        with autocast(device, args.precision):
            losses = loss_of(ids, labels)
        if piece[0].weight:
            total += torch.stack((losses.double().sum(), torch.tensor(len(losses), device=device)))
    loss_of.train()
    total = all_sum(total)
    return (total[0] / total[1]).item()


def train_step(loss_of: ResponseLoss, optimizer, batch: list[Example],
               args: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """One update on one batch, however many micro-batches and processes.

    -> this process's sums per task (tasks, 2): negative log-likelihood and number of supervised tokens; the
    gradient norm. DDP and FSDP average gradients over processes, so the loss is taken times their number.
    """
    device, names = next(loss_of.parameters()).device, list(TASKS)
    supervised = sum(e.weight * (len(e.ids) - e.start) for e in batch)              # of all processes
    sums = torch.zeros(len(names), 2, device=device)
    optimizer.zero_grad(set_to_none=True)
    pieces = micro_batches(batch, args.micro_tokens, args.rank, args.world)
    for number, piece in enumerate(pieces, 1):
        if args.fsdp:                                                               # exchange gradients once
            loss_of.set_requires_gradient_sync(number == len(pieces))
        elif args.world > 1:
            loss_of.require_backward_grad_sync = number == len(pieces)
        ids, labels = collate(piece, device)
        weights = torch.tensor([e.weight for e in piece for _ in e.ids[e.start:]], device=device)        # (S,)
        kinds = torch.tensor([names.index(e.task) for e in piece for _ in e.ids[e.start:]], device=device)
        with autocast(device, args.precision):
            losses = loss_of(ids, labels)
            loss = (losses * weights).sum() / supervised * args.world
        loss.backward()
        live = (weights > 0).float()
        sums.index_add_(0, kinds, torch.stack((losses.detach() * live, live), 1))
    norm = torch.nn.utils.clip_grad_norm_(loss_of.parameters(), args.clip)
    optimizer.step()
    return sums, (norm.full_tensor() if args.fsdp else norm).item()


# ---------------------------------------------------------------------------------------------------------
# The training loop, its log, and how it survives
# ---------------------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """Where a run stands: with weights, optimizer and random states, all that --resume needs."""
    epoch: int = 0
    done: int = 0                       # updates of this epoch
    step: int = 0
    best: float = math.inf              # lowest validation loss
    bad: int = 0                        # validations since then
    order: tuple = ()                   # the data order's generator at the start of this epoch
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(len(TASKS), 2))      # since the last log line
    log: list[dict] = field(default_factory=list)


def find_parents(items: list[dict]) -> dict[str, set]:
    """The prefixes under which each SID token in use stands: {"<b_3>": {("<a_0>",), ("<a_7>",)}, ...}."""
    parents: dict[str, set] = {}
    for item in items:
        for level, token in enumerate(item["sid"]):
            parents.setdefault(token, set()).add(tuple(item["sid"][:level]))
    return parents


def geometry(rows: torch.Tensor, parents: list[set]) -> dict[str, float]:
    """How the SID rows (n, D) lie: STAR's collapse (section 2.1, figure 2) is rank 1 and cosine 1.

    Effective rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007). `siblings`: share
    of tokens below the first level whose nearest token (cosine) stands under one of their parents too.
    """
    rows = rows.detach().float()
    share = torch.linalg.svdvals(rows)
    share = share / share.sum()
    unit = F.normalize(rows, dim=1)
    near = (unit @ unit.T).fill_diagonal_(-2).argmax(1).tolist()
    below = [bool(parents[n] & parents[i]) for i, n in enumerate(near) if () not in parents[i]]
    return {"effective_rank": torch.exp(-torch.xlogy(share, share).sum()).item(),
            "cosine": ((unit.sum(0).square().sum() - len(unit)) / max(1, len(unit) * (len(unit) - 1))).item(),
            "siblings": sum(below) / max(1, len(below))}


def loss_report(sums: torch.Tensor, weights: dict[str, float]) -> dict[str, float]:
    """Mean loss per supervised token since the last line: as weighted in training, and of each task alone."""
    sums = all_sum(sums.clone()).double().cpu()
    each = {name: (sums[i, 0] / sums[i, 1]).item() for i, name in enumerate(TASKS) if sums[i, 1]}
    weighted = sums * torch.tensor([[weights.get(name, 0.0)] for name in TASKS])
    return {"loss": (weighted[:, 0].sum() / weighted[:, 1].sum()).item(), **{f"loss/{n}": x for n, x in each.items()}}


def remaining_batches(make_examples: Callable, args: argparse.Namespace, at: Progress):
    """From where the run stands to its end: (batch, updates per epoch); moves `at` on before each."""
    rng = random.Random(args.seed)
    if at.order:
        rng.setstate(at.order)
    while at.epoch < args.epochs:
        at.order = rng.getstate()
        batches = epoch_batches(make_examples(at.epoch), args.batch_size, rng)
        for batch in batches[at.done:]:
            at.step, at.done = at.step + 1, at.done + 1
            yield batch, len(batches)
        at.epoch, at.done = at.epoch + 1, 0


def fit(loss_of: ResponseLoss, optimizer, make_examples: Callable, valid: list[Example], weights: dict[str, float],
        args: argparse.Namespace, at: Progress, look: Callable[[], dict], save: Callable[[bool], None]) -> bool:
    """The training loop: schedule, log, validation, early stopping; False if interrupted before its end.

    `make_examples(epoch)` gives an epoch's examples, `look()` the SID rows' geometry; `save(better)` keeps the run's
    progress and, if better, the weights as the best so far.
    """
    device, interrupted = next(loss_of.parameters()).device, on_interrupt()
    at.sums, at.log = at.sums.to(device), at.log or [{"step": 0, **look()}]
    bar = tqdm(initial=at.step, desc=args.stage, unit="step", disable=args.rank > 0 or None)
    start, tokens, supervised = time.time(), 0, 0
    loss_of.train()
    for batch, per_epoch in remaining_batches(make_examples, args, at):
        if at.bad >= args.patience:
            bar.write(f"stopped early: no better validation loss for {at.bad} evaluations")
            break
        bar.total = steps = per_epoch * args.epochs
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(at.step - 1, steps, args)
        sums, norm = train_step(loss_of, optimizer, batch, args)
        if not math.isfinite(norm):
            stop(f"the gradient of step {at.step} is {norm}; choose a lower --lr")
        at.sums += sums
        tokens, supervised = (n + sum(len(e.ids) - skip * e.start for e in batch)
                              for n, skip in ((tokens, 0), (supervised, 1)))
        bar.update()
        row = {"step": at.step, "epoch": round(at.step / per_epoch, 3)}
        if at.step % args.log_every == 0:
            seconds = time.time() - start
            row |= {**loss_report(at.sums, weights), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, **look(),
                    "tokens_per_second": round(tokens / seconds), "supervised_per_second": round(supervised / seconds)}
            bar.write(f"step {at.step:05d}/{steps} | loss {row['loss']:.4f} | lr {row['lr']:.1e} | grad {norm:.2f} | "
                      f"SID rows: rank {row['effective_rank']:.1f}, cosine {row['cosine']:.3f} | "
                      f"{row['tokens_per_second']} tok/s")
            at.sums, start, tokens, supervised = torch.zeros_like(at.sums), time.time(), 0, 0
        better, validate = False, at.step % max(1, per_epoch // args.evals_per_epoch) == 0 or at.step == steps
        if validate:
            row["valid_loss"] = validation_loss(loss_of, valid, args)
            better = row["valid_loss"] < at.best
            at.best, at.bad = (row["valid_loss"], 0) if better else (at.best, at.bad + 1)
            bar.write(f"step {at.step:05d}/{steps} | valid loss {row['valid_loss']:.4f}"
                      + (" | best so far, saved" if better else f" | no better for {at.bad}"))
            if not math.isfinite(row["valid_loss"]):
                stop(f"the validation loss of step {at.step} is {row['valid_loss']}; choose a lower --lr")
        if len(row) > 2:
            at.log.append(row)
        leave = interrupted(device)
        if validate or leave or at.step % args.save_every == 0:
            save(better)
        if leave:
            bar.close()
            return False
    bar.close()
    return True


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def parse_weights(text: str, known: Iterable[str], kind: str) -> dict[str, float]:
    """Read names with optional weights: "next,sid2title:0.1"."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a {kind}; choose from {', '.join(known)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = 0.0
        if not 0 < weights[name] < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r}: a weight is a number above 0, as in {name}:0.5")
    return weights


def parse_tasks(text: str) -> dict[str, float]:
    """Tasks and the weight of each of their supervised tokens."""
    return parse_weights(text, TASKS, "task")


def show_task(tokenizer, name: str, examples: list[Example], weight: float) -> bool:
    """Print a task's size and its first example, the supervised tokens between >> and <<; has it any?"""
    print(f"task {name:>16} | {len(examples)} examples | {sum(len(e.ids) for e in examples)} tokens | "
          f"{sum(len(e.ids) - e.start for e in examples)} supervised, weight {weight:g}")
    for e in examples[:1]:
        text = f"{tokenizer.decode(e.ids[:e.start])}>>{tokenizer.decode(e.ids[e.start:])}<<"
        print(f"example {name:>13} | {text!r}")
    return bool(examples)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", choices=("align", "sft"), default="sft",
                        help="align: only the SID rows train (STAR); sft: all weights, or --lora's")
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/demo", help="folder of the run")
    files.add_argument("--from", dest="start", help="checkpoint to start from, instead of RUN/init.pt")
    files.add_argument("--out", help="instead of RUN/align.pt or RUN/sft.pt")
    files.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same flags stopped")
    method = parser.add_argument_group("method (default: by backbone and stage, see PRESETS)")
    method.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}; "
                        "name:0.5 gives each supervised token of a task that weight")
    method.add_argument("--epochs", type=within(int, 1), help="passes over all examples")
    method.add_argument("--lr", type=within(float, 0), help="peak learning rate")
    method.add_argument("--beta2", type=within(float, 0, 1), help="AdamW's second moment decay")
    method.add_argument("--batch-size", type=within(int, 1), help="examples per update, of all processes together")
    method.add_argument("--warmup", type=within(int, 0), help="updates of linear warm-up")
    method.add_argument("--dropout", type=within(float, 0, 1), help="share of embeddings and residual branches dropped")
    method.add_argument("--weight-decay", type=within(float, 0), help="AdamW's, on matrices")
    method.add_argument("--evals-per-epoch", type=within(int, 1), help="validations per epoch")
    method.add_argument("--max-response", type=within(int, 1), help="tokens kept of a text response")
    method.add_argument("--micro-tokens", type=within(int, 1),
                        help="tokens per forward pass, padding included: memory only, the update is the same")
    lora = parser.add_argument_group("low-rank adapters (STAR: 8, 32, 0.05); the SID rows train in full")
    lora.add_argument("--lora", type=within(int, 0), default=0, metavar="R", help="rank; 0: train all weights")
    lora.add_argument("--lora-alpha", type=within(float, 0), default=32, help="adapters count alpha / R")
    lora.add_argument("--lora-dropout", type=within(float, 0, 1), default=0.05,
                      help="share of an adapter's input dropped")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--precision", choices=("fast", "float32", "bfloat16"), default="fast",
                      help="arithmetic over float32 weights; fast: bf16 on CUDA and on CPUs that have it")
    loop.add_argument("--fsdp", action="store_true", help="under torchrun: cut weights and optimizer into shards")
    loop.add_argument("--grad-checkpoint", action="store_true", help="recompute activations: less memory, more time")
    loop.add_argument("--clip", type=within(float, 0), default=1.0, help="largest gradient norm")
    loop.add_argument("--patience", type=within(int, 1), default=3,
                      help="stop after so many validations without a better loss")
    loop.add_argument("--log-every", type=within(int, 1), default=100, help="updates per log line")
    loop.add_argument("--save-every", type=within(int, 1), default=500, help="updates between saves for --resume")
    loop.add_argument("--keep", action="store_true", help="keep the weights of every validation, OUT_STEP.pt")
    loop.add_argument("--seed", type=SEED, default=42, help="seed of data order, templates, adapters and dropout")
    loop.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda where there is one")
    args = parser.parse_args(argv)
    if args.lora and args.stage == "align" or args.fsdp and (args.lora or args.stage == "align"):
        parser.error("--stage align, --lora and --fsdp exclude each other: gradients of shards cannot be masked by row")
    if args.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp needs several processes: torchrun --nproc-per-node N -- train.py --fsdp")
    if args.tasks is not None:
        try:
            parse_tasks(args.tasks)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--tasks: {error}")
    return args


def fill_in(args: argparse.Namespace, backbone: str) -> dict[str, float]:
    """Set what the flags leave open from PRESETS; -> the tasks' weights. Queries bring their task with them."""
    preset = dict(PRESETS["tiny" if backbone == "tiny" else "hf"])
    if args.stage == "align":
        preset |= PRESETS["align"]
    elif (Path(args.run) / "queries.jsonl").exists():
        preset["tasks"] += ",search"
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.backbone = backbone
    return parse_tasks(args.tasks)


def read_queries(path: Path, known: set, split: str) -> list[dict]:
    """The search queries of one split, {"item_id", "query", "split"}."""
    def check(place: str, row: dict) -> None:
        check_known(place, [row["item_id"]], known)
        check_text(place, row, ("query",))
    return [row for row in read_jsonl(path, ("item_id", "query", "split"), check) if row["split"] == split]


def read_meanings(path: Path, items: list[dict]) -> list[dict]:
    """The SID tokens in words, {"token", "description"}; stops at tokens of another catalogue."""
    fields, tokens = ("token", "description"), find_parents(items)

    def check(place: str, row: dict) -> None:
        check_text(place, row, fields)
        if row["token"] not in tokens:
            stop(f"{place}: {row['token']!r} is no token of items.jsonl; run extract_semantics.py again")
    return read_jsonl(path, fields, check)


def data_digest(run: Path) -> str:
    """The first 16 hex digits of SHA-256 over the run's files that train.py and rl.py may read."""
    digest = hashlib.sha256()
    for name in ("items", "train", "valid", "semantics", "queries"):
        path = run / f"{name}.jsonl"
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def read_data(run: Path, items: list[dict], weights: dict[str, float]) -> dict:
    """What the tasks need of the run's files, test.jsonl never among them."""
    known, sources = {item["item_id"] for item in items}, {TASKS[name].source for name in weights}
    data = {"items": items}
    if sources & {"samples", "users"}:
        data["samples"] = read_samples(run / "train.jsonl", known)
        data["users"] = list({s["user_id"]: s for s in data["samples"]}.values())       # each user's last sample
    if "tokens" in sources:
        data["tokens"] = read_meanings(run / "semantics.jsonl", items)
    if "queries" in sources:
        data["queries"] = read_queries(run / "queries.jsonl", known, "train")
    return data


def encode_tasks(tokenizer, data: dict, weights: dict[str, float], args: argparse.Namespace,
                 epoch: int = 0) -> dict[str, list[Example]]:
    """The examples of every task, by its name; what is drawn is drawn by seed and epoch."""
    tasks = {}
    for name in tqdm(weights, desc="tokenise", unit="task", delay=2, disable=args.rank > 0 or None):
        pairs = task_pairs(name, data, f"{args.seed} {epoch}")
        tasks[name] = encode_examples(tokenizer, name, pairs, args.max_response, weights[name])
    return tasks


def split_examples(tasks: dict[str, list[Example]], args: argparse.Namespace) -> tuple[list, list]:
    """Training and held-out examples. The tasks of align have no validation set: every 20th example is held out, of
    each task other items; sft has valid.jsonl and trains on all."""
    numbered = [(args.stage == "align" and number % 20 == task, e) for task, examples in enumerate(tasks.values())
                for number, e in enumerate(examples)]
    return [e for held, e in numbered if not held], [e for held, e in numbered if held]


def read_valid(tokenizer, run: Path, items: list[dict], args: argparse.Namespace) -> list[Example]:
    """The next items of valid.jsonl, asked for as the tasks do."""
    data = {"items": items, "samples": read_samples(run / "valid.jsonl", {item["item_id"] for item in items})}
    name = recommends_by(vars(args))
    return encode_examples(tokenizer, name, task_pairs(name, data), 0)


def check_lengths(longest: int, model, remedy: str) -> None:
    """Stop if a sequence is longer than the backbone's positions reach."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        stop(f"the longest sequence has {longest} tokens, the backbone reads {limit}; {remedy}")


def resume(path: Path, loss_of: ResponseLoss, optimizer, args: argparse.Namespace) -> Progress:
    """Restore weights, optimizer and random states from a resume file; where the run stands."""
    saved = load_pt(path, ("weights", "optimizer", "random", "args", "progress"))
    for key, value in saved["args"].items():
        if getattr(args, key, None) != value:
            stop(f"{path} is of a run with {key.replace('_', '-')} {value}, not {getattr(args, key, None)}; give the "
                 "same flags and files, or leave out --resume")
    here = {name: weight.shape for name, weight in loss_of.model.state_dict().items()}
    if here != {name: weight.shape for name, weight in saved["weights"].items()}:
        stop(f"{path} is of a run with another backbone; leave out --resume")
    set_state_dict(loss_of.model, optimizer, model_state_dict=saved["weights"],
                   optim_state_dict=saved["optimizer"], options=StateDictOptions(full_state_dict=True))
    set_random_states(saved["random"][args.rank])
    return Progress(**saved["progress"])


def save_progress(path: Path, state: tuple[dict, dict], at: Progress, args: argparse.Namespace) -> None:
    """Write the resume file, atomically; all processes give their random states, rank 0 writes."""
    states = [random_states()] * args.world
    if args.world > 1:
        dist.all_gather_object(states, random_states())
    same = {k: v for k, v in vars(args).items() if k not in ("run", "start", "out", "resume", "device", "rank")}
    if args.rank == 0:
        with replacing(path) as temporary:
            torch.save({"weights": state[0], "optimizer": state[1], "random": states, "args": same,
                        "progress": {**vars(at), "sums": at.sums.cpu()}}, temporary)


def main() -> None:
    args = parse_args()
    device, args.rank, args.world = join_processes(args.device)
    torch.manual_seed(args.seed + args.rank)
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")      # its CPU backward is slow on short prompts
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # else gigabytes of kernels, one per shape
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(args.start or run / "init.pt", device, items)
    named = args.tasks is not None                                  # then each must have examples
    weights = fill_in(args, checkpoint["args"].get("backbone"))
    sid, parents = checkpoint["sid"], find_parents(items)
    args.data = data_digest(run)                                    # --resume goes on with no other
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"])

    data = read_data(run, items, weights)
    new = {*new_items(sid, items)} - {s["target"] for s in data.get("samples", ())}
    sid = {**sid, "num_items": len(items), "digest": sid_digest(items), "new_items": sorted(new, key=str)}
    tasks = encode_tasks(tokenizer, data, weights, args)
    tasks = {name: examples for name, examples in tasks.items() if show_task(tokenizer, name, examples, weights[name])}
    if not tasks or named and len(tasks) < len(weights):
        stop(f"--tasks: no examples of {', '.join(weights.keys() - tasks)} in this run; leave them out")
    train, valid = split_examples(tasks, args)
    valid = valid or read_valid(tokenizer, run, items, args)
    check_lengths(max(len(e.ids) for e in train + valid), model,
                  "lower --max-history in stage 1, or leave out the task with long texts")

    if args.stage == "align" or args.lora:
        train_sid_rows(model, sid_ids)
    if args.lora:
        add_lora(model, args)
    add_dropout(model, args.dropout)
    if args.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of = spread(model, args.world, args.fsdp)
    optimizer = make_optimizer(model, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"device {device} x {args.world} | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
          f"{trained / 1e6:.2f} M with a gradient | {len(train)} examples, {len(valid)} for validation | "
          f"lr {args.lr} | {args.epochs} epochs of {math.ceil(len(train) / args.batch_size)} updates of "
          f"{args.batch_size}")

    out = Path(args.out or run / f"{args.stage}.pt")
    check_output(out)
    log_path, resume_path = (out.with_name(out.stem + tail) for tail in ("_log.jsonl", "_resume.pt"))
    at = resume(resume_path, loss_of, optimizer, args) if args.resume and resume_path.exists() else Progress()
    if args.resume:
        print(f"going on after update {at.step}" if at.step else f"no {resume_path}: starting from the beginning")
    in_use = torch.tensor(tokenizer.convert_tokens_to_ids(list(parents)), device=device)

    def make_examples(epoch: int) -> list[Example]:
        if epoch and "basket" in tasks:
            tasks.update(encode_tasks(tokenizer, data, {"basket": weights["basket"]}, args, epoch))
        return split_examples(tasks, args)[0]

    def look() -> dict:
        matrix = model.get_input_embeddings().weight
        return geometry((matrix.full_tensor() if args.fsdp else matrix)[in_use], list(parents.values()))

    def save(better: bool) -> None:
        state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        last = at.log[-1]
        validated = last["step"] == at.step and "valid_loss" in last
        wanted = [out] * better + [out.with_name(f"{out.stem}_{at.step:05d}.pt")] * (args.keep and validated)
        if args.rank == 0:
            for path in wanted:
                save_model(path, model, tokenizer, sid, merge_lora(model, dict(state[0])), stage=args.stage,
                           args=vars(args), step=at.step, metrics={"valid_loss": last["valid_loss"]})
            write_jsonl(log_path, at.log)
        save_progress(resume_path, state, at, args)

    finished = fit(loss_of, optimizer, make_examples, valid, weights, args, at, look, save)
    if args.rank == 0 and finished:
        write_jsonl(log_path, at.log)
        resume_path.unlink(missing_ok=True)
    print(f"wrote {out}, {log_path}" if finished else f"stopped after update {at.step}: go on with --resume")
    if args.world > 1:
        dist.barrier()                                  # gloo's threads still need the GIL to let go of tensors, which
        dist.destroy_process_group()                    # this call holds while it waits for them
    if not finished:
        sys.exit(130)


if __name__ == "__main__":
    main()
