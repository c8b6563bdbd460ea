"""Stage 4: supervised fine-tuning on the recommendation and alignment tasks.

Every task is a template that turns data into (instruction, response); the loss counts response tokens only:

    Eq. 5   L_SFT = - sum_(X, Y) sum_j log pi(Y_j | X, Y_<j)       TS-Rec (arXiv 2602.22632), section 3.3

    tasks: next, title2sid, sid2title, next_title, next_description        appendix A.2.1 - A.2.4
           text2token, token2text (TS-Align)                               section 4.2

Reads   RUN/init.pt, RUN/items.jsonl, RUN/train.jsonl, RUN/valid.jsonl, RUN/semantics.jsonl (for TS-Align)
Writes  RUN/sft.pt (the weights with the lowest validation loss), RUN/sft_log.jsonl

Differs from the paper
  1. The loss is the mean over the supervised tokens of a whole batch, however it is cut into micro-batches.
  2. A response that is a text ends with EOS; one that is a SID or a SID token does not: its length is fixed.
  3. The tiny backbone has settings of its own (PRESETS): smaller batches, a higher learning rate, and a tenth of
     the weight for tokens of titles and descriptions, which are more than half of all supervised tokens.

Examples
  python train.py                                                  # the demo, 4 minutes on two cores
  python train.py --run runs/industrial                            # 33 minutes on one core
  python train.py --run runs/qwen --micro-tokens 32768             # Qwen2.5-1.5B on a GPU: the paper's settings
"""
import argparse
import math
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from init_embeddings import autocast, load_model, save_model
from tokenize_items import pick_device, read_catalogue, read_jsonl, read_samples, stop, write_jsonl

# Letters used in shapes: B sequences, T tokens, S supervised tokens, V vocabulary rows, D width.
PROMPT = "{instruction}\n"
SID_TASK, TEXT_TASK = False, True       # does a response end with EOS?


class Task(NamedTuple):
    """One task of the table: which data it reads, its instruction and response, and how the response ends."""
    source: str                         # "samples", "items" or "tokens"
    instruction: str
    response: str
    text: bool


TASKS = {
    "next": Task("samples", "The user has interacted with items {history} in chronological order. Can you predict "
                 "the next possible item that the user may expect?", "{sid}", SID_TASK),
    "title2sid": Task("items", "Which item has the title: {title}?", "{sid}", SID_TASK),
    "sid2title": Task("items", 'What is the title of item "{sid}"?', "{title}", TEXT_TASK),
    "next_title": Task("samples", "The user has sequentially interacted with items {history}. Can you recommend the "
                       "next item for him? Tell me the title of the item.", "{title}", TEXT_TASK),
    "next_description": Task("samples", "Please review the user's historical interactions: {history}, and describe "
                             "what kind of item he still needs.", "{description}", TEXT_TASK),
    "text2token": Task("tokens", "Identify the specific SID token shared by items that exhibit the following scope "
                       'and characteristics: "{description}"', "{token}", SID_TASK),
    "token2text": Task("tokens", "Describe the typical scope and shared features of items associated with the "
                       'token: "{token}"', "{description}", TEXT_TASK),
}

# Settings that depend on the backbone, in one place. "hf" is the paper's section 5.1.4.
PRESETS = {
    "hf": dict(tasks=",".join(TASKS), epochs=3, lr=3e-4, batch_size=1024, warmup=20, dropout=0.0, weight_decay=0.0,
               evals_per_epoch=4, max_response=256, micro_tokens=16384),
    "tiny": dict(tasks="next,title2sid,sid2title:0.1,text2token,token2text:0.1", epochs=6, lr=1.5e-3, batch_size=64,
                 warmup=100, dropout=0.0, weight_decay=0.01, evals_per_epoch=1, max_response=128, micro_tokens=3072),
}


# ---------------------------------------------------------------------------------------------------------
# Prompts and examples: used by training, evaluation and RL alike
# ---------------------------------------------------------------------------------------------------------

def task_fields(source: str, data: dict) -> list[dict]:
    """The values that a task's templates take, one dict per example of its source."""
    sid = {item["item_id"]: "".join(item["sid"]) for item in data["items"]}
    if source == "samples":
        item = {item["item_id"]: item for item in data["items"]}
        return [{"history": ", ".join(sid[i] for i in s["history"]), "sid": sid[s["target"]],
                 "title": item[s["target"]]["title"], "description": item[s["target"]]["description"]}
                for s in data["samples"]]
    if source == "items":
        return [{"sid": sid[i["item_id"]], "title": i["title"], "description": i["description"]}
                for i in data["items"]]
    return [{"token": row["token"], "description": row["description"]} for row in data["tokens"]]


def task_pairs(name: str, data: dict) -> list[tuple[str, str]]:
    """(instruction, response) for every example of a task whose texts are not empty."""
    task = TASKS[name]
    pairs = []
    for fields in task_fields(task.source, data):
        if all(fields[key].strip() for key in fields if "{" + key + "}" in task.instruction + task.response):
            pairs.append((task.instruction.format(**fields), task.response.format(**fields)))
    return pairs


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
    """Tokenise a task's pairs. EOS ends a text response, unless it was cut to `max_response` tokens; prompts are
    never cut."""
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


def micro_batches(examples: list[Example], micro_tokens: int) -> list[list[Example]]:
    """Cut a batch, sorted by length, into pieces of at most `micro_tokens` tokens, padding included."""
    return [[examples[row] for row in rows] for rows in length_batches([e.ids for e in examples], micro_tokens)]


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


def add_dropout(model, p: float) -> None:
    """Drop parts of the embeddings and of every residual branch while training (Llama-like models have no
    residual dropout of their own)."""
    def hook(module, inputs, output):
        return F.dropout(output, p, model.training)
    branches = [m for name, m in model.named_modules() if name.endswith((".o_proj", ".down_proj"))]
    for module in [model.get_input_embeddings(), *branches] if p > 0 else []:
        module.register_forward_hook(hook)


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, steps - args.warmup)))


def make_optimizer(model, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, not on norms and biases."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95 if args.lr > 1e-3 else 0.999),
                             fused=model.device.type == "cuda")


@torch.no_grad()
def validation_loss(model, examples: list[Example], args: argparse.Namespace) -> float:
    """Mean negative log-likelihood per supervised token of the validation examples."""
    model.eval()
    total, count = 0.0, 0
    for piece in micro_batches(examples, args.micro_tokens):
        ids, labels = collate(piece, model.device)
        with autocast(model.device, args.precision):
            losses = response_loss(model, ids, labels)
        total, count = total + losses.double().sum().item(), count + len(losses)
    model.train()
    return total / count


def train_step(model, optimizer, batch: list[Example], args: argparse.Namespace) -> tuple[float, float]:
    """One update on one batch, whatever its micro-batches; returns weighted loss per token, gradient norm."""
    supervised = sum(e.weight * (len(e.ids) - e.start) for e in batch)
    total = torch.zeros((), device=model.device)
    optimizer.zero_grad(set_to_none=True)
    for piece in micro_batches(batch, args.micro_tokens):
        ids, labels = collate(piece, model.device)
        weights = torch.tensor([e.weight for e in piece for _ in e.ids[e.start:]], device=model.device)     # (S,)
        with autocast(model.device, args.precision):
            loss = (response_loss(model, ids, labels) * weights).sum() / supervised
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    return total.item(), norm.item()


def fit(model, train: list[Example], valid: list[Example], args: argparse.Namespace, save, log: list[dict]) -> None:
    """The training loop: epochs, schedule, validation, early stopping; `save(step, metrics)` at every best."""
    rng = random.Random(args.seed)
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps, step, best, bad = per_epoch * args.epochs, 0, math.inf, 0
    eval_every = max(1, per_epoch // args.evals_per_epoch)
    optimizer = make_optimizer(model, args)
    model.train()
    bar, start, tokens, running = tqdm(total=steps, desc="train", unit="step", disable=None), time.time(), 0, []
    for epoch in range(args.epochs):
        for batch in epoch_batches(train, args.batch_size, rng):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args)
            loss, norm = train_step(model, optimizer, batch, args)
            step, tokens = step + 1, tokens + sum(len(e.ids) for e in batch)
            running.append(loss)
            bar.update()
            row = {"step": step, "epoch": round(step / per_epoch, 3)}
            if step % args.log_every == 0:
                row |= {"loss": sum(running) / len(running), "lr": optimizer.param_groups[0]["lr"],
                        "grad_norm": norm, "tokens_per_second": round(tokens / (time.time() - start))}
                bar.write("step {step:05d}/{steps} | loss {loss:.4f} | lr {lr:.1e} | grad {grad_norm:.2f} | "
                          "{tokens_per_second} tok/s".format(steps=steps, **row))
                running.clear()
            if step % eval_every == 0 or step == steps:
                row["valid_loss"] = validation_loss(model, valid, args)
                if not math.isfinite(row["valid_loss"]):
                    stop(f"the validation loss of step {step} is {row['valid_loss']}; choose a lower --lr")
                better = row["valid_loss"] < best
                best, bad = (row["valid_loss"], 0) if better else (best, bad + 1)
                bar.write(f"step {step:05d}/{steps} | valid loss {row['valid_loss']:.4f}"
                          + (" | best so far, saved" if better else f" | no better for {bad}"))
                if better:
                    save(step, {"valid_loss": best, "epoch": row["epoch"]})
            if len(row) > 2:
                log.append(row)
            if bad >= args.patience:
                bar.close()
                print(f"stopped early: no better validation loss for {bad} evaluations")
                return
    bar.close()


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def parse_tasks(text: str) -> dict[str, float]:
    """Read task names with optional weights of their supervised tokens: "next,sid2title:0.1"."""
    tasks = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"{name!r} is not a task; choose from {', '.join(TASKS)}")
        try:
            tasks[name] = float(weight or 1)
        except ValueError:
            tasks[name] = 0.0
        if not 0 < tasks[name] < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r}: a weight is a number above 0, as in {name}:0.5")
    return tasks


def show_example(tokenizer, example: Example) -> None:
    """Print one rendered example with its supervised tokens between >> and <<."""
    text = tokenizer.decode(example.ids[:example.start]) + ">>" + tokenizer.decode(example.ids[example.start:]) + "<<"
    print(f"example {example.task:>16} | {text!r}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/demo", help="folder of the run")
    files.add_argument("--from", dest="start", help="checkpoint to start from, instead of RUN/init.pt")
    files.add_argument("--out", help="instead of RUN/sft.pt")
    method = parser.add_argument_group("method (default: by backbone, see PRESETS)")
    method.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}; "
                        "name:0.5 gives each supervised token of a task that weight")
    method.add_argument("--epochs", type=int, help="passes over all examples")
    method.add_argument("--lr", type=float, help="peak learning rate")
    method.add_argument("--batch-size", type=int, help="examples per update")
    method.add_argument("--warmup", type=int, help="updates of linear warm-up")
    method.add_argument("--dropout", type=float, help="share of embeddings and residual branches dropped")
    method.add_argument("--weight-decay", type=float, help="AdamW's, on matrices")
    method.add_argument("--evals-per-epoch", type=int, help="validations per epoch")
    method.add_argument("--max-response", type=int, help="tokens kept of a text response")
    method.add_argument("--micro-tokens", type=int,
                        help="tokens per forward pass, padding included: memory only, the update is the same")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--precision", choices=("fast", "float32", "bfloat16"), default="fast",
                      help="arithmetic over float32 weights; fast: bf16 on CUDA and on CPUs that have it")
    loop.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    loop.add_argument("--patience", type=int, default=3, help="stop after so many validations without a better loss")
    loop.add_argument("--log-every", type=int, default=100, help="updates per log line")
    loop.add_argument("--seed", type=int, default=42, help="seed of the data order and of dropout")
    loop.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda where there is one")
    args = parser.parse_args(argv)
    counts = ("epochs", "batch_size", "evals_per_epoch", "max_response", "micro_tokens", "patience", "log_every")
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= (args.dropout or 0) < 1:
        parser.error("--dropout must be at least 0 and less than 1")
    if args.tasks is not None:
        try:
            parse_tasks(args.tasks)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--tasks: {error}")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")      # its CPU backward is slow on short prompts
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # else gigabytes of kernels, one per shape
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(args.start or run / "init.pt", device, items)
    preset = PRESETS["tiny" if checkpoint["args"].get("backbone") == "tiny" else "hf"]
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.backbone = checkpoint["args"].get("backbone")
    weights = parse_tasks(args.tasks)

    known = {item["item_id"] for item in items}
    data = {"items": items, "samples": read_samples(run / "train.jsonl", known),
            "tokens": read_jsonl(run / "semantics.jsonl", ("token", "description"))
            if any(TASKS[n].source == "tokens" for n in weights) else []}
    train = []
    for name, weight in weights.items():
        examples = encode_examples(tokenizer, name, task_pairs(name, data), args.max_response, weight)
        if not examples:
            stop(f"--tasks: {name} has no examples in this run; leave it out")
        print(f"task {name:>16} | {len(examples)} examples | {sum(len(e.ids) for e in examples)} tokens | "
              f"{sum(len(e.ids) - e.start for e in examples)} supervised, weight {weight:g}")
        show_example(tokenizer, examples[0])
        train += examples
    valid_data = {"items": items, "samples": read_samples(run / "valid.jsonl", known)}
    valid = encode_examples(tokenizer, "next", task_pairs("next", valid_data), args.max_response)
    longest, limit = max(len(e.ids) for e in train + valid), getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        stop(f"the longest example has {longest} tokens, the backbone reads {limit}; lower --max-history in stage 1, "
             "or leave out the task with long texts")

    add_dropout(model, args.dropout)
    print(f"device {device} | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, all trained | "
          f"{len(train)} examples, {len(valid)} for validation | batch {args.batch_size} | lr {args.lr} | "
          f"{args.epochs} epochs of {math.ceil(len(train) / args.batch_size)} updates")
    out = Path(args.out or run / "sft.pt")
    log_path = out.with_name(out.stem + "_log.jsonl")
    log: list[dict] = []

    def save(step: int, metrics: dict) -> None:
        save_model(out, model, tokenizer, checkpoint["sid"], stage="sft", args=vars(args), step=step, metrics=metrics)
        write_jsonl(log_path, log or [metrics])

    fit(model, train, valid, args, save, log)
    write_jsonl(log_path, log)
    print(f"wrote {out}, {log_path}")


if __name__ == "__main__":
    main()
