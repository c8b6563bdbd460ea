"""Measure what RESULTS.md compares, on one commit, and print its tables.

  ours      SFT without and with the memory, beside the counts; on scientific also with --exclude-history
  rl        RL from these models, with MiniOneRec's reward
  trained   SASRec and the TIGER-style decoder of baselines.py
  papers    LC-Rec style (gaussian rows, no TS-Align) and STAR (mean, align for three epochs, next item
            alone), on the same backbone; Industrial has one seed
  half      Industrial, seed 42: a model of the first half of train.jsonl, with the memory of that half and
            with the memory of all
  indexes   SIDs made in other ways: RQ-VAE, Sinkhorn, the peers' released ones, random codes; the same
            recipe, three seeds on the demo and one on Industrial

Writes  OUT/CATALOGUE-SEED, a run with every command and its output in log/; OUT/INDEX/CATALOGUE-SEED;
        OUT/results.md
The script can be stopped and run again: what is done is skipped, and interrupted training continues. It stops
if OUT was begun on another commit.

Examples, from the project's root
  python tests/studies/reproduce.py --jobs 2 --industrial DIR --scientific DIR
  python tests/studies/reproduce.py --groups ours,trained                # the demo alone
  python tests/studies/reproduce.py --print                              # the tables so far; runs nothing
"""
import argparse
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Sequence

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "studies")]
from ablation import Runner, Step, copy_run, make_all, markdown, released_file, task_list  # noqa: E402
from tokenize_items import (atomic_write, codes_of, make_parser, number, read_catalogue,  # noqa: E402
                            read_jsonl, sid_token, stop, write_jsonl)

GROUPS = ("ours", "rl", "trained", "papers", "half", "indexes")
FIRST_SEED, FEW = 42, 3                 # scientific, rl and trained have at most so many seeds
COSTLY = {"demo": 3, "industrial": 1, "scientific": 0}                        # papers and indexes
HEADS = {"test": ("HR@1", "HR@3", "NDCG@3", "HR@5", "NDCG@5", "HR@10", "NDCG@10"),
         "valid": ("HR@1", "HR@10", "NDCG@10")}
MODELS = {"sasrec": "SASRec", "tiger.pt": "TIGER-style", "lcrec.pt": "LC-Rec style", "star.pt": "STAR",
          "sft.pt": "ours", "rl.pt": "ours, RL"}
METHODS = {name: name for name in ("popularity", "bigram", "skip-gram")}      # name -> label
for name, label in MODELS.items():
    METHODS |= {name: label, f"{name} + memory 0.6": f"{label}, with memory"}
INDEXES = {                             # name -> label, flags of tokenize_items.py
    "kmeans": ("RQ-KMeans (the default)", ""),
    "rqvae": ("RQ-VAE", "--quantizer rqvae"),
    "sinkhorn": ("RQ-KMeans, Sinkhorn against collisions", "--collision sinkhorn"),
    "released": ("the peers' released SIDs", "--sids {released}"),
    "random": ("random codes", "--sids {run}/random.jsonl"),
}


# ---- The steps of a run --------------------------------------------------------------------------

def run_steps(run: Path, seed: int, data: str, groups: list[str], filtered: bool,
              index: str = "") -> dict[str, Step]:
    """The README's commands in one run; evaluate.py appends all figures to RUN/metrics.jsonl.

    index: flags of tokenize_items.py.
    """
    common = f"--run {run} --seed {seed}"
    steps = {
        "items": Step(f"tokenize_items.py {common}" + (f" --data {data}" if data else "") + index),
        "semantics": Step(f"extract_semantics.py {common}", ("items",)),
        "init": Step(f"init_embeddings.py {common}", ("semantics",)),
        "sft": Step(f"train.py {common} --resume", ("init",)),
        "sft_valid": Step(f"evaluate.py --run {run} --split valid", ("sft",)),
        "sft_test": Step(f"evaluate.py --run {run}", ("sft_valid",)),
    }
    if filtered:
        steps["sft_filtered"] = Step(f"evaluate.py --run {run} --exclude-history", ("sft_test",))
    if "rl" in groups and seed < FIRST_SEED + FEW:
        rl = f"evaluate.py --run {run} --checkpoint {run}/rl.pt"
        steps["rl"] = Step(f"rl.py {common} --reward hit:1,rank:1 --resume", ("sft_test",))
        steps["rl_valid"] = Step(f"{rl} --split valid", ("rl",))
        steps["rl_test"] = Step(rl, ("rl_valid",))
    if "papers" in groups and seed < FIRST_SEED + COSTLY[run.name.split("-")[0]]:
        steps |= paper_steps(run, common)
    if "trained" in groups and seed < FIRST_SEED + FEW:
        for method in ("sasrec", "tiger"):
            steps[method] = Step(f"tests/studies/baselines.py {method} {common}", ("sft_test",))
    return steps


def paper_steps(run: Path, common: str) -> dict[str, Step]:
    """LC-Rec style and STAR, from the run's backbone."""
    init = f"init_embeddings.py {common} --backbone {run}/init.pt"
    train = f"train.py {common} --resume"
    steps = {
        "gaussian": Step(f"{init} --init gaussian --out {run}/gaussian.pt", ("sft_test",)),
        "lcrec": Step(f"{train} --from {run}/gaussian.pt --out {run}/lcrec.pt "
                      f"--tasks {task_list('tiny', ts_align=False)}", ("gaussian",)),
        "mean": Step(f"{init} --init mean --out {run}/mean.pt", ("sft_test",)),
        "align": Step(f"{train} --stage align --from {run}/mean.pt --epochs 3", ("mean",)),
        "star": Step(f"{train} --from {run}/align.pt --out {run}/star.pt "
                     f"--tasks {task_list('tiny', alone=True)}", ("align",)),
    }
    for name in ("lcrec", "star"):
        evaluate = f"evaluate.py --run {run} --checkpoint {run}/{name}.pt --predictions {run}/{name}.jsonl"
        steps[f"{name}_valid"] = Step(f"{evaluate} --split valid", (name,))
        steps[f"{name}_test"] = Step(evaluate, (f"{name}_valid",))
    return steps


def half_steps(run: Path) -> dict[str, Step]:
    """Train on the first half of train.jsonl; then count the first half, and all of it."""
    half, common = run.with_name(f"{run.name}-half"), f"--seed 42 --from {run}/init.pt"
    whole = f"evaluate.py --run {half} --memory-from {run}/train.jsonl --metrics {half}/whole.jsonl"
    return {
        "half_data": Step(partial(cut_train, run, half), ("init",)),
        "half_sft": Step(f"train.py --run {half} {common} --resume", ("half_data",)),
        "half_test": Step(f"evaluate.py --run {half}", ("half_sft",)),
        "half_whole": Step(whole, ("half_test",)),
    }


def index_runs(out: Path, seed: int, name: str, data: str, device: str, threads: int) -> list[Runner]:
    """One run for each other way to make SIDs."""
    runners, released = [], released_file(data, "sids")
    for index, (_, flags) in INDEXES.items():
        run = out / index / f"{name}-{seed}"
        if index == "kmeans" or index == "released" and not released.exists():
            continue
        steps = run_steps(run, seed, data, [], False, " " + flags.format(released=released, run=run))
        if index == "random":
            plain = run_steps(run, seed, data, [], False)["items"]
            steps["items"] = steps["items"]._replace(needs=("sids",))
            steps |= {"plain": plain, "sids": Step(partial(draw_sids, run, seed), ("plain",))}
        runners.append(Runner(run, steps, device, threads))
    return runners


def draw_sids(run: Path, seed: int) -> None:
    """Write RUN/random.jsonl: random SIDs, all different, with as many levels and codes as the run's."""
    items, rng = read_catalogue(run / "items.jsonl"), random.Random(seed)
    size, levels = 1 + int(codes_of(items).max()), len(items[0]["sid"])
    numbers = rng.sample(range(size ** levels), len(items))
    codes = [[number // size ** level % size for level in range(levels)] for number in numbers]
    rows = [{"item_id": item["item_id"], "sid": [sid_token(level, code) for level, code in enumerate(row)]}
            for item, row in zip(items, codes)]
    write_jsonl(run / "random.jsonl", rows)


def cut_train(run: Path, half: Path) -> None:
    """Copy a run, but keep only the first half of its training samples, which are ordered by time."""
    copy_run(run, half, run / "test.jsonl")
    samples = read_jsonl(run / "train.jsonl", {})
    write_jsonl(half / "train.jsonl", samples[:len(samples) // 2])


# ---- Tables --------------------------------------------------------------------------------------

def figures(run: Path, method: str, split: str, filtered: bool = False, name: str = "metrics.jsonl") -> dict:
    """The latest line of a method in a run's metrics, {} if there is none."""
    rows = read_jsonl(run / name, {}) if (run / name).exists() else []
    rows = [row for row in rows if (row["method"], row["split"], row["level"]) == (method, split, "item")
            and bool(row.get("exclude_history")) == filtered and row["task"] == "next_brief"]
    return rows[-1] if rows else {}


def spread(values: list[float]) -> str:
    """The mean, with the smallest and the largest value if they differ."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.4f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def table(title: str, runs: list[Path], split: str, filtered: bool = False) -> str:
    """A row for each method: means over the seeds, at 10 with the smallest and the largest."""
    rows = []
    for method, label in METHODS.items():
        found = [row for run in runs if (row := figures(run, method, split, filtered))]
        cells = [spread([row[head] for row in found]) for head in HEADS[split]]
        cells = [cell if head.endswith("@10") else cell.split(" ")[0]
                 for head, cell in zip(HEADS[split], cells)]
        rows.append([label, str(len(found)) if found else "", *cells])
    return markdown(title, ["method", "seeds", *HEADS[split]], rows)


def kinds_table(title: str, run: Path) -> str:
    """HR@1 / HR@10 by what training has shown of the target, one run, test."""
    methods = ("bigram", "skip-gram", "sasrec", "tiger.pt", "sft.pt", "sft.pt + memory 0.6")
    found = {method: figures(run, method, "test") for method in methods}
    found = {METHODS[method]: row["kinds"] for method, row in found.items() if row.get("kinds")}
    kinds = next(iter(found.values()), {})
    rows = [[kind, str(kinds[kind]["n"]), *(f"{row[kind]['HR@1']:.3f} / {row[kind]['HR@10']:.3f}"
                                            for row in found.values())] for kind in kinds]
    return markdown(title, ["targets", "n", *found], rows)


def codes_table(title: str, run: Path) -> str:
    """How often the best item has the target's first code, the second given the first, and so on."""
    rows = []
    for method, label in METHODS.items():
        codes = figures(run, method, "test").get("codes", [])
        shares = [b / a if a else 0.0 for a, b in zip([1.0, *codes], codes)]
        rows.append([label, *(f"{share:.3f}" for share in shares)])
    width = max(len(row) for row in rows)
    heads = ["method", "code 1", *(f"code {level}, if those before are right" for level in range(2, width))]
    return markdown(title, heads, rows)


def half_table(run: Path) -> str:
    """What the memory of yesterday's purchases gives a model of the day before."""
    half, rows = run.with_name(f"{run.name}-half"), []
    for label, folder, method, name in (
            ("model and memory of the first half", half, "sft.pt + memory 0.6", "metrics.jsonl"),
            ("model of the first half, memory of all", half, "sft.pt + memory 0.6", "whole.jsonl"),
            ("model and memory of all", run, "sft.pt + memory 0.6", "metrics.jsonl"),
            ("model of the first half, no memory", half, "sft.pt", "metrics.jsonl"),
            ("model of all, no memory", run, "sft.pt", "metrics.jsonl")):
        row = figures(folder, method, "test", name=name)
        rows.append([label, *(f"{row[head]:.4f}" for head in HEADS["valid"] if row)])
    title = "Industrial, seed 42, test: purchases that the model has not seen"
    return markdown(title, ["", *HEADS["valid"]], rows)


def perplexities(run: Path) -> list[float]:
    """How many codes of each level are in even use, as tokenize_items.print_levels has it; from the SIDs."""
    codes = torch.from_numpy(codes_of(read_catalogue(run / "items.jsonl")))
    shares = [torch.bincount(level).double() / len(level) for level in codes.T]
    return [float(torch.special.entr(share).sum().exp()) for share in shares]


def index_table(out: Path, name: str, seeds: Sequence[int]) -> str:
    """Each way to make SIDs: error and collisions from stage 1's output, use of the codes, ranking."""
    heads = ["SIDs", "seeds", "mse", "collisions", "perplexity", "valid HR@10", "NDCG@10", "test HR@10",
             "NDCG@10", "with memory", "NDCG@10"]
    rows, measured = [], {}
    for index in INDEXES:
        runs = [out / ("" if index == "kmeans" else index) / f"{name}-{seed}" for seed in seeds]
        measured[index] = [run for run in runs if figures(run, "sft.pt", "test")]
    measured = {index: runs for index, runs in measured.items() if runs}
    if set(measured) <= {"kmeans"}:
        return ""
    for index, runs in measured.items():
        logs = [(run / "log" / "items.txt").read_text(encoding="utf-8") for run in runs]
        errors = [float(re.findall(r"mse ([0-9.]+)", log)[-1]) for log in logs if "mse" in log]
        collisions = [float(re.search(r"(?:collisions|:) (\d+)( of| collisions)", log)[1]) for log in logs]
        use = [sum(level) / len(runs) for level in zip(*map(perplexities, runs))]
        cells = [f"{sum(errors) / len(errors):.4f}" if errors else "", f"{sum(collisions) / len(runs):.0f}",
                 " / ".join(f"{perplexity:.0f}" for perplexity in use)]
        for method, split in (("sft.pt", "valid"), ("sft.pt", "test"), ("sft.pt + memory 0.6", "test")):
            for head in ("HR@10", "NDCG@10"):
                cells.append(spread([figures(run, method, split)[head] for run in runs]))
        rows.append([INDEXES[index][0], str(len(runs)), *cells])
    return markdown(f"{name}: other SIDs, the same recipe", heads, rows)


def times_table(runners: list[Runner]) -> str:
    """Minutes of each step, mean over the runs of a catalogue."""
    minutes: dict = {}
    for runner in runners:
        for path in (runner.run / "log").glob("*.done"):
            seconds = float(path.read_text().split()[1]) / 60
            minutes.setdefault(path.stem, {}).setdefault(runner.run.name.split("-")[0], []).append(seconds)
    names = sorted({name for row in minutes.values() for name in row})
    rows = [[step, *(f"{sum(row[name]) / len(row[name]):.1f}" if name in row else "" for name in names)]
            for step, row in sorted(minutes.items())]
    return markdown("Minutes", ["step", *names], rows)


def all_tables(out: Path, runners: list[Runner]) -> str:
    """The tables of each catalogue, from the runs of all seeds, those of `indexes` left out."""
    text, names = "", list(dict.fromkeys(runner.run.name.split("-")[0] for runner in runners))
    for name in names:
        runs = [runner.run for runner in runners if runner.run.name.startswith(name)]
        text += table(f"{name}, test", runs, "test") + table(f"{name}, validation", runs, "valid")
        if name == "scientific":
            text += table(f"{name}, test, --exclude-history", runs, "test", filtered=True)
        text += kinds_table(f"{name}, seed 42, test: HR@1 / HR@10 by what training has shown", runs[0])
        text += codes_table(f"{name}, seed 42, test: the best item's codes", runs[0])
        text += index_table(out, name, range(FIRST_SEED, FIRST_SEED + COSTLY[name]))
    if "industrial" in names:
        text += half_table(out / "industrial-42")
    return text + times_table(runners)


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "device")
    flag = parser.add_argument
    flag("--out", default="runs/reproduce", help="folder of all runs")
    flag("--industrial", default="", help="folder of Amazon's Industrial, official split; empty: left out")
    flag("--scientific", default="", help="folder of the second catalogue; empty: left out")
    flag("--seeds", type=number(int, 1), default=5, help="how many, from 42 on; some groups have 3 at most")
    flag("--groups", default=",".join(GROUPS), help="comma-separated")
    flag("--jobs", type=number(int, 1), default=1, help="steps at a time; they share the cores")
    flag("--print", action="store_true", help="print the tables so far and run nothing")
    args = parser.parse_args(argv)
    if not set(args.groups.split(",")) <= set(GROUPS):
        parser.error(f"--groups: choose from {', '.join(GROUPS)}")
    return args


def check_commit(out: Path) -> None:
    """Stop if OUT was begun on another commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit, path = done.stdout.strip() or "unknown", out / "commit"
    if path.exists() and path.read_text() != commit:
        stop(f"{path}: begun on {path.read_text()[:10]}, this is {commit[:10]}; name another --out")
    with atomic_write(path) as temporary:
        temporary.write_text(commit)


def main() -> int:
    args = parse_args()
    out, groups = Path(args.out), args.groups.split(",")
    catalogues = {"demo": "", "industrial": args.industrial, "scientific": args.scientific}
    catalogues = {name: data for name, data in catalogues.items() if data or name == "demo" or args.print}
    threads = max(1, os.cpu_count() // args.jobs) if args.jobs > 1 else 0
    runners, others = [], []
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):     # all catalogues' first seeds first
        for name, data in catalogues.items():
            if name != "scientific" or seed < FIRST_SEED + FEW:
                run = out / f"{name}-{seed}"
                steps = run_steps(run, seed, data, groups, name == "scientific")
                if "half" in groups and (name, seed) == ("industrial", 42):
                    steps |= half_steps(run)
                runners.append(Runner(run, steps, args.device, threads))
            if "indexes" in groups and seed < FIRST_SEED + COSTLY[name]:
                others += index_runs(out, seed, name, data, args.device, threads)
    failed = []
    if not args.print:
        check_commit(out)
        jobs = [(runner, name) for runner in runners + others for step in runner.steps
                for name in runner.plan(step)]
        failed = make_all(jobs, args.jobs)
    text = all_tables(out, runners)
    print(text)
    with atomic_write(out / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
