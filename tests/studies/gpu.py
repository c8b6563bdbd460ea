"""Measure on a GPU all that was not measured yet, in calls of at most ten minutes, and print the table.

  suite       the tests, with the GPU visible
  precision   the run's beams in bf16 against float32: equal lists, HR@10
  benchmark   benchmark.py with a random model of Qwen2.5-1.5B's shape
  search      prompts of 1,000 tokens, 256 beams, 10^6 items, a random Qwen3-1.7B; beside it the prefill
  catalogue   evaluate.py: the run's whole test set with 20 beams
  train       train.py with random models: tokens per second, peak memory, host syncs of an update
  smollm2     pretrained.py with --backbone FOLDER, SmolLM2's; the next call goes on where it stopped

At a host sync, Python waits for the GPU. CUDA reports each one. On a CPU, calls are counted instead that
would be one on a GPU: values read (item, bool, tolist, boolean indices), and copies to the device by our
scripts. What the optimizer's step does is left out.

Reads   RUN: a finished run, with init.pt and sft.pt
Writes  --out: one line per figure, appended; what is there for this device is not measured again

Examples, from the project's root
  python tests/studies/gpu.py --run runs/industrial --part suite,precision,catalogue
  python tests/studies/gpu.py --print
  python tests/studies/gpu.py --run runs/demo --small --device cpu --part precision,search,train
"""
import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "studies")]
import evaluate  # noqa: E402
import train  # noqa: E402
from benchmark import CODES, last_rows, random_codes  # noqa: E402
from init_embeddings import build_trie, load_model, sid_token_ids  # noqa: E402
from tokenize_items import codes_of, make_parser, number, read_catalogue, read_jsonl, set_up  # noqa: E402

SHAPES = {                              # model type, width, inner width, layers, heads, key heads, rows
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 49_152),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151_936),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 151_936),
    "small": ("qwen3", 64, 128, 2, 4, 2, 4096),
}
MICRO_TOKENS = {"SmolLM2-135M": (4096, 16384, 65536), "Qwen2.5-1.5B": (4096, 8192, 16384),
                "small": (400, 4000)}
UPDATES = 6                             # of train.py: one to warm up, one whose syncs count, four timed
NVIDIA = {1: "NVIDIA's 1.7B on an H100: 17.6 ms, prefill 7.0 ms", 8: "NVIDIA's: 93.2 ms, twice its prefill"}
EVALUATE = "evaluate.py --run {run} --device {device} --memory 0 --metrics {tmp}/m --predictions {tmp}/p"
COMMANDS = {                            # part -> commands, the same if --small, and the lines to keep
    "suite": (["-m pytest -q tests"], ["-m pytest -q tests/test_tasks.py"], r"FAILED|ERROR|passed|failed"),
    "benchmark": ([f"tests/studies/benchmark.py --device {{device}} --works {work}" for work in
                   ("search", "sampling", "rl", "trie", "kmeans", "sft")],
                  ["tests/studies/benchmark.py --device {device} --smoke --works trie"], " ms .* MB"),
    "catalogue": ([EVALUATE], [EVALUATE + " --limit 50"], r"per second|^sft.pt"),
    "smollm2": (["tests/studies/pretrained.py --run {run} --backbone {backbone} {pretrained}"], [], r"^\|"),
}


# ---- Host syncs ----------------------------------------------------------------------------------

class Waits(TorchDispatchMode):
    """Counts operators whose result must be known before Python can go on."""
    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2")
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("index", "index_put", "index_put_"):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += name in self.OPERATORS
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts our scripts' copies to a device, and tolist(), which is no operator on a CPU."""
    copies = lists = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if Path(sys._getframe(1).f_code.co_filename).parent == ROOT:
            to_device = "device" in kwargs or isinstance((*args, None, None)[1], torch.device)
            self.copies += to_device and name in ("to", "tensor")
            self.lists += name == "tolist"
        return func(*args, **kwargs)


@contextlib.contextmanager
def count_syncs(device: torch.device, found: dict) -> Iterator[None]:
    """Add to `found` the host syncs of the block, and on a CPU the copies to the device."""
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield
            torch.cuda.set_sync_debug_mode("default")
        found["syncs"] = sum("synchroniz" in str(warning.message) for warning in caught)
        return
    with Waits() as waits, Copies() as copies:
        yield
    found |= {"syncs": waits.count + copies.lists, "copies": copies.copies}


def wait(device: torch.device) -> float:
    """Wait for the GPU; -> the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- The parts: each yields rows, with what was measured as "work" and what was found --------------

def commands(part: str, args, device: torch.device) -> Iterator[dict]:
    """Run scripts and keep some of their lines. Too long a script gets Ctrl-C, upon which train.py saves."""
    for command in COMMANDS[part][args.small]:
        if args.is_done(command) or part == "smollm2" and not args.backbone:
            continue
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0" if device.type == "cuda" else ""}
        limited, start = ["timeout", "--signal=INT", str(args.seconds), sys.executable], time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            words = command.format(**vars(args) | {"tmp": folder, "device": device.type}).split()
            done = subprocess.run(limited + words, cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if re.search(COMMANDS[part][2], line)]
        if done.returncode:
            lines += done.stderr.splitlines()[-1:]      # 124: time was up
        yield {"work": command, "seconds": round(time.perf_counter() - start, 1), "lines": lines,
               "exit code": done.returncode}


def precision(args, device: torch.device) -> Iterator[dict]:
    run, tops = Path(args.run), {}
    items = read_catalogue(run / "items.jsonl")
    item_ids = [item["item_id"] for item in items]
    for dtype in (torch.float32, torch.bfloat16):       # bf16: weights and autocast, as evaluate.py on CUDA
        model, tokenizer, saved = load_model(run / "sft.pt", device, items)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        sid = saved["sid"]
        sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(device)
        trie = build_trie(torch.from_numpy(codes_of(items)), sid["codebook_size"], device)
        task = saved["args"].get("recommends", "next")
        pairs = evaluate.read_pairs(run, task, "test", items, 50 if args.small else 0)
        prompts = train.prompt_ids(tokenizer, [pair.instruction for pair in pairs])
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with patch.object(evaluate, "autocast", lambda *_: autocast):
            rankings = evaluate.search_all(model, trie, sid_ids, item_ids, prompts, 20, 16384)
        tops[dtype] = [ranking.items[:10] for ranking in rankings]
    both, count = list(zip(*tops.values())), len(prompts)
    hits = {dtype: sum(pair.row["target"] in top for pair, top in zip(pairs, tops[dtype])) for dtype in tops}
    yield {"work": f"{count} prompts, 20 beams",
           "same first item": sum(a[0] == b[0] for a, b in both) / count,
           "same ten": sum(set(a) == set(b) for a, b in both) / count,
           "same ten, same order": sum(a == b for a, b in both) / count,
           "HR@10 float32": hits[torch.float32] / count, "HR@10 bf16": hits[torch.bfloat16] / count}


def random_model(name: str, device: torch.device, dtype: torch.dtype):
    """A model of that shape with random weights."""
    kind, width, inner, layers, heads, key_heads, rows = SHAPES[name]
    config = AutoConfig.for_model(
        kind, vocab_size=rows, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=width // heads,
        max_position_embeddings=8192, initializer_range=2 / width ** 0.5, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


@torch.no_grad()
def search(args, device: torch.device) -> Iterator[dict]:
    name, length, beams, count, runs = "Qwen3-1.7B", 1000, 256, 10 ** 6, 50
    if args.small:
        name, length, beams, count, runs = "small", 60, 16, 10 ** 4, 5
    rows, trie = SHAPES[name][-1], build_trie(random_codes(count), CODES, device)
    model = random_model(name, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sid_ids = last_rows(rows, device)
    for users in (1, 8):
        prompts, times = torch.randint(rows - sid_ids.numel(), (users, length)).tolist(), {}
        works = {"ms": lambda: evaluate.beam_search(model, trie, sid_ids, prompts, beams),
                 "prefill ms": lambda: evaluate.prefill(model, prompts)}
        for _, (title, work) in itertools.product(range(3 + runs), works.items()):      # in turns
            start = wait(device)
            work()
            times.setdefault(title, []).append(1e3 * (wait(device) - start))
        found = {title: statistics.median(taken[3:]) for title, taken in times.items()}
        with count_syncs(device, found):
            works["ms"]()
        yield {"work": f"{name} B={users} T={length} W={beams} N={count:,}", **found,
               "ratio": found["ms"] / found["prefill ms"], "wanted": f"1.3 x the prefill; {NVIDIA[users]}"}


class Enough(Exception):
    """Ends train.py."""


def train_updates(flags: list, device: torch.device, load) -> dict:
    """Run train.py for some updates. Hooks on the optimizer's step tell where one ends."""
    found, seen, counting = {}, {"updates": 0, "passes": 0, "tokens": 0}, contextlib.ExitStack()
    collate = train.collate

    def counted_collate(examples, device):
        seen["passes"] += 1
        seen["tokens"] += sum(len(e.ids) for e in examples)
        return collate(examples, device)

    def before_step(*_) -> None:
        if seen["updates"] == 1:
            counting.close()
            found["passes"] = seen["passes"]

    def after_step(*_) -> None:
        seen["updates"] += 1
        if seen["updates"] == 1:
            counting.enter_context(count_syncs(device, found))
            seen["passes"] = 0
        elif seen["updates"] == 2:
            seen.update(tokens=0, start=wait(device))
        elif seen["updates"] == UPDATES:
            found["tokens per second"] = round(seen["tokens"] / (wait(device) - seen["start"]))
            raise Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(torch.backends.cuda.enable_flash_sdp, True)
        stack.callback(register_optimizer_step_pre_hook(before_step).remove)
        stack.callback(register_optimizer_step_post_hook(after_step).remove)
        stack.enter_context(patch.multiple(train, load_model=load, collate=counted_collate,
                                           catch_interrupts=lambda device: bool))      # Ctrl-C as usual
        flags = ["train.py", "--out", f"{folder}/sft.pt", "--evals-per-epoch", "1", *flags]
        stack.enter_context(patch.object(sys, "argv", flags))
        stack.enter_context(contextlib.suppress(Enough))
        stack.enter_context(counting)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        train.main()
    if device.type == "cuda":
        found["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def training(args, device: torch.device) -> Iterator[dict]:
    shapes = ("small",) if args.small else ("SmolLM2-135M", "Qwen2.5-1.5B")
    settings = [(name, micro) for name in shapes for micro in MICRO_TOKENS[name]]
    for name, micro in [("RUN/init.pt", 0), *settings]:
        work = f"{name}, --micro-tokens {micro or 'as preset'}"
        if args.is_done(work):
            continue

        def load(path, device, items):
            model, tokenizer, saved = load_model(path, device, items)
            if name in SHAPES:
                saved["args"]["backbone"] = name        # so that train.py takes its settings for large models
                model = random_model(name, device, torch.float32)
            return model, tokenizer, saved

        flags = ["--run", args.run, "--device", device.type, *(["--batch-size", "8"] if args.small else [])]
        flags += ["--micro-tokens", str(micro)] if micro else []
        try:
            yield {"work": work, **train_updates(flags, device, load)}
        except torch.OutOfMemoryError:
            yield {"work": work, "out of memory": True}


PARTS = {**dict.fromkeys(COMMANDS, commands), "precision": precision, "search": search, "train": training}


# ---- Command line --------------------------------------------------------------------------------

def show(row: dict) -> str:
    """One row of the table."""
    figures = {key: row[key] for key in row if key not in ("device", "part", "work", "lines", "wanted")}
    texts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in figures.items()]
    texts += [re.sub(" *[|] *| {2,}", ", ", line) for line in row.get("lines", [])]
    cells = row["part"], row["work"], "<br>".join(texts), row.get("wanted", ""), row["device"]
    return f"| {' | '.join(cells)} |"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "device")
    flag = parser.add_argument
    flag("--part", default=",".join(PARTS), help="what to measure, by commas")
    flag("--out", default="runs/gpu.jsonl", help="file of the figures")
    flag("--small", action="store_true", help="small sizes, to see on a CPU that everything runs")
    flag("--seconds", type=number(float, 1), default=540, help="limit for each script that a part runs")
    flag("--backbone", default="", help="smollm2: folder of the language model")
    flag("--pretrained", default="--arms gaussian,centered", help="smollm2: flags of pretrained.py")
    flag("--print", action="store_true", help="print the table of the file, measure nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.part.split(",")) - set(PARTS):
        parser.error(f"--part: {', '.join(unknown)} is not one of {', '.join(PARTS)}")
    return args


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    rows = read_jsonl(out, {"device": str, "part": str, "work": str}) if out.exists() else []
    if args.print:
        print("| part | what | found | wanted | device |", "| --- | --- | --- | --- | --- |", sep="\n")
        print("\n".join(show(row) for row in rows))
        return
    device = set_up(args.device)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.part.split(","):
        known = {row["work"] for row in rows if (row["device"], row["part"]) == (chip, part)}
        args.is_done = known.__contains__ if part != "smollm2" else lambda work: False
        if known and part in ("precision", "search"):
            continue
        for row in commands(part, args, device) if part in COMMANDS else PARTS[part](args, device):
            row = {"device": chip, "part": part, **row}
            print(show(row), flush=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
