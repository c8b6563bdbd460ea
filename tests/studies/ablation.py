"""Repeat the papers' experiments: run the scripts over a grid of settings and print the tables.

  tsrec          TS-Rec, table 3: without SA-Init, without TS-Align, without both
  depth          TS-Rec, figure 4: SA-Init on the first 0, 1, 2, 3 levels, and HR@5 along training
  inits          SID rows at random, from the mean of the vocabulary, by SA-Init in three ways, after align
  star           STAR, table 1: align, then sft on the next item alone; all weights aligned instead (STAR's
                 table 3, there for search);
                 no alignment; LC-Rec style and TS-Rec, both multi-task
  search         STAR, table 2: search queries; after align, sft on next item and search alone
  scaling        STAR, figure 3: 10, 25, 50 and 100 % of the training users
  rl             TS-Rec, table 4: SFT against SFT + RL, from two starts; other rollouts and rewards
  comprehension  TS-Rec, figure 5: Title2SID and SID2Title
  cold           new items, from tokenize_items.py --add, that no training interaction contains
  teachers       the authors' LLM against TF-IDF, if --data has the authors' semantics.jsonl

Models are compared as in the papers, without evaluate.py's memory.

Writes  OUT/seed-N, a folder for each seed with runs, figures, and every command and its output in log/;
        OUT/tables.md
The script can be stopped and run again: a step is skipped if its command and its inputs have not changed, and
an interrupted training continues. If you change the code, delete OUT first.

Examples, from the project's root
  python tests/studies/ablation.py --jobs 2                           # every table on the demo, three seeds
  python tests/studies/ablation.py --tables inits,star --seeds 42
  python tests/studies/ablation.py --data $DATA --out runs/ablation_industrial --seeds 42 --train="--epochs 3"
  python tests/studies/ablation.py --backbone FOLDER --out runs/ablation_minilm --train="--lr 1e-3"
  python tests/studies/ablation.py --print                            # the figures so far; runs nothing
"""
import argparse
import concurrent.futures
import hashlib
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "studies")]
from evaluate import CUTOFFS, rank_metrics, rank_of, read_pairs, search_all  # noqa: E402
from init_embeddings import build_trie, load_model, mean_cosine, sid_token_ids  # noqa: E402
from plot import effective_rank  # noqa: E402
from tokenize_items import (atomic_write, codes_of, make_parser, number, read_catalogue,  # noqa: E402
                            read_jsonl, set_up, write_jsonl)
from train import PRESETS, STAR_ALIGN, prompt_ids  # noqa: E402


class Arm(NamedTuple):
    """One way of training a model."""
    label: str                          # what the tables call it
    start: str                          # how the SID rows are initialised: "sa", or a name of INITS
    ts_align: bool = True               # train the tasks of TS-Align?
    search: bool = False                # train the search task?
    align: str = ""                     # before sft, on STAR's alignment tasks: "align" (STAR) or "full"
    alone: bool = False                 # sft on the next item alone, as STAR (its table 7)


ARMS = {
    "full": Arm("TS-Rec: SA-Init and TS-Align", "sa"),
    "no_sa": Arm("without SA-Init (gaussian)", "gaussian"),
    "no_align": Arm("without TS-Align", "sa", ts_align=False),
    "neither": Arm("without both (LC-Rec style)", "gaussian", ts_align=False),
    "depth1": Arm("SA-Init on level 1", "depth1"),
    "depth2": Arm("SA-Init on levels 1 and 2", "depth2"),
    "mean": Arm("mean of the vocabulary", "mean"),
    "printed": Arm("SA-Init as printed, --sa-norm none", "printed"),
    "vocab": Arm("SA-Init, --sa-norm vocab", "vocab"),
    "normal": Arm("N(0, 0.02^2), initializer_range of Qwen2", "normal"),
    "aligned": Arm("mean, align, then sft with TS-Align", "mean", align="align"),
    "alone": Arm("mean, next item alone", "mean", alone=True),
    "star": Arm("STAR: mean, align, next item alone", "mean", align="align", alone=True),
    "two_stage": Arm("mean, align with all weights, next item alone", "mean", align="full", alone=True),
    "search": Arm("TS-Rec, search task", "sa", search=True),
    "lcrec_search": Arm("LC-Rec style, search task", "gaussian", ts_align=False, search=True),
    "star_search": Arm("STAR: mean, align, next item and search", "mean", search=True, align="align",
                       alone=True),
}
INITS = {                               # name -> flags of init_embeddings.py
    "gaussian": "--init gaussian",
    "mean": "--init mean",
    "normal": "--init normal",
    "printed": "--sa-norm none",
    "vocab": "--sa-norm vocab",
    "depth1": "--sa-depth 1",
    "depth2": "--sa-depth 2",
}
RL = {                                  # name -> the arm it starts from, flags of rl.py
    "rl_neither": ("neither", ""),
    "rl_full": ("full", ""),
    "rl_rank_full": ("full", "--reward hit:1,rank:1"),
    "rl_draws_full": ("full", "--rollout sample"),
    "rl_draws_rank_full": ("full", "--rollout sample --reward hit:1,rank:1"),
}
COLD = {                                # name -> what the table of the cold start calls it
    "average": "TS-Rec, new items as the average of their siblings",
    "scored": "TS-Rec, new items as the model scores them",
}
TEACHERS = {"tfidf": "offline teacher (TF-IDF)", "llm": "the authors' LLM"}
SHARES = (10, 25, 50)                   # percent of the training users
TSREC = ("full", "no_sa", "no_align", "neither")
DEPTHS = ("no_sa", "depth1", "depth2", "full")
STARTS = ("no_sa", "normal", "mean", "printed", "vocab", "full", "aligned")
STAR = ("neither", "alone", "star", "two_stage", "full")
SEARCH = ("full", "search", "lcrec_search", "star", "star_search")
SCALING = ("full", "neither")
TS_ALIGN = ("text2token", "token2text")
COLD_BEAMS = 50


# ---- The grid: what each run needs, as steps by name ---------------------------------------------

class Step(NamedTuple):
    """A script with its flags, or a function without arguments, to be run after the steps that it needs."""
    command: str | Callable[[], None]
    needs: tuple[str, ...] = ()
    checkpoints: str = ""               # if given, the command is run for each file of this pattern


def task_list(backbone: str, ts_align: bool = True, search: bool = False, alone: bool = False) -> str:
    """The value of --tasks: what the backbone's preset trains, or its first task, the next item, alone."""
    names = PRESETS["tiny" if backbone == "tiny" else "hf"]["tasks"].split(",")
    names = [name for name in names if ts_align or name.split(":")[0] not in TS_ALIGN]
    return ",".join((names[:1] if alone else names) + ["search"] * search)


def evaluation(run: Path, checkpoint: str, name: str, flags: str, data: Path | None = None) -> Step:
    """Evaluate RUN/checkpoint.pt on the samples of `data` or RUN; the figures go to RUN/name.jsonl."""
    return Step(f"evaluate.py --run {data or run} --checkpoint {run}/{checkpoint}.pt --memory 0 "
                f"--metrics {run}/{name}.jsonl --predictions {run}/predictions_{name}.jsonl {flags}",
                (checkpoint,))


def training_steps(run: Path, seed: int, data: str, backbone: str, extra: dict) -> dict[str, Step]:
    """Catalogue, semantics, every start; training and figures of every arm."""
    common = f"--run {run} --seed {seed}"
    steps = {
        "items": Step(f"tokenize_items.py {common} {extra['items']}" + (f" --data {data}" if data else "")),
        "semantics": Step(f"extract_semantics.py {common} --queries 5", ("items",)),
        "init_sa": Step(f"init_embeddings.py {common} --backbone {backbone} "
                        f"--out {run}/init_sa.pt {extra['init']}", ("semantics",)),
        "align_mean": Step(f"train.py {common} --stage align --from {run}/init_mean.pt "
                          f"--out {run}/align_mean.pt --resume {extra['align']}", ("init_mean",)),
        "full_mean": Step(f"train.py {common} --tasks {STAR_ALIGN} --from {run}/init_mean.pt "
                          f"--out {run}/full_mean.pt --resume {extra['align']}", ("init_mean",)),
    }
    for name, flags in INITS.items():
        steps[f"init_{name}"] = Step(f"init_embeddings.py {common} --backbone {run}/init_sa.pt "
                                     f"--out {run}/init_{name}.pt {flags}", ("init_sa",))
    for name, arm in ARMS.items():
        start, trained = f"{arm.align or 'init'}_{arm.start}", f"sft_{name}"
        tasks = task_list(backbone, arm.ts_align, arm.search, arm.alone)
        keep = "--keep" if name in DEPTHS else ""               # the weights of every validation
        steps[trained] = Step(f"train.py {common} --from {run}/{start}.pt --out {run}/{trained}.pt --resume "
                              f"--tasks {tasks} {keep} {extra['train']}", (start,))
        for split in ("valid", "test"):
            steps[f"{split}_{name}"] = evaluation(run, trained, f"{split}_{name}", f"--split {split}")
        for task in ("title2sid", "search"):
            flags = f"--task {task} --limit 2000"
            steps[f"{task}_{name}"] = evaluation(run, trained, f"{task}_{name}", flags)
        steps[f"sid2title_{name}"] = Step(
            f"tests/studies/sid2title.py --run {run} --checkpoint {run}/{trained}.pt "
            f"--metrics {run}/sid2title_{name}.jsonl --limit 2000", (trained,))
        along = evaluation(run, trained, f"along_{name}", "--split valid")
        steps[f"along_{name}"] = along._replace(checkpoints=f"{trained}_[0-9][0-9][0-9][0-9][0-9].pt")
        before_and_after = [run / f"{start}.pt", run / f"{trained}.pt"]
        steps[f"rows_{name}"] = Step(partial(measure_rows, run, before_and_after, run / f"rows_{name}.jsonl"),
                                     (start, trained))
    return steps


def rl_steps(run: Path, seed: int, extra: dict) -> dict[str, Step]:
    """RL from two starts, and from the TS-Rec start with other rollouts and rewards."""
    steps = {}
    for name, (arm, flags) in RL.items():
        steps[name] = Step(f"rl.py --run {run} --seed {seed} --from {run}/sft_{arm}.pt "
                           f"--out {run}/{name}.pt --resume {flags} {extra['rl']}", (f"sft_{arm}",))
        steps[f"test50_{name}"] = evaluation(run, name, f"test50_{name}", "--num-beams 50")
    for arm in ("neither", "full"):
        steps[f"test50_{arm}"] = evaluation(run, f"sft_{arm}", f"test50_{arm}", "--num-beams 50")
    return steps


def scaling_steps(run: Path, seed: int, backbone: str, extra: dict) -> dict[str, Step]:
    """The arms of SCALING on a share of the training users, each from its usual start."""
    steps = {}
    for share in SHARES:
        part = run / f"share{share}"
        steps[f"share{share}"] = Step(partial(cut_users, run, part, share, seed), ("semantics",))
        for arm in SCALING:
            start, name = f"init_{ARMS[arm].start}", f"{arm}_{share}"
            tasks = task_list(backbone, ARMS[arm].ts_align)
            steps[f"sft_{name}"] = Step(
                f"train.py --run {part} --seed {seed} --from {run}/{start}.pt --out {run}/sft_{name}.pt "
                f"--resume --tasks {tasks} {extra['train']}", (f"share{share}", start))
            for split in ("valid", "test"):                     # the yardsticks count the same users
                flags = f"--split {split}"
                steps[f"{split}_{name}"] = evaluation(run, f"sft_{name}", f"{split}_{name}", flags, data=part)
    return steps


def cold_steps(run: Path, seed: int, backbone: str, extra: dict, device: str) -> dict[str, Step]:
    """A run without 5 % of the items, which join after training.

    The test samples are those whose target is one of these items, the validation samples the others.
    """
    cold, grown = run / "cold", run / "cold_grown"
    data, checkpoint = cold / "data", cold / "sft.pt"
    common, tasks = f"--run {cold} --seed {seed}", task_list(backbone)
    steps = {
        "cold_data": Step(partial(hold_out_items, run, data, seed), ("items",)),
        "cold_items": Step(f"tokenize_items.py {common} --data {data}", ("cold_data",)),
        "cold_semantics": Step(f"extract_semantics.py {common}", ("cold_items",)),
        "cold_init": Step(f"init_embeddings.py {common} --backbone {backbone} {extra['init']}",
                          ("cold_semantics",)),
        "cold_sft": Step(f"train.py {common} --resume --tasks {tasks} {extra['train']}", ("cold_init",)),
        "cold_copy": Step(partial(copy_run, cold, grown, data / "cold_test.jsonl"), ("cold_semantics",)),
        "cold_add": Step(f"tokenize_items.py --run {grown} --seed {seed} --add {data}/new_items.jsonl",
                         ("cold_copy",)),
    }
    for split in ("valid", "test"):
        out = run / f"{split}_scored.jsonl"
        steps[f"{split}_average"] = Step(
            f"evaluate.py --run {grown} --checkpoint {checkpoint} --metrics {run}/{split}_average.jsonl "
            f"--split {split} --memory 0 --num-beams {COLD_BEAMS}", ("cold_add", "cold_sft"))
        steps[f"{split}_scored"] = Step(partial(evaluate_as_scored, grown, checkpoint, split, out, device),
                                        ("cold_add", "cold_sft"))
    return steps


def released_file(data: str, name: str) -> Path:
    """The peers' SIDs or semantics: DATA/official_NAME.jsonl, or NAME.jsonl as from_peers.py writes it."""
    official = Path(data) / f"official_{name}.jsonl"
    return official if official.exists() else Path(data) / f"{name}.jsonl"


def teacher_steps(run: Path, seed: int, data: str, backbone: str, extra: dict) -> dict[str, Step]:
    """The released SIDs with TF-IDF's semantics and with the released ones, all else equal."""
    steps, released, tasks = {}, released_file(data, "semantics"), task_list(backbone)
    for name in TEACHERS:
        part = run / f"teacher_{name}"
        common = f"--run {part} --seed {seed}"
        semantics = f"extract_semantics.py {common}"
        if name == "llm":
            semantics = partial(shutil.copy, released, part / "semantics.jsonl")
        steps[f"items_{name}"] = Step(f"tokenize_items.py {common} --data {data} "
                                      f"--sids {released_file(data, 'sids')}")
        steps[f"semantics_{name}"] = Step(semantics, (f"items_{name}",))
        steps[f"init_{name}"] = Step(f"init_embeddings.py {common} --backbone {run}/init_sa.pt",
                                     ("init_sa", f"semantics_{name}"))
        steps[f"sft_{name}"] = Step(f"train.py {common} --resume --tasks {tasks} {extra['train']}",
                                    (f"init_{name}",))
        for split in ("valid", "test"):
            metrics = f"{run}/{split}_{name}.jsonl"
            steps[f"{split}_{name}"] = Step(
                f"evaluate.py --run {part} --split {split} --memory 0 --metrics {metrics}", (f"sft_{name}",))
    return steps


def all_steps(run: Path, seed: int, data: str, backbone: str, extra: dict, device: str) -> dict[str, Step]:
    """The whole grid of one seed."""
    return {**training_steps(run, seed, data, backbone, extra), **rl_steps(run, seed, extra),
            **scaling_steps(run, seed, backbone, extra), **cold_steps(run, seed, backbone, extra, device),
            **teacher_steps(run, seed, data, backbone, extra)}


# ---- Steps that are functions --------------------------------------------------------------------

def copy_run(run: Path, other: Path, test: Path) -> None:
    """Copy the files of a run that stages 1 and 2 wrote, with another test split."""
    other.mkdir(exist_ok=True)
    for name in ("items.jsonl", "semantics.jsonl", "codebook.pt", "train.jsonl", "valid.jsonl"):
        shutil.copy(run / name, other / name)
    shutil.copy(test, other / "test.jsonl")


def cut_users(run: Path, part: Path, share: int, seed: int) -> None:
    """Copy a run, but keep only the training samples of `share` % of the users."""
    copy_run(run, part, run / "test.jsonl")
    train = read_jsonl(run / "train.jsonl", {})
    users = sorted({sample["user_id"] for sample in train})
    chosen = set(random.Random(seed).sample(users, len(users) * share // 100))
    write_jsonl(part / "train.jsonl", [sample for sample in train if sample["user_id"] in chosen])


def hold_out_items(run: Path, data: Path, seed: int) -> None:
    """Take 5 % of the items, all of them targets of the test, out of the catalogue and of every history."""
    items, test = read_jsonl(run / "items.jsonl", {}), read_jsonl(run / "test.jsonl", {})
    targets = sorted({sample["target"] for sample in test}, key=str)
    cold = set(random.Random(seed).sample(targets, min(len(targets), len(items) // 20)))
    for item in items:
        del item["sid"]
    write_jsonl(data / "items.jsonl", [item for item in items if item["item_id"] not in cold])
    write_jsonl(data / "new_items.jsonl", [item for item in items if item["item_id"] in cold])
    for split in ("train", "valid", "test"):
        samples = []
        for sample in read_jsonl(run / f"{split}.jsonl", {}):
            history = [item_id for item_id in sample["history"] if item_id not in cold]
            if history:
                samples.append({**sample, "history": history})
        write_jsonl(data / f"{split}.jsonl", [sample for sample in samples if sample["target"] not in cold])
        if split == "test":
            write_jsonl(data / "cold_test.jsonl", [sample for sample in samples if sample["target"] in cold])


def evaluate_as_scored(run: Path, checkpoint: Path, split: str, out: Path, device_name: str) -> None:
    """evaluate.py's figures, but new items are not averaged: they count as the model scores them."""
    device, items = set_up(device_name), read_catalogue(run / "items.jsonl")
    model, tokenizer, saved = load_model(checkpoint, device, items)
    num_levels, codebook_size = saved["sid"]["num_levels"], saved["sid"]["codebook_size"]
    pairs = read_pairs(run, saved["args"]["recommends"], split, items, limit=0)
    prompts = prompt_ids(tokenizer, [pair.instruction for pair in pairs])
    trie = build_trie(torch.from_numpy(codes_of(items)), codebook_size, device)
    sid_ids = sid_token_ids(tokenizer, num_levels, codebook_size).to(device)
    item_ids = [item["item_id"] for item in items]
    rankings = search_all(model, trie, sid_ids, item_ids, prompts, COLD_BEAMS, batch_tokens=16384)
    ranks = [rank_of(pair.row["target"], ranking.items) for pair, ranking in zip(pairs, rankings)]
    cutoffs = tuple(k for k in CUTOFFS if k <= COLD_BEAMS)
    write_jsonl(out, [{"method": checkpoint.name, "level": "item", **rank_metrics(ranks, cutoffs)}])


def measure_rows(run: Path, checkpoints: list[Path], out: Path) -> None:
    """Write how the SID rows in use lie in each checkpoint."""
    items, lines = read_catalogue(run / "items.jsonl"), []
    tokens = sorted({token for item in items for token in item["sid"]})
    for path in checkpoints:
        model, tokenizer, _ = load_model(path, torch.device("cpu"))
        rows = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(tokens)]
        lines.append({"checkpoint": path.name, "effective_rank": effective_rank(rows),
                      "cosine": mean_cosine(rows)})
    write_jsonl(out, lines)


# ---- Running the steps ---------------------------------------------------------------------------

class Runner:
    """The steps of one seed: which are done, how to run one, which figures it wrote."""
    def __init__(self, run: Path, steps: dict[str, Step], device: str = "", threads: int = 0) -> None:
        self.run, self.steps, self.device, self.threads = run, steps, device, threads
        (run / "log").mkdir(parents=True, exist_ok=True)

    def key(self, name: str) -> str:
        """A fingerprint of a step's command and of all that it needs."""
        step = self.steps[name]
        command = step.command if isinstance(step.command, str) else name
        text = [command, *(self.key(need) for need in step.needs)]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]

    def is_done(self, name: str) -> bool:
        marker = self.run / "log" / f"{name}.done"
        return marker.exists() and marker.read_text().split()[0] == self.key(name)

    def plan(self, name: str) -> list[str]:
        """What is left to do for a step, in order, the step itself last."""
        if self.is_done(name):
            return []
        before = []
        for need in self.steps[name].needs:
            before += [step for step in self.plan(need) if step not in before]
        return [*before, name]

    def make(self, name: str) -> None:
        """Run a step. Raises CalledProcessError if a script fails; its log says why."""
        start, step = time.time(), self.steps[name]
        print(f"{time.strftime('%H:%M:%S')} {self.run.name} {name}", flush=True)
        if not isinstance(step.command, str):
            step.command()
        else:
            (self.run / f"{name}.jsonl").unlink(missing_ok=True)        # evaluate.py appends
            commands = [step.command]
            if step.checkpoints:
                paths = sorted(self.run.glob(step.checkpoints))
                commands = [f"{step.command} --checkpoint {path}" for path in paths]
            with open(self.run / "log" / f"{name}.txt", "w", encoding="utf-8") as log:
                for command in commands:
                    self.execute(command, log)
        seconds = time.time() - start
        (self.run / "log" / f"{name}.done").write_text(f"{self.key(name)} {seconds:.0f} seconds\n")

    def execute(self, command: str, log) -> None:
        """Run one script; its output goes to the log."""
        if self.device and not command.startswith("extract_semantics.py"):
            command += f" --device {self.device}"
        script, *flags = shlex.split(command)
        print(f"$ python {command}", file=log, flush=True)
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        subprocess.run([sys.executable, str(ROOT / script), *flags], stdout=log, stderr=subprocess.STDOUT,
                       check=True, env={**os.environ, **threads})

    def rows(self, name: str) -> list[dict]:
        """The lines that a step has written; none if it is not done."""
        return read_jsonl(self.run / f"{name}.jsonl", {}) if self.is_done(name) else []

    def figures(self, name: str) -> dict:
        """The model's own line of an evaluation, at the level of items (or texts)."""
        lines = [row for row in self.rows(name) if row["level"] != "sid"]
        return lines[-1] if lines else {}

    def logged(self, name: str, figure: str) -> list[float]:
        """The values of a figure in a training's log, in order."""
        path = self.run / f"{name}_log.jsonl"
        log = read_jsonl(path, {}) if self.is_done(name) else []
        return [row[figure] for row in log if figure in row]


def make_all(jobs: list[tuple[Runner, str]], at_once: int) -> list[str]:
    """Run steps, each as soon as all that it needs is done; -> what failed.

    jobs: each step after all that it needs. A failed step costs only the steps that need it.
    """
    waiting, running, failed = list(dict.fromkeys(jobs)), {}, []
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            unfinished = {*waiting, *running.values()}
            ready = []
            for runner, name in waiting:
                needs = {(runner, need) for need in runner.steps[name].needs}
                if not needs & unfinished:
                    ready.append((runner, name))
            for runner, name in ready[:at_once - len(running)]:
                running[pool.submit(runner.make, name)] = (runner, name)
                waiting.remove((runner, name))
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                runner, name = running.pop(future)
                if future.exception():
                    failed.append(f"{runner.run}/log/{name}.txt: {future.exception()}")
                    print("failed:", failed[-1], flush=True)
                    waiting = [(other, step) for other, step in waiting
                               if other is not runner or name not in runner.plan(step)]
    return failed


# ---- The tables ----------------------------------------------------------------------------------

RANKING = ("valid NDCG@10", "HR@5", "HR@10", "NDCG@5", "NDCG@10")


def cell(values: list[float], digits: int = 4) -> str:
    """The mean over seeds, with the standard deviation if they differ."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ({statistics.stdev(values):.{digits}f})"


def markdown(title: str, heads: Sequence[str], rows: list[list[str]]) -> str:
    """A table in Markdown, without the rows that have no figures."""
    lines = [list(heads), ["---"] * len(heads), *(row for row in rows if any(row[1:]))]
    return f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def step_and_figure(head: str, name: str) -> tuple[str, str]:
    """Where the figures of a column are: ("valid HR@10", "full") -> ("valid_full", "HR@10")."""
    kind, _, figure = head.rpartition(" ")
    return f"{kind or 'test'}_{name}", figure


def model_row(label: str, name: str, runners: list[Runner], heads: Sequence[str]) -> list[str]:
    """A model's figures, "HR@10" from the step test_NAME, "valid HR@10" from valid_NAME."""
    row = [label]
    for head in heads:
        step, figure = step_and_figure(head, name)
        found = [runner.figures(step).get(figure) for runner in runners]
        row.append(cell([value for value in found if value is not None]))
    return row


def yardstick_rows(name: str, runners: list[Runner], heads: Sequence[str]) -> list[list[str]]:
    """The three counts, from the same evaluations."""
    rows = []
    for method in ("popularity", "bigram", "skip-gram"):
        row = [method]
        for head in heads:
            step, figure = step_and_figure(head, name)
            lines = [line for runner in runners for line in runner.rows(step)]
            row.append(cell([line[figure] for line in lines if line["method"] == method and figure in line]))
        rows.append(row)
    return rows


def log_cell(runners: list[Runner], step: str, figure: str, choose: Callable, digits: int = 4) -> str:
    """One value from each training's log: choose(values in order)."""
    logs = [runner.logged(step, figure) for runner in runners]
    return cell([choose(values) for values in logs if values], digits)


def models_table(title: str, heads: Sequence[str], labels: dict[str, str], runners: list[Runner],
                 yardsticks: bool = True) -> str:
    """The figures of some models (name -> label), below the counts."""
    rows = yardstick_rows(next(iter(labels)), runners, heads) if yardsticks else []
    rows += [model_row(label, name, runners, heads) for name, label in labels.items()]
    return markdown(title, ["", *heads], rows)


def arms_table(title: str, arms: Sequence[str], runners: list[Runner]) -> str:
    """Validation loss and ranking of some arms, beside the yardsticks."""
    rows = [[label, "", *cells] for label, *cells in yardstick_rows(arms[0], runners, RANKING)]
    for arm in arms:
        label, *cells = model_row(ARMS[arm].label, arm, runners, RANKING)
        rows.append([label, log_cell(runners, f"sft_{arm}", "valid_loss", min, digits=3), *cells])
    return markdown(title, ["test, if not said otherwise", "valid loss", *RANKING], rows)


def inits_tables(runners: list[Runner]) -> str:
    """The starts, and how their SID rows lie before and after sft."""
    rows = []
    for arm in STARTS:
        row = [ARMS[arm].label]
        for figure, digits in (("effective_rank", 1), ("cosine", 3)):
            for place in (0, -1):
                found = [runner.rows(f"rows_{arm}") for runner in runners]
                row.append(cell([lines[place][figure] for lines in found if lines], digits))
        rows.append(row)
    heads = ["", "effective rank", "after", "cosine", "after"]
    return (arms_table("Initialisations", STARTS, runners)
            + markdown("Where the SID rows lie, before and after sft", heads, rows))


def depth_table(runners: list[Runner]) -> str:
    """Validation loss and HR@5 at every validation, mean over seeds."""
    rows = []
    for arm in DEPTHS:
        losses = [runner.logged(f"sft_{arm}", "valid_loss") for runner in runners]
        hits = []
        for runner in runners:
            lines = runner.rows(f"along_{arm}")
            hits.append([line["HR@5"] for line in lines if line["method"].startswith("sft_")])
        for figure, series in (("valid loss", losses), ("valid HR@5", hits)):
            validations = zip(*(values for values in series if values))         # of all seeds
            rows.append([f"{ARMS[arm].label}, {figure}", *(f"{statistics.mean(v):.4f}" for v in validations)])
    most = max(len(row) for row in rows)
    rows = [row + [""] * (most - len(row)) for row in rows]
    heads = ["", *(f"validation {number}" for number in range(1, most))]
    return markdown("TS-Rec, figure 4: along training", heads, rows)


def rl_table(runners: list[Runner]) -> str:
    """SFT and RL, searched with 50 beams."""
    figures = ("HR@1", "HR@5", "HR@10", "HR@50", "NDCG@10")
    heads = [f"test50 {figure}" for figure in figures]
    rows = [[*row, ""] for row in yardstick_rows("full", runners, heads)]
    for arm in ("neither", "full"):                             # the first line of RL's log is its start
        start = log_cell(runners, f"rl_{arm}", "NDCG@10", lambda values: values[0])
        rows.append([*model_row(ARMS[arm].label, arm, runners, heads), start])
    for name, (arm, flags) in RL.items():
        label = f"{ARMS[arm].label} + RL {flags}".strip()
        rows.append([*model_row(label, name, runners, heads), log_cell(runners, name, "NDCG@10", max)])
    return markdown("TS-Rec, table 4: SFT against SFT + RL, 50 beams",
                    ["", *(f"test {figure}" for figure in figures), "valid NDCG@10"], rows)


def scaling_table(runners: list[Runner]) -> str:
    """The arms of SCALING on each share of the training users."""
    rows = []
    for share in (*SHARES, 100):
        ending = f"_{share}" if share < 100 else ""
        found = yardstick_rows(SCALING[0] + ending, runners, RANKING)
        found += [model_row(ARMS[arm].label, arm + ending, runners, RANKING) for arm in SCALING]
        rows += [[f"{share} % of the users: {label}", *cells] for label, *cells in found]
    return markdown("STAR, figure 3: data scaling", ["", *RANKING], rows)


class Table(NamedTuple):
    """What --tables names."""
    steps: list[str]                    # whose figures it shows
    draw: Callable[[list[Runner]], str]


def evaluations(names: Sequence[str], *kinds: str) -> list[str]:
    """The steps that evaluate some models: (["full"], "valid", "test") -> ["valid_full", "test_full"]."""
    return [f"{kind}_{name}" for name in names for kind in kinds]


def labels_of(arms: Sequence[str]) -> dict[str, str]:
    return {arm: ARMS[arm].label for arm in arms}


SCALED = [*SCALING, *(f"{arm}_{share}" for share in SHARES for arm in SCALING)]
TABLES = {
    "tsrec": Table(evaluations(TSREC, "valid", "test"), partial(
        arms_table, "TS-Rec, table 3: what SA-Init and TS-Align add", TSREC)),
    "depth": Table(evaluations(DEPTHS, "valid", "test", "along"), depth_table),
    "inits": Table(evaluations(STARTS, "valid", "test", "rows"), inits_tables),
    "star": Table(evaluations(STAR, "valid", "test"), partial(
        arms_table, "STAR, table 1: align, then sft", STAR)),
    "search": Table(evaluations(SEARCH, "test", "search"), partial(
        models_table, "STAR, table 2: search, and the next item",
        ("search HR@5", "search HR@10", "search NDCG@5", "search NDCG@10", "HR@10", "NDCG@10"),
        labels_of(SEARCH), yardsticks=False)),
    "scaling": Table(evaluations(SCALED, "valid", "test"), scaling_table),
    "rl": Table(evaluations(("neither", "full", *RL), "test50"), rl_table),
    "comprehension": Table(evaluations(TSREC, "title2sid", "sid2title"), partial(
        models_table, "TS-Rec, figure 5: comprehension, 5 beams",
        ("title2sid HR@1", "title2sid HR@5",
         "sid2title accuracy", "sid2title accuracy_any", "sid2title token_f1"),
        labels_of(TSREC), yardsticks=False)),
    "cold": Table(evaluations(COLD, "valid", "test"), partial(
        models_table, "Cold start: test targets are new items, valid targets are not",
        ("HR@5", "HR@10", "HR@50", "NDCG@10", "valid HR@10", "valid NDCG@10"), COLD)),
    "teachers": Table(evaluations(TEACHERS, "valid", "test"), partial(
        models_table, "Teachers, on the released SIDs", RANKING, TEACHERS)),
}


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "device")
    flag = parser.add_argument
    flag("--out", default="runs/ablation", help="folder of all runs")
    flag("--data", default="", help="as for tokenize_items.py; empty: the demo")
    flag("--seeds", default="42,43,44", help="comma-separated")
    flag("--tables", default=",".join(TABLES), help="comma-separated")
    flag("--backbone", default="tiny", help="as for init_embeddings.py")
    flag("--jobs", type=number(int, 1), default=1, help="steps at a time; they share the cores")
    flag("--print", action="store_true", help="print the figures so far and run nothing")
    flag("--items", default="", help="more flags for tokenize_items.py; STAR: --max-history 20")
    flag("--init", default="", help='more flags for init_embeddings.py, as in --init="--width 512"')
    flag("--align", default="", help="more flags for train.py --stage align")
    flag("--train", default="", help="more flags for train.py")
    flag("--rl", default="", help="more flags for rl.py")
    args = parser.parse_args(argv)
    if not set(args.tables.split(",")) <= set(TABLES):
        parser.error(f"--tables: choose from {', '.join(TABLES)}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        parser.error("--seeds must be numbers, separated by commas")
    if set(args.out) & set(" '\""):
        parser.error("--out must have no blanks or quotes")
    return args


def main() -> int:
    args = parse_args()
    tables, out = args.tables.split(","), Path(args.out)
    if "teachers" in tables and not released_file(args.data, "semantics").exists():
        tables.remove("teachers")
        if args.data:
            print(f"no table teachers: {args.data} has no released semantics.jsonl")
    threads = max(1, os.cpu_count() // args.jobs) if args.jobs > 1 else 0
    if threads:
        torch.set_num_threads(threads)                          # for the steps that are functions
    extra = {"items": args.items, "init": args.init, "align": args.align, "train": args.train, "rl": args.rl}
    runners = []
    for seed in args.seeds.split(","):
        run = out / f"seed-{seed}"
        steps = all_steps(run, int(seed), args.data, args.backbone, extra, args.device)
        runners.append(Runner(run, steps, args.device, threads))

    failed = []
    if not args.print:
        jobs = []
        for table in tables:
            for runner in runners:
                for step in TABLES[table].steps:
                    jobs += [(runner, name) for name in runner.plan(step)]
        failed = make_all(jobs, args.jobs)
    text = "".join(TABLES[table].draw(runners) for table in tables)
    print(text)
    with atomic_write(out / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    if failed:
        print(f"{len(failed)} steps failed, see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
