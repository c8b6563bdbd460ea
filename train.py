"""Stage 4: train the SID rows alone (align, not TS-Align), then the whole model (sft).

Every task is a template that turns data into a prompt and a response. The loss counts the response only.

    Eq. 5        L_SFT = - sum_(X, Y) sum_j log pi(Y_j | X, Y_<j)     TS-Rec (arXiv 2602.22632), 3.3
    Algorithm 1  grad E <- grad E * m,  m_i = [i is a SID token]      STAR, 3.1: --stage align

Reads   RUN/init.pt (or --from), items.jsonl, train.jsonl, valid.jsonl, semantics.jsonl, queries.jsonl
Writes  RUN/align.pt or sft.pt: the last weights, or with --patience the best; sft_log.jsonl, sft_resume.pt

Differs from the papers
  1. Each task has its share of a weighted mean loss, and of an epoch's examples (`--tasks`).
  2. A text response ends with EOS, unless cut. A SID does not: its length is fixed.
  3. The tiny backbone has its own settings and tasks: PRESETS. --loss trie scores the trie's children.
  4. Prompts are plain lines, STAR's chat messages. --lora: not QLoRA; SID rows only, STAR's all rows.
  5. --stage align validates on 5 % of its examples and does not train on them.

Examples
  python train.py --stage align  # then: --from runs/demo/align.pt
"""
import argparse
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from extract_semantics import read_queries, read_semantics
from init_embeddings import (
    Trie, add_dropout, add_lora, autocast, build_trie, catch_interrupts, check_lengths, count_parameters,
    fingerprint, join_processes, leaf_of_items, learning_rate, leave_processes, length_batches, load_model,
    load_progress, make_optimizer, output_paths, path_log_probs, save_model, save_progress, sid_token_ids,
    sum_gradients, sum_over_processes, trie_paths, update_sid)
from tokenize_items import (
    codes_of, make_parser, number, read_catalogue, read_samples, stop, write_jsonl)

# Shapes: B sequences, T tokens, S supervised tokens, V vocabulary rows, D width.
DESCRIPTION_WORDS = 100  # of a description in a prompt
MAX_SEQUENCE = 50        # items in one example of `sequence`
PAIRS_PER_ITEM = 5       # examples of `similar`
HELD_OUT_EVERY, MAX_GRAD_NORM = 20, 1.0  # 1 in 20 validates align; gradient clipping

class Task(NamedTuple):
    """One task: its data, its templates (one is drawn for each example), its response."""
    source: str  # "samples", "users", "pairs", "items", "tokens", "queries"
    instructions: tuple[str, ...]
    response: str
    end: str = "\n"  # comes after the instruction

    @property
    def recommends(self) -> bool:
        return self.source == "samples" and self.response == "{sid}"

TASKS = {  # TS-Rec, A.2; from description2sid on STAR, A.2; the last three: ours
    "next": Task("samples", (
        "The user has interacted with items {history} in chronological order. Can you predict the next "
        "possible item that the user may expect?",), "{sid}"),
    "title2sid": Task("items", ("Which item has the title: {title}?",), "{sid}"),
    "sid2title": Task("items", ('What is the title of item "{sid}"?',), "{title}"),
    "next_title": Task("samples", (
        "The user has sequentially interacted with items {history}. Can you recommend the next item for him? "
        "Tell me the title of the item.",), "{title}"),
    "next_description": Task("samples", (
        "Please review the user's historical interactions: {history}, and describe what kind of item he "
        "still needs.",), "{description}"),
    "text2token": Task("tokens", (  # TS-Align, 4.2
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
    "search": Task("queries", (
        "As a recommender system, you are assisting a user who expresses a desire to obtain an item with the "
        "following characteristics: {query}. Please recommend an item that meets these criteria.",
        "The user wants a new item and searches for: {query}. Please select a suitable item that matches the "
        "search intent.",
        "Based on the user's current query {query}, please generate an item that matches the user's "
        "intent."), "{sid}"),
    # sequence trains all items but the first, with the token ids of next_brief
    "next_brief": Task("samples", ("The user bought {items}",), "{sid}", end=""),
    "sequence": Task("users", ("The user bought {first}",), "{rest}", end=""),
    "similar": Task("pairs", ("The user bought {first}",), "{rest}", end=""),
}
TS_REC = "next,title2sid:0.1,sid2title:0.1,next_title:0.1,next_description:0.1,text2token:0.1,token2text:0.1"
STAR_ALIGN = "title2sid,description2sid,text2sid,name_item,describe_item,sid2text"

# By backbone and stage. lr, batch, epochs: "hf" as TS-Rec 5.1.4 (and patience), "align" as STAR A.4.
PRESETS = {
    "hf": dict(tasks=TS_REC, loss="vocab", epochs=3, lr=3e-4, beta2=0.999, batch_size=1024, warmup=20,
               dropout=0.0, weight_decay=0.0, evals_per_epoch=4, patience=3, max_response=256,
               micro_tokens=4096),
    "tiny": dict(tasks="sequence,similar:0.05,title2sid:0.05,text2token:0.02,token2text:0.02", loss="trie",
                 epochs=16, lr=1.5e-3, beta2=0.95, batch_size=64, warmup=100, dropout=0.2,
                 weight_decay=0.01, evals_per_epoch=1, patience=0, max_response=128, micro_tokens=3072),
    "align": dict(tasks=STAR_ALIGN, loss="vocab", epochs=10, lr=1e-3, beta2=0.999, batch_size=16,
                  weight_decay=0.0, evals_per_epoch=1, patience=3),
}

# ---- Prompts and examples: for training, evaluation and RL ----
def item_fields(item: dict) -> dict[str, str]:
    """What a template can say about an item."""
    about = " ".join(item["description"].split()[:DESCRIPTION_WORDS])
    sid, title, description = "".join(item["sid"]), item["title"], item["description"]
    return {"sid": sid, "title": title, "description": description, "about": about}

def history_fields(history: list, item_of: dict) -> dict[str, str]:
    """What a template can say about a history of item_ids."""
    items = [item_of[item_id] for item_id in history]
    sids = ["".join(item["sid"]) for item in items]
    return {"history": ", ".join(sids), "items": "".join(sids), "first": sids[0], "rest": "".join(sids[1:])}

def row_fields(source: str, row: dict, item_of: dict) -> dict[str, str]:
    """What a template can say about a row of its task's data."""
    if source == "samples":
        return history_fields(row["history"], item_of) | item_fields(item_of[row["target"]])
    if source in ("users", "pairs"):
        return history_fields(row["items"], item_of)
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
    """Fill a task's templates for every row that has the texts; `seed` draws the templates."""
    task, rng, pairs = TASKS[name], random.Random(f"{seed} {name}"), []
    item_of = {item["item_id"]: item for item in data["items"]}
    for row in data[task.source]:
        fields = row_fields(task.source, row, item_of)
        instruction = rng.choice(task.instructions)
        used = [text for key, text in fields.items() if "{" + key + "}" in instruction + task.response]
        if all(text.strip() for text in used):
            instruction = instruction.format(**fields) + task.end
            pairs.append(Pair(row, instruction, task.response.format(**fields)))
    return pairs

def prompt_ids(tokenizer, instructions: list[str]) -> list[list[int]]:
    """Token ids of the prompts, with BOS if the tokenizer adds one."""
    empty = tokenizer("").input_ids
    bos = [tokenizer.bos_token_id] if empty and empty[0] == tokenizer.bos_token_id else []
    return [bos + ids for ids in tokenizer(instructions, add_special_tokens=False).input_ids]

class Example(NamedTuple):
    """Token ids of prompt and response. The loss counts the response, which begins at `start`."""
    task: str
    ids: list[int]
    start: int
    weight: float = 1.0     # of each of its supervised tokens
    leaves: list[int] = []  # the SIDs of the response, if they are scored over the trie
Examples = dict[str, list[Example]]  # by task

def make_examples(tokenizer, name: str, data: dict, max_response: int, seed: str = "",
                  leaf_of: dict[str, int] = {}) -> list[Example]:
    """A task's examples. EOS ends a text, unless it is cut to `max_response` tokens.

    leaf_of, with --loss trie: SID -> leaf of the trie.
    """
    pairs = make_pairs(name, data, seed)
    if not pairs:
        return []
    prompts = prompt_ids(tokenizer, [pair.instruction for pair in pairs])
    responses = tokenizer([pair.response for pair in pairs], add_special_tokens=False).input_ids
    if "{title}" in TASKS[name].response or "{description}" in TASKS[name].response:
        responses = [(ids + [tokenizer.eos_token_id])[:max_response] for ids in responses]
    examples, on_trie = [], TASKS[name].response in ("{sid}", "{rest}")
    for pair, prompt, response in zip(pairs, prompts, responses):
        sids = pair.response.replace("<a_", " <a_").split() if leaf_of and on_trie else []
        examples.append(Example(name, prompt + response, len(prompt), leaves=[leaf_of[sid] for sid in sids]))
    return examples

class Batch(NamedTuple):
    """A padded batch, and what it supervises: S tokens and, over the trie, R whole SIDs."""
    ids: Tensor         # (B, T)
    places: Tensor      # (S,) the positions, b * T + t, that predict the tokens
    labels: Tensor      # (S,) these tokens
    sid_places: Tensor  # (R,) the positions that predict the first token of each SID
    leaves: Tensor      # (R,) these SIDs, leaves of the trie
    weights: Tensor     # (S + R * L,) of each token's loss
    tasks: Tensor       # (S + R * L,) places in TASKS

def collate(examples: list[Example], device: torch.device) -> Batch:
    """Pad on the right, to a multiple of 8: fewer shapes. Position t predicts token t + 1."""
    length = -(-max(len(e.ids) for e in examples) // 8) * 8
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    places, labels, sid_places, leaves, of_token, of_sid = [], [], [], [], [], []
    for row, e in enumerate(examples):
        ids[row, :len(e.ids)] = torch.tensor(e.ids)
        supervised = range(e.start, len(e.ids))
        if e.leaves:
            depth = len(supervised) // len(e.leaves)
            sid_places += [row * length + t - 1 for t in supervised[::depth]]
            leaves += e.leaves
            of_sid += [row] * len(supervised)
        else:
            places += [row * length + t - 1 for t in supervised]
            labels += e.ids[e.start:]
            of_token += [row] * len(supervised)
    weights = torch.tensor([e.weight for e in examples])[of_token + of_sid]
    tasks = torch.tensor([list(TASKS).index(e.task) for e in examples])[of_token + of_sid]
    parts = [torch.tensor(part, dtype=torch.long) for part in (places, labels, sid_places, leaves)]
    tensors = [ids, *parts, weights, tasks]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]  # copies from it do not wait
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))

# ---- Batches -----------------------------------
def weigh(examples: Examples, shares: dict[str, float]) -> tuple[Examples, dict[str, int]]:
    """Give each task its share of the loss; -> examples with weights, and how many an epoch takes.

    An epoch takes all examples of the tasks with the largest share. The others give fewer, in proportion
    to their share. A weight per task makes up for lengths.
    """
    most = max(shares[name] for name in examples)
    largest = max(len(rows) for name, rows in examples.items() if shares[name] == most)
    sizes, tokens = {}, {}
    for name, rows in examples.items():
        sizes[name] = min(len(rows), math.ceil(largest * shares[name] / most))
        supervised = sum(len(e.ids) - e.start for e in rows)
        tokens[name] = supervised / len(rows) * sizes[name]  # in an epoch
    scale = sum(tokens.values()) / sum(shares[name] for name in examples)
    for name, rows in examples.items():
        examples[name] = [e._replace(weight=scale * shares[name] / tokens[name]) for e in rows]
    return examples, sizes

def epoch_batches(examples: Examples, sizes: dict, batch_size: int, seed: str) -> list[list[Example]]:
    """The batches of an epoch: sizes[name] examples of each task, drawn and shuffled."""
    rng = random.Random(seed)
    order = [e for name, rows in examples.items() for e in rng.sample(rows, sizes[name])]
    rng.shuffle(order)
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]

def micro_batches(batch: list[Example], micro_tokens: int, rank: int, world: int) -> list[list[Example]]:
    """This process's share of a batch, in pieces of `micro_tokens` tokens or one example."""
    lengths = [len(e.ids) for e in batch]
    if world > 1:
        micro_tokens = min(micro_tokens, -(-sum(lengths) // world))  # a piece for each process
    return [[batch[row] for row in rows] for rows in length_batches(lengths, micro_tokens)[rank::world]]

# ---- What trains: everything, or the SID rows alone (STAR) ----
def train_sid_rows_only(model, sid_ids: Tensor) -> None:
    """Freeze all but the SID rows of embedding and untied LM head (algorithm 1).

    A hook multiplies the gradient by a mask (V, 1) that is 1 on SID rows. Without weight decay, and with a
    fresh optimizer, the other rows stay the same, bit by bit.
    """
    model.requires_grad_(False)
    for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        mask = torch.zeros(len(matrix), 1, device=matrix.device)
        mask[sid_ids.flatten().to(matrix.device)] = 1
        matrix.requires_grad_(True)
        matrix.register_hook(lambda grad, mask=mask: grad * mask)

# ---- Loss --------------------------------------
def response_losses(model, trie: Trie, sid_ids: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood of each supervised token (eq. 5): texts, then SIDs; (S + R * L,)."""
    # Causal attention never sees the padding on the right, so no mask is needed
    hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    hidden, head = hidden.flatten(0, 1), model.get_output_embeddings().weight  # (B * T, D)
    logits = hidden.index_select(0, batch.places) @ head.T                     # (S, V)
    losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
    if not len(batch.leaves):
        return losses
    path, sid_losses = trie_paths(trie, batch.leaves[:, None]), []
    for level, ids in enumerate(sid_ids):
        logits = hidden.index_select(0, batch.sid_places + level) @ head[ids].T  # (R, K)
        sid_losses.append(-path_log_probs(trie, level, path, logits[:, None].float())[:, 0])
    return torch.cat([losses, torch.stack(sid_losses, 1).flatten()])

@torch.no_grad()
def validation_loss(model, trie: Trie, sid_ids: Tensor, examples: list[Example], micro_tokens: int,
                    precision: str, rank: int, world: int) -> float:
    """Mean negative log-likelihood per supervised token, over all processes."""
    total, count = torch.zeros(2, dtype=torch.double, device=model.device)
    model.eval()
    for piece in micro_batches(examples, micro_tokens, rank, world):
        batch = collate(piece, model.device)
        with autocast(model.device, precision):
            losses = response_losses(model, trie, sid_ids, batch)
        total += (losses.double() * batch.weights).sum()
        count += batch.weights.sum()
    model.train()
    return (sum_over_processes(total) / sum_over_processes(count)).item()

def task_losses(nll: Tensor, counts: Tensor) -> dict[str, float]:
    """Mean loss per supervised token, weighted, and by task; nll, counts (tasks,)."""
    nll, counts = (sum_over_processes(sums.clone()).tolist() for sums in (nll, counts))
    of_task = {f"loss/{name}": n / count for name, n, count in zip(TASKS, nll, counts) if count}
    return {"loss": sum(nll) / sum(counts), **of_task}

# ---- Data --------------------------------------
def user_sequences(samples: list[dict]) -> list[dict]:
    """Chain samples that continue each other, in pieces of at most MAX_SEQUENCE items."""
    sequences, last_of = [], {}
    for sample in samples:
        history, items = sample["history"], last_of.get(sample["user_id"], [])
        if items[-len(history):] != history:  # it does not follow the user's last sample
            items = last_of[sample["user_id"]] = list(history)
            sequences.append({"user_id": sample["user_id"], "items": items})
        items.append(sample["target"])
    return [{**row, "items": row["items"][start:start + MAX_SEQUENCE]} for row in sequences
            for start in range(0, len(row["items"]) - 1, MAX_SEQUENCE - 1)]  # pieces share one item

def similar_items(items: list[dict]) -> list[dict]:
    """Pairs of items that share all codes but the last."""
    groups, rng = defaultdict(list), random.Random(0)
    for item in items:
        groups[tuple(item["sid"][:-1])].append(item["item_id"])
    return [{"items": rng.sample(group, 2)} for group in groups.values() if len(group) > 1
            for _ in range(PAIRS_PER_ITEM * len(group))]

def read_data(run: Path, items: list[dict], tasks) -> dict[str, list[dict]]:
    """What the tasks need of the run's files; test.jsonl is never read."""
    known, sources = {item["item_id"] for item in items}, {TASKS[name].source for name in tasks}
    data = {"items": items}
    if sources & {"samples", "users"}:
        data["samples"] = read_samples(run / "train.jsonl", known)
        data["users"] = user_sequences(data["samples"])
    if "pairs" in sources:
        data["pairs"] = similar_items(items)
    if "tokens" in sources:
        data["tokens"] = read_semantics(run / "semantics.jsonl", items)
    if "queries" in sources:
        data["queries"] = read_queries(run / "queries.jsonl", known, "train")
    return data

def show_task(tokenizer, name: str, examples: list[Example], size: int, share: float) -> None:
    """Print a task's size and first example, its supervised tokens in >> and <<."""
    first = examples[0]
    prompt, response = tokenizer.decode(first.ids[:first.start]), tokenizer.decode(first.ids[first.start:])
    print(f"task {name} | {len(examples)} examples, {size} an epoch | {share:.1%} of the loss")
    print(f"example | {prompt + '>>' + response + '<<'!r}")

# ---- Command line ------------------------------
def parse_weights(text: str, known, kind: str) -> dict[str, float]:
    """Names with optional weights: "next,sid2title:0.1" -> {"next": 1.0, "sid2title": 0.1}."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a {kind}; choose from {', '.join(known)}")
        weights[name] = number(float, 1e-6)(weight or "1")
    return weights

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed", "device")
    flag = parser.add_argument
    flag("--stage", choices=("align", "sft"), default="sft", help="align: SID rows only (STAR)")
    flag("--from", dest="start", help="checkpoint to start from, instead of RUN/init.pt")
    flag("--out", help="checkpoint to write, instead of RUN/align.pt or RUN/sft.pt")
    flag("--resume", action="store_true", help="continue an interrupted run")
    # None: by backbone and stage, see PRESETS
    flag("--tasks", type=lambda text: parse_weights(text, TASKS, "task"), metavar="NAME,NAME:SHARE",
         help=f"tasks and their shares of the loss; of {', '.join(TASKS)}")
    flag("--loss", choices=("vocab", "trie"), help="of SIDs: over the vocabulary, or the trie's children")
    flag("--epochs", type=number(int, 1), help="passes over the examples of the main task")
    flag("--lr", type=number(float, 0), help="peak learning rate")
    flag("--batch-size", type=number(int, 1), help="examples per update, over all processes")
    flag("--warmup", type=number(int, 0), help="updates of warm-up")
    flag("--dropout", type=number(float, 0, 1), help="of embeddings and residual branches")
    flag("--evals-per-epoch", type=number(int, 1), help="validations per epoch")
    flag("--patience", type=number(int, 0), help="validations without gain; 0: keep the last")
    flag("--micro-tokens", type=number(int, 1), help="tokens per forward pass: memory, not method")
    flag("--lora", type=number(int, 0), default=0, help="rank of adapters; 0: none; STAR: 8")
    flag("--precision", choices=("fast", "float32", "bfloat16"), default="fast", help="fast: bf16 if native")
    flag("--grad-checkpoint", action="store_true", help="less memory, slower")
    flag("--log-every", type=number(int, 1), default=100, help="updates per log line")
    flag("--save-every", type=number(int, 1), default=500, help="updates between saves")
    flag("--keep", action="store_true", help="keep the weights of every validation, OUT_STEP.pt")
    args = parser.parse_args(argv)
    if args.lora and args.stage == "align":
        parser.error("--stage align trains the SID rows alone; leave out --lora")
    return args

def fill_in(args: argparse.Namespace, backbone: str, has_queries: bool) -> None:
    """Set what the flags leave open from PRESETS. With queries, sft also trains `search`."""
    preset = dict(PRESETS["tiny" if backbone == "tiny" else "hf"])
    if args.stage == "align":
        preset |= PRESETS["align"]
    elif has_queries:
        preset["tasks"] += ",search"
    preset["tasks"] = parse_weights(preset["tasks"], TASKS, "task")
    for key, value in preset.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.backbone = backbone
    default = "next_brief" if "sequence" in args.tasks else "next"
    args.recommends = next((name for name in args.tasks if TASKS[name].recommends), default)
    if args.lora:
        args.weight_decay = 0.0  # it would shrink the masked rows

def load_examples(args: argparse.Namespace, tokenizer, run: Path, data: dict,
                  leaf_of: dict) -> tuple[Examples, dict[str, int], list[Example]]:
    """Examples by task, how many an epoch takes, examples to validate on (align: 5 % of all)."""
    examples = {}
    valid = []
    for name in args.tasks:
        rows = make_examples(tokenizer, name, data, args.max_response, f"{args.seed} 0", leaf_of)
        if args.stage == "align":
            valid += rows[::HELD_OUT_EVERY]
            del rows[::HELD_OUT_EVERY]
        if rows:
            examples[name] = rows
        else:
            print(f"task {name} | 0 examples")
    if not examples:
        stop(f"--tasks: this run has no examples of {', '.join(args.tasks)}; choose other tasks")
    if args.stage == "sft":
        samples = read_samples(run / "valid.jsonl", {item["item_id"] for item in data["items"]})
        valid = make_examples(tokenizer, args.recommends, {**data, "samples": samples}, 0, "", leaf_of)
        print(f"validates on {args.recommends} | {len(valid)} examples")
    examples, sizes = weigh(examples, args.tasks)
    for name, rows in examples.items():
        share = args.tasks[name] / sum(args.tasks[n] for n in examples)
        show_task(tokenizer, name, rows, sizes[name], share)
    return examples, sizes, valid

def main() -> None:
    args = parse_args()
    device, rank, world = join_processes(args.device, args.seed)
    run = Path(args.run)
    source = args.start or run / "init.pt"
    out, log_path, resume_path = output_paths(Path(args.out or run / f"{args.stage}.pt"), source)
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(source, device, items)
    fill_in(args, checkpoint["args"]["backbone"], (run / "queries.jsonl").exists())

    sid, data = checkpoint["sid"], read_data(run, items, args.tasks)
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(device)
    trie = build_trie(torch.from_numpy(codes_of(items)), sid["codebook_size"], device)
    names = ("".join(item["sid"]) for item in items)
    leaf_of = dict(zip(names, leaf_of_items(trie).tolist())) if args.loss == "trie" else {}
    examples, sizes, valid = load_examples(args, tokenizer, run, data, leaf_of)
    everything = [e for rows in [*examples.values(), valid] for e in rows]
    check_lengths(-(-max(len(e.ids) for e in everything) // 8) * 8, model.config)  # as collate pads
    num_examples = sum(sizes.values())
    steps_per_epoch = math.ceil(num_examples / args.batch_size)
    eval_every = math.ceil(steps_per_epoch / args.evals_per_epoch)
    steps = steps_per_epoch * args.epochs

    # What trains
    if args.stage == "align" or args.lora:
        train_sid_rows_only(model, sid_ids)
    if args.lora:
        add_lora(model, args.lora)
    add_dropout(model, args.dropout)
    if args.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = make_optimizer(model, args.lr, args.beta2, args.weight_decay)

    # Where the run stands
    sid = update_sid(sid, items, {sample["target"] for sample in data.get("samples", ())})
    settings = {**vars(args), "examples": hash(tuple(hash(tuple(e.ids)) for e in everything)),
                "parameters": count_parameters(model), "processes": world, "catalogue": sid["digest"],
                "SID rows": fingerprint(model, sid_ids)}
    step, best, bad_evals, log = 0, math.inf, 0, []
    if args.resume and resume_path.exists():
        state = load_progress(resume_path, model, optimizer, settings)
        step, best, bad_evals, log = (state[name] for name in ("step", "best", "bad_evals", "log"))
    total = sum(sizes[name] * sum(len(e.ids) for e in rows) / len(rows) for name, rows in examples.items())
    print(f"device {device} x {world} | {count_parameters(model):.2f} M parameters | {args.epochs} epochs of "
          f"{num_examples} examples, {steps_per_epoch} updates, {total * args.epochs / 1e6:.2f} M tokens | "
          f"starts after update {step}")
    interrupted, leave, batches = catch_interrupts(device), False, []
    nll, counts = torch.zeros(2, len(TASKS), device=device, dtype=torch.double)
    start, tokens = time.time(), 0  # since the last log line, as are nll and counts
    bar = tqdm(total=steps, initial=step, desc=args.stage, unit="step", disable=rank > 0 or None)

    while step < steps and (not args.patience or bad_evals < args.patience) and not leave:
        # Order and dropout follow from seed and step: a resumed run repeats them
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or not batches:
            batches = epoch_batches(examples, sizes, args.batch_size, f"{args.seed} {epoch}")
        batch = batches[place]
        torch.manual_seed(args.seed + 1_000_003 * (step * world + rank))
        lr = learning_rate(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # In pieces; the gradient is that of the mean over the whole batch
        optimizer.zero_grad(set_to_none=True)
        supervised = sum(e.weight * (len(e.ids) - e.start) for e in batch)
        for piece in micro_batches(batch, args.micro_tokens, rank, world):
            inputs = collate(piece, device)
            with autocast(device, args.precision):
                losses = response_losses(model, trie, sid_ids, inputs) * inputs.weights
            (losses.sum() / supervised).backward()
            nll.index_add_(0, inputs.tasks, losses.detach().double())
            counts.index_add_(0, inputs.tasks, inputs.weights.double())
        sum_gradients(model)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        bar.update()
        step, tokens = step + 1, tokens + sum(len(e.ids) for e in batch)

        # Log, validate, save
        row, better = {"step": step, "epoch": round(step / steps_per_epoch, 3)}, False
        if step % args.log_every == 0:
            row |= {**task_losses(nll, counts), "lr": lr, "grad_norm": grad_norm.item(),
                    "tokens_per_second": round(tokens / (time.time() - start))}
            bar.write(f"step {step:05d}/{steps} | loss {row['loss']:.4f} | lr {lr:.1e} | "
                      f"grad {row['grad_norm']:.2f} | {row['tokens_per_second']} tok/s")
            nll, counts = torch.zeros_like(nll), torch.zeros_like(counts)
            start, tokens = time.time(), 0
        validate = step % eval_every == 0 or step == steps
        if validate:
            began = time.time()
            row["valid_loss"] = validation_loss(model, trie, sid_ids, valid, args.micro_tokens,
                                                args.precision, rank, world)
            better = row["valid_loss"] < best or not args.patience
            best, bad_evals = (row["valid_loss"], 0) if better else (best, bad_evals + 1)
            start += time.time() - began  # tokens per second leave it out
            bar.write(f"step {step:05d}/{steps} | valid loss {row['valid_loss']:.4f} | "
                      + ("saved" if better else f"no better for {bad_evals} validations"))
        if not all(math.isfinite(value) for value in row.values()):
            stop(f"a loss or gradient of step {step} is not finite; choose a lower --lr")
        if len(row) > 2:
            log.append(row)
        leave = interrupted()
        paths = [out] if better else []
        if args.keep and validate:
            paths.append(out.with_name(f"{out.stem}_{step:05d}.pt"))
        for path in paths if rank == 0 else ():
            save_model(path, model, tokenizer, sid, stage=args.stage, args=vars(args), step=step,
                       metrics={"valid_loss": row["valid_loss"]})
        if rank == 0 and (validate or leave or step % args.save_every == 0):
            write_jsonl(log_path, log)
        if rank == 0 and (leave or step % args.save_every == 0):
            state = {"step": step, "best": best, "bad_evals": bad_evals, "log": log}
            save_progress(resume_path, model, optimizer, state, settings)

    bar.close()
    leave_processes(leave, step, resume_path, f"wrote {out}, {log_path}")

if __name__ == "__main__":
    main()
