"""Stage 4: train the SID rows alone (align), then the whole model (sft).

Every task is a template that turns data into a prompt and a response. The loss counts the response only.

    Eq. 5        L_SFT = - sum_(X, Y) sum_j log pi(Y_j | X, Y_<j)     TS-Rec (arXiv 2602.22632), 3.3
    Algorithm 1  grad E <- grad E * m,  m_i = [i is a SID token]      STAR, 3.1: --stage align

    TS-Rec       next, title2sid, sid2title, next_title, next_description     A.2.1 - A.2.4
                 text2token, token2text (TS-Align)                            4.2
    STAR         title2sid ... sid2text (STAR_ALIGN); retrieve, search        A.2.1 - A.2.3
    MiniOneRec   titles2sid
    ours         next_brief; sequence: a user's items in order; basket: the same, shuffled

Reads   RUN/init.pt (or --from), items.jsonl, train.jsonl, valid.jsonl, semantics.jsonl, queries.jsonl
Writes  RUN/align.pt or sft.pt, the weights with the lowest validation loss; RUN/sft_log.jsonl;
        RUN/sft_resume.pt while it runs; with --keep, RUN/sft_00236.pt: the weights at every validation

Differs from the papers
  1. The loss is the mean over a batch's supervised tokens, whatever the micro-batches and processes.
  2. A text response ends with EOS. A SID does not: its length is fixed.
  3. The tiny backbone has settings and tasks of its own, see PRESETS.
  4. Prompts are plain lines; STAR's are chat messages. --lora keeps float32; STAR's QLoRA has 4 bits.
  5. --stage align validates on 5 % of its examples, which it does not train on.

Examples
  python train.py --stage align                            # STAR, then: --from runs/demo/align.pt
  python train.py --tasks next,title2sid,sid2title         # LC-Rec style: no TS-Align
  torchrun --nproc-per-node 8 -- train.py --run runs/qwen  # Qwen2.5-1.5B: the paper's settings
"""
import argparse
import math
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from init_embeddings import (FULL_STATE, add_lora, autocast, catch_interrupts, check_lengths,
                             count_parameters, join_processes, leave_processes, load_model, load_progress,
                             merge_lora, read_semantics, save_model, save_progress, sid_token_ids,
                             sum_gradients, sum_over_processes, update_sid)
from tokenize_items import (ID, length_batches, make_parser, number, read_catalogue, read_jsonl,
                            read_samples, stop, write_jsonl)

# Letters used in shapes: B sequences, T tokens, S supervised tokens, V vocabulary rows, D width.
PROMPT = "{instruction}\n"
DESCRIPTION_WORDS = 100                 # of a description in a prompt
MAX_SEQUENCE = 50                       # items in one example of `sequence` or `basket`
HELD_OUT_EVERY = 20                     # --stage align validates on every 20th example of a task
MAX_GRAD_NORM = 1.0

class Task(NamedTuple):
    """One task: which data it reads, its templates, its response."""
    source: str                         # "samples", "users", "items", "tokens" or "queries"
    instructions: tuple[str, ...]       # one is drawn for each example
    response: str

    @property
    def is_text(self) -> bool:
        return "{title}" in self.response or "{description}" in self.response

    @property
    def recommends(self) -> bool:
        return "{history}" in self.instructions[0] and self.response == "{sid}"

TASKS = {
    "next": Task("samples", (
        "The user has interacted with items {history} in chronological order. Can you predict the next "
        "possible item that the user may expect?",), "{sid}"),
    "next_brief": Task("samples", ("The user has interacted with items {history}",), "{sid}"),
    "sequence": Task("users", ("The user has interacted with items",), "{sequence}"),
    "basket": Task("users", ("The user has interacted with items, in any order",), "{basket}"),
    "title2sid": Task("items", ("Which item has the title: {title}?",), "{sid}"),
    "sid2title": Task("items", ('What is the title of item "{sid}"?',), "{title}"),
    "next_title": Task("samples", (
        "The user has sequentially interacted with items {history}. Can you recommend the next item for him? "
        "Tell me the title of the item.",), "{title}"),
    "next_description": Task("samples", (
        "Please review the user's historical interactions: {history}, and describe what kind of item he "
        "still needs.",), "{description}"),
    "text2token": Task("tokens", (
        "Identify the specific SID token shared by items that exhibit the following scope and "
        'characteristics: "{description}"',), "{token}"),
    "token2text": Task("tokens", (
        "Describe the typical scope and shared features of items associated with the token: "
        '"{token}"',), "{description}"),
    "description2sid": Task("items", ("Can you tell me what item is described as {about}?",), "{sid}"),
    "text2sid": Task("items", ("What item is called {title} and described as {about}?",), "{sid}"),
    "name_item": Task("items", ("Could you please tell me what item {sid} is called?",), "{title}"),
    "describe_item": Task("items", ("Briefly describe item {sid}.",), "{description}"),
    "sid2text": Task("items", (
        "What is the title and description of item {sid}?",), "{title}\n\n{description}"),
    "retrieve": Task("samples", (
        "The user has interacted with items {history} in chronological order. Can you predict the next "
        "possible item that the user may expect?",
        "Based on the items that the user has interacted with: {history}, can you determine what item would "
        "be recommended to the user next?",
        "Here is the item interaction history of the user: {history}, what to recommend to the user "
        "next?"), "{sid}"),
    "titles2sid": Task("samples", (
        "The user has bought items with these titles, in chronological order: {titles}. Which item comes "
        "next?",), "{sid}"),
    "search": Task("queries", (
        "As a recommender system, you are assisting a user who expresses a desire to obtain an item with the "
        "following characteristics: {query}. Please recommend an item that meets these criteria.",
        "The user wants a new item and searches for: {query}. Please select a suitable item that matches the "
        "search intent.",
        "Based on the user's current query {query}, please generate an item that matches the user's "
        "intent."), "{sid}"),
}
TASK_NAMES = list(TASKS)
TS_REC = "next,title2sid,sid2title,next_title,next_description,text2token,token2text"
STAR_ALIGN = "title2sid,description2sid,text2sid,name_item,describe_item,sid2text"

# Settings by backbone and stage. "hf" is TS-Rec's section 5.1.4, "align" is STAR's A.4.
PRESETS = {
    "hf": dict(tasks=TS_REC, epochs=3, lr=3e-4, beta2=0.999, batch_size=1024, warmup=20, dropout=0.0,
               weight_decay=0.0, evals_per_epoch=4, max_response=256, micro_tokens=4096),
    "tiny": dict(tasks="next_brief,sequence:0.5,basket:0.5,title2sid,sid2title:0.1,text2token,token2text:0.1",
                 epochs=6, lr=1.5e-3, beta2=0.95, batch_size=64, warmup=100, dropout=0.1,
                 weight_decay=0.01, evals_per_epoch=1, max_response=128, micro_tokens=3072),
    "align": dict(tasks=STAR_ALIGN, epochs=10, lr=1e-3, beta2=0.999, batch_size=16, weight_decay=0.0,
                  evals_per_epoch=1),
}

# ---- Prompts and examples: for training, evaluation and RL -------
def item_fields(item: dict) -> dict[str, str]:
    """What a template can say about an item."""
    about = " ".join(item["description"].split()[:DESCRIPTION_WORDS])
    return {"sid": "".join(item["sid"]), "title": item["title"], "description": item["description"],
            "about": about}

def history_fields(history: list, item_of: dict) -> dict[str, str]:
    """What a template can say about a history of item_ids."""
    items = [item_of[item_id] for item_id in history]
    return {"history": ", ".join("".join(item["sid"]) for item in items),
            "titles": ", ".join(f'"{item["title"]}"' for item in items)}

def row_fields(source: str, row: dict, item_of: dict, rng: random.Random) -> dict[str, str]:
    """What a template can say about a row of its task's data."""
    if source == "samples":
        return history_fields(row["history"], item_of) | item_fields(item_of[row["target"]])
    if source == "users":
        sids = ["".join(item_of[item_id]["sid"]) for item_id in row["items"]]
        return {"sequence": ", ".join(sids), "basket": ", ".join(rng.sample(sids, len(sids)))}
    if source == "items":
        return item_fields(row)
    if source == "queries":
        return {"query": row["query"], **item_fields(item_of[row["item_id"]])}
    return {"token": row["token"], "description": row["description"]}

class Pair(NamedTuple):
    """An instruction, its response, and the row of data they were made of."""
    row: dict
    instruction: str
    response: str

def make_pairs(name: str, data: dict[str, list[dict]], seed: str = "") -> list[Pair]:
    """Fill a task's templates for every row that has the texts; `seed` draws templates and baskets."""
    task, rng, pairs = TASKS[name], random.Random(f"{seed} {name}"), []
    item_of = {item["item_id"]: item for item in data["items"]}
    for row in data[task.source]:
        fields = row_fields(task.source, row, item_of, rng)
        instruction = rng.choice(task.instructions)
        used = [text for key, text in fields.items() if "{" + key + "}" in instruction + task.response]
        if all(text.strip() for text in used):
            pairs.append(Pair(row, instruction.format(**fields), task.response.format(**fields)))
    return pairs

def prompt_ids(tokenizer, instructions: list[str]) -> list[list[int]]:
    """Token ids of the prompts, with BOS if the tokenizer adds one."""
    empty = tokenizer("").input_ids
    bos = [tokenizer.bos_token_id] if empty and empty[0] == tokenizer.bos_token_id else []
    texts = [PROMPT.format(instruction=instruction) for instruction in instructions]
    return [bos + ids for ids in tokenizer(texts, add_special_tokens=False).input_ids]

class Example(NamedTuple):
    """Token ids of prompt and response. The loss counts the response, which begins at `start`."""
    task: str
    ids: list[int]
    start: int
    weight: float = 1.0                 # of each of its supervised tokens

def make_examples(tokenizer, name: str, data: dict, max_response: int, weight: float = 1.0,
                  seed: str = "") -> list[Example]:
    """A task's examples. EOS ends a text; texts are cut to `max_response` tokens, prompts never."""
    pairs = make_pairs(name, data, seed)
    if not pairs:
        return []
    prompts = prompt_ids(tokenizer, [pair.instruction for pair in pairs])
    responses = tokenizer([pair.response for pair in pairs], add_special_tokens=False).input_ids
    if TASKS[name].is_text:
        responses = [(ids + [tokenizer.eos_token_id])[:max_response] for ids in responses]
    return [Example(name, prompt + response, len(prompt), weight)
            for prompt, response in zip(prompts, responses)]

class Batch(NamedTuple):
    """A padded batch; for each supervised token, in reading order, its weight and its task."""
    ids: Tensor                         # (B, T)
    labels: Tensor                      # (B, T): the next token if it belongs to a response, else -100
    weights: Tensor                     # (S,)
    tasks: Tensor                       # (S,) places in TASK_NAMES

def collate(examples: list[Example], device: torch.device) -> Batch:
    """Pad on the right.

    ids     p0 p1 p2 r0 r1          prompt p0 p1 p2, response r0 r1: position t predicts token t + 1
    labels  -100 -100 r0 r1 -100
    """
    length = -(-max(len(e.ids) for e in examples) // 8) * 8     # a multiple of 8: fewer shapes
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, e in enumerate(examples):
        ids[row, :len(e.ids)] = torch.tensor(e.ids)
        labels[row, e.start - 1:len(e.ids) - 1] = torch.tensor(e.ids[e.start:])
    supervised = torch.tensor([len(e.ids) - e.start for e in examples])
    weights = torch.tensor([e.weight for e in examples]).repeat_interleave(supervised)
    tasks = torch.tensor([TASK_NAMES.index(e.task) for e in examples]).repeat_interleave(supervised)
    return Batch(*(tensor.to(device) for tensor in (ids, labels, weights, tasks)))

# ---- Batches -----------------------------------------------------
def epoch_batches(examples: list[Example], batch_size: int, seed: str) -> list[list[Example]]:
    """Shuffle; sort by length in pools of 16 batches, to keep padding small; shuffle the batches."""
    rng = random.Random(seed)
    order = rng.sample(examples, len(examples))
    pool_size, batches = 16 * batch_size, []
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start:start + pool_size], key=lambda e: len(e.ids))
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches

def micro_batches(batch: list[Example], micro_tokens: int, rank: int,
                  world: int) -> list[list[Example]]:
    """This process's share of a batch, in pieces of at most `micro_tokens` tokens.

    All ranks must run the same number of forward passes, so a rank with fewer gets one with zero weight.
    """
    lengths = [len(e.ids) for e in batch]
    if world > 1:
        micro_tokens = min(micro_tokens, -(-sum(lengths) // world))
    pieces = [[batch[row] for row in rows] for rows in length_batches(lengths, micro_tokens)]
    while len(pieces) % world:
        pieces.append([pieces[0][0]._replace(weight=0.0)])
    return pieces[rank::world]

# ---- What trains: everything, the SID rows alone (STAR), or adapters and SID rows (LoRA) ----
def train_sid_rows_only(model, sid_ids: Tensor) -> None:
    """Freeze all but the SID rows of the embedding and, if untied, of the LM head (algorithm 1).

    A hook multiplies the gradient by a mask (V, 1) that is 1 on SID rows. Without weight decay, and with a
    fresh optimizer, the other rows stay the same, bit by bit.
    """
    model.requires_grad_(False)
    for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        mask = torch.zeros(len(matrix), 1, device=matrix.device)
        mask[sid_ids.flatten().to(matrix.device)] = 1
        matrix.requires_grad_(True)
        matrix.register_hook(lambda grad, mask=mask: grad * mask)

def add_dropout(model, p: float) -> None:
    """Drop parts of embeddings and residual branches of a Llama-like model in training."""
    def hook(module, inputs, output):
        return F.dropout(output, p, model.training)
    model.get_input_embeddings().register_forward_hook(hook)
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            module.register_forward_hook(hook)

# ---- Loss and optimisation ---------------------------------------
class ResponseLoss(nn.Module):
    """The loss, as a module because FSDP wraps modules."""
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of each supervised token (eq. 5); (B, T), (B, T) -> (S,)."""
        # Causal attention never sees the padding on the right, so no mask is needed
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state     # (B, T, D)
        supervised = labels != -100
        logits = hidden[supervised] @ self.model.get_output_embeddings().weight.T            # (S, V)
        return F.cross_entropy(logits.float(), labels[supervised], reduction="none")

def shard(loss_of: ResponseLoss, world: int) -> None:
    """FSDP: each process keeps a share of every layer's weights, gradients and moments."""
    mesh = dist.init_device_mesh(loss_of.model.device.type, (world,))
    for module in list(loss_of.modules()):
        if type(module).__name__ in (loss_of.model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(loss_of, mesh=mesh)

def make_optimizer(model, lr: float, beta2: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on what trains, with weight decay on matrices but not on norms and biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=model.device.type == "cuda")

def learning_rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """Linear warm-up over at most a tenth of the run, then a cosine down to zero."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

@torch.no_grad()
def validation_loss(loss_of: ResponseLoss, examples: list[Example], micro_tokens: int, precision: str,
                    rank: int, world: int) -> float:
    """Mean negative log-likelihood per supervised token, over all processes."""
    device = next(loss_of.parameters()).device
    total, count = (torch.zeros((), dtype=torch.double, device=device) for _ in range(2))
    loss_of.eval()
    for piece in micro_batches(examples, micro_tokens, rank, world):
        ids, labels, weights, _ = collate(piece, device)
        with autocast(device, precision):
            losses = loss_of(ids, labels)
        total += losses[weights > 0].double().sum()
        count += (weights > 0).sum()
    loss_of.train()
    return (sum_over_processes(total) / sum_over_processes(count)).item()

def task_losses(nll: Tensor, counts: Tensor, weights: dict[str, float]) -> dict[str, float]:
    """Mean loss per supervised token, weighted as in training, and by task; nll, counts (tasks,)."""
    nll = sum_over_processes(nll.clone()).tolist()
    counts = sum_over_processes(counts.clone()).tolist()
    seen = [(name, n, count) for name, n, count in zip(TASKS, nll, counts) if count]
    loss = sum(weights[name] * n for name, n, _ in seen) / sum(weights[name] * c for name, _, c in seen)
    return {"loss": loss, **{f"loss/{name}": n / count for name, n, count in seen}}

# ---- Data --------------------------------------------------------
def user_sequences(samples: list[dict]) -> list[dict]:
    """Each user's items in order, from the samples; in pieces of at most MAX_SEQUENCE items."""
    sequences, last_of = [], {}
    for sample in samples:
        history, items = sample["history"], last_of.get(sample["user_id"], [])
        if items[-len(history):] != history:    # it does not follow the user's last sample
            items = last_of[sample["user_id"]] = list(history)
            sequences.append({"user_id": sample["user_id"], "items": items})
        items.append(sample["target"])
    return [{**row, "items": row["items"][start:start + MAX_SEQUENCE]} for row in sequences
            for start in range(0, len(row["items"]) - 1, MAX_SEQUENCE - 1)]     # pieces share one item

def read_queries(path: Path, known: set, split: str) -> list[dict]:
    """The search queries of one split, {"item_id", "query", "split"}."""
    rows = read_jsonl(path, {"item_id": ID, "query": str, "split": str}, known=known)
    return [row for row in rows if row["split"] == split]

def read_data(run: Path, items: list[dict], tasks) -> dict[str, list[dict]]:
    """What the tasks need of the run's files; test.jsonl is never read."""
    known, sources = {item["item_id"] for item in items}, {TASKS[name].source for name in tasks}
    data = {"items": items}
    if sources & {"samples", "users"}:
        data["samples"] = read_samples(run / "train.jsonl", known)
        data["users"] = user_sequences(data["samples"])
    if "tokens" in sources:
        data["tokens"] = read_semantics(run / "semantics.jsonl", items)
    if "queries" in sources:
        data["queries"] = read_queries(run / "queries.jsonl", known, "train")
    return data

def show_task(tokenizer, name: str, examples: list[Example]) -> None:
    """Print a task's size and its first example, with the supervised tokens between >> and <<."""
    tokens = sum(len(e.ids) for e in examples)
    supervised = sum(len(e.ids) - e.start for e in examples)
    print(f"task {name} | {len(examples)} examples | {tokens} tokens | {supervised} of them supervised")
    for e in examples[:1]:
        text = f"{tokenizer.decode(e.ids[:e.start])}>>{tokenizer.decode(e.ids[e.start:])}<<"
        print(f"example | {text!r}")

# ---- Command line ------------------------------------------------
def parse_weights(text: str, known, kind: str) -> dict[str, float]:
    """Names with optional weights: "next,sid2title:0.1" -> {"next": 1.0, "sid2title": 0.1}."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a {kind}; choose from {', '.join(known)}")
        weights[name] = number(float, 1e-6)(weight or "1")
    return weights

def parse_tasks(text: str) -> dict[str, float]:
    """Tasks, and the weight of each of their supervised tokens."""
    return parse_weights(text, TASKS, "task")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed", "device")
    flag = parser.add_argument
    flag("--stage", choices=("align", "sft"), default="sft",
         help="align: only the SID rows train (STAR); sft: all weights, or --lora's")
    flag("--from", dest="start", help="checkpoint to start from, instead of RUN/init.pt")
    flag("--out", help="checkpoint to write, instead of RUN/align.pt or RUN/sft.pt")
    flag("--resume", action="store_true", help="continue an interrupted run with the same flags")
    # The defaults of the next eight depend on backbone and stage, see PRESETS
    flag("--tasks", type=parse_tasks, metavar="NAME,NAME:WEIGHT", help=f"of {', '.join(TASKS)}")
    flag("--epochs", type=number(int, 1), help="passes over all examples")
    flag("--lr", type=number(float, 0), help="peak learning rate")
    flag("--batch-size", type=number(int, 1), help="examples per update, of all processes together")
    flag("--warmup", type=number(int, 0), help="updates of warm-up, at most a tenth of the run")
    flag("--dropout", type=number(float, 0, 1), help="of embeddings and residual branches")
    flag("--evals-per-epoch", type=number(int, 1), help="validations per epoch")
    flag("--micro-tokens", type=number(int, 1), help="tokens per forward pass: memory, not method")
    flag("--lora", type=number(int, 0), default=0, metavar="R",
         help="train adapters of rank R and the SID rows; 0: all weights; STAR: 8")
    flag("--precision", choices=("fast", "float32", "bfloat16"), default="fast",
         help="arithmetic over float32 weights; fast: bf16 where the hardware has it")
    flag("--fsdp", action="store_true", help="under torchrun: each process keeps a share of the weights")
    flag("--grad-checkpoint", action="store_true", help="recompute activations: less memory, more time")
    flag("--patience", type=number(int, 1), default=3, help="validations without gain before it stops")
    flag("--log-every", type=number(int, 1), default=100, help="updates per log line")
    flag("--save-every", type=number(int, 1), default=500, help="updates between saves for --resume")
    flag("--keep", action="store_true", help="keep the weights of every validation, OUT_STEP.pt")
    args = parser.parse_args(argv)
    if args.lora and args.stage == "align" or args.fsdp and (args.lora or args.stage == "align"):
        parser.error("--stage align, --lora and --fsdp exclude each other")
    if args.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp needs torchrun --nproc-per-node N -- train.py --fsdp")
    return args

def fill_in(args: argparse.Namespace, backbone: str, has_queries: bool) -> None:
    """Set what the flags leave open from PRESETS. With queries the task `search` is trained too."""
    preset = dict(PRESETS["tiny" if backbone == "tiny" else "hf"])
    if args.stage == "align":
        preset |= PRESETS["align"]
    elif has_queries:
        preset["tasks"] += ",search"
    preset["tasks"] = parse_tasks(preset["tasks"])
    for key, value in preset.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.backbone = backbone
    args.recommends = next((name for name in args.tasks if TASKS[name].recommends), "next")
    if args.lora:
        args.weight_decay = 0.0         # it would shrink the masked rows

def load_examples(args: argparse.Namespace, tokenizer, run: Path,
                  data: dict) -> tuple[dict[str, list[Example]], list[Example]]:
    """The training examples of each task; for validation next items, or 5 % of them with align."""
    examples = {}
    for name, weight in args.tasks.items():
        examples[name] = make_examples(tokenizer, name, data, args.max_response, weight, f"{args.seed} 0")
        show_task(tokenizer, name, examples[name])
    if args.stage == "align":
        valid = [e for rows in examples.values() for e in rows[::HELD_OUT_EVERY]]
        for rows in examples.values():
            del rows[::HELD_OUT_EVERY]
    else:
        samples = read_samples(run / "valid.jsonl", {item["item_id"] for item in data["items"]})
        valid = make_examples(tokenizer, args.recommends, {**data, "samples": samples}, 0)
    if not any(examples.values()):
        stop(f"--tasks: this run has no examples of {', '.join(examples)}; choose other tasks")
    return examples, valid

def prepare_model(args: argparse.Namespace, model, sid_ids: Tensor) -> None:
    """Choose what trains; add dropout and gradient checkpointing."""
    if args.stage == "align" or args.lora:
        train_sid_rows_only(model, sid_ids)
    if args.lora:
        add_lora(model, args.lora)
    add_dropout(model, args.dropout)
    if args.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})

def main() -> None:
    args = parse_args()
    device, rank, world = join_processes(args.device, args.seed)
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(args.start or run / "init.pt", device, items)
    fill_in(args, checkpoint["args"]["backbone"], (run / "queries.jsonl").exists())

    data = read_data(run, items, args.tasks)
    examples, valid = load_examples(args, tokenizer, run, data)
    check_lengths(max(len(e.ids) for rows in [*examples.values(), valid] for e in rows), model.config)
    num_examples = sum(len(rows) for rows in examples.values())
    steps_per_epoch = math.ceil(num_examples / args.batch_size)
    steps = steps_per_epoch * args.epochs
    eval_every = max(1, steps_per_epoch // args.evals_per_epoch)

    sid = checkpoint["sid"]
    prepare_model(args, model, sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]))
    loss_of = ResponseLoss(model).train()
    if args.fsdp:
        shard(loss_of, world)
    optimizer = make_optimizer(model, args.lr, args.beta2, args.weight_decay)
    print(f"device {device} x {world} | {count_parameters(model):.2f} M parameters | {num_examples} "
          f"examples, {len(valid)} for validation | {args.epochs} epochs of {steps_per_epoch} updates")

    # Where the run stands
    out = Path(args.out or run / f"{args.stage}.pt")
    log_path = out.with_name(f"{out.stem}_log.jsonl")
    resume_path = out.with_name(f"{out.stem}_resume.pt")
    sid = update_sid(sid, items, {sample["target"] for sample in data.get("samples", ())})
    settings = {**vars(args), "examples": num_examples, "parameters": count_parameters(model),
                "processes": world, "catalogue": sid["digest"]}
    step, best, bad_evals, log = 0, math.inf, 0, []
    if args.resume and resume_path.exists():
        state = load_progress(resume_path, model, optimizer, settings)
        step, best, bad_evals, log = (state[name] for name in ("step", "best", "bad_evals", "log"))
        print(f"continuing after update {step}")
    interrupted, leave, batches = catch_interrupts(device), False, []
    nll, counts = torch.zeros(len(TASKS), device=device), torch.zeros(len(TASKS), device=device)
    start, tokens = time.time(), 0      # since the last log line, as are nll and counts
    bar = tqdm(total=steps, initial=step, desc=args.stage, unit="step", disable=rank > 0 or None)

    while step < steps and bad_evals < args.patience and not leave:
        # Data order and dropout follow from seed and step, so that a resumed run repeats them
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or not batches:
            if epoch and "basket" in examples:  # baskets are shuffled again in every epoch
                examples["basket"] = make_examples(tokenizer, "basket", data, args.max_response,
                                                   args.tasks["basket"], f"{args.seed} {epoch}")
            everything = [e for rows in examples.values() for e in rows]
            batches = epoch_batches(everything, args.batch_size, f"{args.seed} {epoch}")
        batch = batches[place]
        torch.manual_seed(args.seed + 1_000_003 * (step * world + rank))
        lr = learning_rate(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward in pieces; the gradient is that of the mean over the whole batch
        optimizer.zero_grad(set_to_none=True)
        supervised = sum(e.weight * (len(e.ids) - e.start) for e in batch)
        for piece in micro_batches(batch, args.micro_tokens, rank, world):
            ids, labels, weights, tasks = collate(piece, device)
            with autocast(device, args.precision):
                token_losses = loss_of(ids, labels)     # (S,)
            loss = (token_losses * weights).sum() / supervised
            (loss * world if args.fsdp else loss).backward()    # FSDP averages over processes
            nll.index_add_(0, tasks, token_losses.detach() * (weights > 0))
            counts.index_add_(0, tasks, (weights > 0).float())
        if not args.fsdp:
            sum_gradients(model)
        grad_norm = torch.nn.utils.clip_grad_norm_(loss_of.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        step, tokens = step + 1, tokens + sum(len(e.ids) for e in batch)
        bar.update()

        # Log, validate, save
        row, better = {"step": step, "epoch": round(step / steps_per_epoch, 3)}, False
        if step % args.log_every == 0:
            row |= {**task_losses(nll, counts, args.tasks), "lr": lr,
                    "grad_norm": float(grad_norm.full_tensor() if args.fsdp else grad_norm),
                    "tokens_per_second": round(tokens / (time.time() - start))}
            bar.write(f"step {step:05d}/{steps} | loss {row['loss']:.4f} | lr {lr:.1e} | "
                      f"grad {row['grad_norm']:.2f} | {row['tokens_per_second']} tok/s")
            nll, counts = torch.zeros_like(nll), torch.zeros_like(counts)
            start, tokens = time.time(), 0
        validate = step % eval_every == 0 or step == steps
        if validate:
            row["valid_loss"] = validation_loss(loss_of, valid, args.micro_tokens, args.precision,
                                                rank, world)
            better = row["valid_loss"] < best
            best, bad_evals = (row["valid_loss"], 0) if better else (best, bad_evals + 1)
            news = "best so far, saved" if better else f"no better for {bad_evals} validations"
            bar.write(f"step {step:05d}/{steps} | valid loss {row['valid_loss']:.4f} | {news}")
        if not all(math.isfinite(value) for value in row.values()):
            stop(f"a loss or gradient of step {step} is not finite; choose a lower --lr")
        if len(row) > 2:
            log.append(row)
        leave = interrupted()
        if better or validate and args.keep:
            weights = get_model_state_dict(model, options=FULL_STATE)   # empty but on rank 0
            weights = merge_lora(model, weights) if rank == 0 else {}
            paths = [out] if better else []
            if args.keep:
                paths.append(out.with_name(f"{out.stem}_{step:05d}.pt"))
            for path in paths if rank == 0 else []:
                save_model(path, model, tokenizer, sid, weights, stage=args.stage, args=vars(args),
                           step=step, metrics={"valid_loss": row["valid_loss"]})
        if rank == 0 and (validate or leave or step % args.save_every == 0):
            write_jsonl(log_path, log)
        if leave or step % args.save_every == 0:
            state = {"step": step, "best": best, "bad_evals": bad_evals, "log": log}
            save_progress(resume_path, model, optimizer, state, settings, rank)

    bar.close()
    if rank == 0 and not leave:
        resume_path.unlink(missing_ok=True)
    print(f"stopped after update {step}: continue with --resume" if leave else f"wrote {out}, {log_path}")
    leave_processes(leave)

if __name__ == "__main__":
    main()
