"""The papers' questions asked again: runs the scripts by their command lines over a grid and prints the tables.

    python tests/ablation.py --jobs 2                                   # every table on the demo, three seeds
    python tests/ablation.py --tables inits,star --seeds 42             # some of it
    python tests/ablation.py --data $DATA --out runs/ablation_industrial --seeds 42 --train="--epochs 3"
    python tests/ablation.py --backbone FOLDER --out runs/ablation_minilm --train="--lr 1e-3"
    python tests/ablation.py --print                                    # what is there so far, and run nothing

    tsrec           TS-Rec table 3: without SA-Init, without TS-Align, without both
    depth           TS-Rec figure 4: SA-Init on the first 0, 1, 2, 3 levels, and HR@5 along training
    inits           random, mean of the vocabulary, SA-Init as printed, rescaled and centered, STAR's align
    star            STAR table 1: align, then sft, against LC-Rec-style multi-task sft and TS-Rec
    search          STAR table 2: search queries, with and without the search task and align
    scaling         STAR figure 3: 10, 25, 50 and 100 % of the training users
    rl              TS-Rec table 4: SFT against SFT + RL from a plain and from a TS-Rec start; rollouts and rewards
    comprehension   TS-Rec figure 5: Title2SID and SID2Title
    cold            new items, by tokenize_items.py --codebook, that no training interaction holds
    teachers        the authors' LLM against TF-IDF, where --data has official_sids.jsonl and official_semantics.jsonl

Resumable: a step whose command and inputs have not changed is not run again, and a training that was cut goes on. Every
command with its output is in OUT/seed-N/log. Delete OUT to measure changed code. Tables also go to OUT/tables.md.
"""
import argparse
import concurrent.futures
import hashlib
import itertools
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tokenize_items import read_jsonl, replacing, within, write_jsonl  # noqa: E402
from train import PRESETS  # noqa: E402

TS_ALIGN = ("text2token", "token2text")
INITS = {"gaussian": "--init gaussian", "mean": "--init mean", "printed": "--sa-norm none", "vocab": "--sa-norm vocab",
         "depth1": "--sa-depth 1", "depth2": "--sa-depth 2"}
# name: (what the table calls it, the rows it starts from, TS-Align's tasks?, more tasks, align first?)
ARMS = {
    "full": ("TS-Rec: SA-Init and TS-Align", "sa", True, "", False),
    "no_sa": ("without SA-Init (gaussian)", "gaussian", True, "", False),
    "no_align": ("without TS-Align", "sa", False, "", False),
    "neither": ("without both (LC-Rec style)", "gaussian", False, "", False),
    "depth1": ("SA-Init on level 1", "depth1", True, "", False),
    "depth2": ("SA-Init on levels 1 and 2", "depth2", True, "", False),
    "mean": ("mean of the vocabulary", "mean", True, "", False),
    "printed": ("SA-Init as printed, --sa-norm none", "printed", True, "", False),
    "vocab": ("SA-Init, --sa-norm vocab", "vocab", True, "", False),
    "aligned": ("mean, align, then sft with TS-Align", "mean", True, "", True),
    "star": ("STAR: mean, align, then sft", "mean", False, "", True),
    "search": ("TS-Rec, search task", "sa", True, ",search", False),
    "star_search": ("STAR: mean, align, sft, search task", "mean", False, ",search", True),
}
# name: (the arm it starts from, flags)
RL = {"rl_neither": ("neither", ""), "rl_full": ("full", ""), "rl_rank_full": ("full", "--reward hit:1,rank:1"),
      "rl_draws_full": ("full", "--rollout sample"),
      "rl_draws_rank_full": ("full", "--rollout sample --reward hit:1,rank:1")}
SHARES = (10, 25, 50)
SPLITS = ("valid", "test")
NEW_ITEMS = ("average", "learned")


class Step(NamedTuple):
    """One command, or a function that prepares files, after the steps that it needs."""
    command: str | Callable[[], None]
    needs: tuple[str, ...] = ()


# ---- the grid ----

def tasks_of(args: argparse.Namespace, ts_align: bool, more: str) -> str:
    names = PRESETS["tiny" if args.backbone == "tiny" else "hf"]["tasks"].split(",")
    return ",".join(n for n in names if ts_align or n.split(":")[0] not in TS_ALIGN) + more


def training_steps(run: Path, args: argparse.Namespace, seed: int) -> dict[str, Step]:
    """Catalogue, semantics, every start, every arm's training and its figures on valid and test."""
    steps = {
        "items": Step(f"tokenize_items.py --run {run} --seed {seed}" + (f" --data {args.data}" if args.data else "")),
        "semantics": Step(f"extract_semantics.py --run {run} --seed {seed} --queries 5", ("items",)),
        "init_sa": Step(f"init_embeddings.py --run {run} --seed {seed} --backbone {args.backbone} {args.init} "
                        f"--out {run}/init_sa.pt", ("semantics",)),
        "align_mean": Step(f"train.py --stage align --run {run} --seed {seed} --from {run}/init_mean.pt --resume "
                           f"--out {run}/align_mean.pt {args.align}", ("init_mean",))}
    for name, flags in INITS.items():
        steps[f"init_{name}"] = Step(f"init_embeddings.py --run {run} --seed {seed} --backbone {run}/init_sa.pt "
                                     f"--out {run}/init_{name}.pt {flags}", ("init_sa",))
    for name, (_, init, ts_align, more, aligned) in ARMS.items():
        start = f"align_{init}" if aligned else f"init_{init}"
        steps[f"sft_{name}"] = Step(
            f"train.py --run {run} --seed {seed} --from {run}/{start}.pt --out {run}/sft_{name}.pt --resume "
            f"--tasks {tasks_of(args, ts_align, more)} {'--keep ' * (name in TABLES['depth'])}{args.train}", (start,))
        for split in SPLITS:
            steps[f"{split}_{name}"] = evaluation(run, f"sft_{name}", f"{split}_{name}", f"--split {split}")
        for task in ("title2sid", "sid2title", "search"):
            steps[f"{task}_{name}"] = evaluation(run, f"sft_{name}", f"{task}_{name}", f"--task {task} --limit 2000")
        steps[f"along_{name}"] = evaluation(run, f"sft_{name}", f"along_{name}", "--split valid",
                                            f"sft_{name}_{5 * '[0-9]'}.pt")
    return steps


def evaluation(run: Path, checkpoint: str, name: str, flags: str, pattern: str = "",
               data: Path | None = None) -> Step:
    """Rank the samples of RUN, or of the run `data`, with RUN/checkpoint.pt, or with every file of the pattern; the
    figures go to RUN/name.jsonl."""
    files = f"for each {run}/{pattern}: " if pattern else ""
    return Step(f"{files}evaluate.py --run {data or run} --checkpoint {run}/{checkpoint}.pt --metrics {run}/{name}.jsonl "
                f"--predictions {run}/predictions_{name}.jsonl {flags}", (checkpoint,))


def rl_steps(run: Path, args: argparse.Namespace, seed: int) -> dict[str, Step]:
    """GRPO from two starts, and from the better one with other rollouts, rewards and weights."""
    steps = {}
    for name, (start, flags) in RL.items():
        steps[name] = Step(f"rl.py --run {run} --seed {seed} --from {run}/sft_{start}.pt --out {run}/{name}.pt "
                           f"--resume {flags} {args.rl}", (f"sft_{start}",))
    for name, checkpoint in {**{name: name for name in RL}, "neither": "sft_neither", "full": "sft_full"}.items():
        steps[f"test50_{name}"] = evaluation(run, checkpoint, f"test50_{name}", "--num-beams 50")
    return steps


def scaling_steps(run: Path, args: argparse.Namespace, seed: int) -> dict[str, Step]:
    """The arms `full` and `neither` on a share of the training users, from the same start."""
    steps = {}
    for share in SHARES:
        part = run / f"share{share}"
        steps[f"share{share}"] = Step(lambda part=part, share=share: cut_users(run, part, share, seed), ("semantics",))
        for name in ("full", "neither"):
            init, out = ARMS[name][1], f"sft_{name}_{share}"
            steps[out] = Step(f"train.py --run {part} --seed {seed} --from {run}/init_{init}.pt --out {run}/{out}.pt "
                              f"--resume --tasks {tasks_of(args, ARMS[name][2], '')} {args.train}",
                              (f"share{share}", f"init_{init}"))
            for split in SPLITS:
                steps[f"{split}_{name}_{share}"] = evaluation(run, out, f"{split}_{name}_{share}", f"--split {split}",
                                                              data=part)            # whose users the yardsticks count
    return steps


def cold_steps(run: Path, args: argparse.Namespace, seed: int) -> dict[str, Step]:
    """A run without 5 % of the items, which then join by the stored codebook: test holds the users whose next item is
    one of them, valid those whose next item is not."""
    cold, flags, grown = run / "cold", f"--run {run}/cold --seed {seed}", run / "cold_grown"
    steps = {
        "cold_data": Step(lambda: hold_out(run, cold / "data", seed), ("items",)),
        "cold_items": Step(f"tokenize_items.py {flags} --data {cold}/data", ("cold_data",)),
        "cold_semantics": Step(f"extract_semantics.py {flags}", ("cold_items",)),
        "cold_init": Step(f"init_embeddings.py {flags} --backbone {args.backbone} {args.init}", ("cold_semantics",)),
        "cold_sft": Step(f"train.py {flags} --resume --tasks {tasks_of(args, True, '')} {args.train}", ("cold_init",)),
        "cold_copy": Step(lambda: copy_run(cold, grown, cold / "data/cold_test.jsonl"), ("cold_semantics",)),
        "cold_add": Step(f"tokenize_items.py --run {grown} --codebook {cold}/codebook.pt "
                         f"--items {cold}/data/new_items.jsonl", ("cold_copy",))}
    for split, how in itertools.product(SPLITS, NEW_ITEMS):
        steps[f"{split}_{how}"] = Step(
            f"evaluate.py --run {grown} --checkpoint {cold}/sft.pt --metrics {run}/{split}_{how}.jsonl --split {split} "
            f"--num-beams 50 --new-items {how}", ("cold_add", "cold_sft"))
    return steps


def teacher_steps(run: Path, args: argparse.Namespace, seed: int) -> dict[str, Step]:
    """The released SIDs with TF-IDF's semantics and with the released ones, all else equal."""
    steps, data = {}, Path(args.data or "")
    for name in ("tfidf", "llm"):
        part, flags = run / f"teacher_{name}", f"--run {run}/teacher_{name} --seed {seed}"
        steps[f"items_{name}"] = Step(f"tokenize_items.py {flags} --data {data} --sids {data}/official_sids.jsonl")
        steps[f"semantics_{name}"] = Step(
            f"extract_semantics.py {flags}" if name == "tfidf" else
            lambda part=part: shutil.copy(data / "official_semantics.jsonl", part / "semantics.jsonl"),
            (f"items_{name}",))
        steps[f"init_{name}"] = Step(f"init_embeddings.py {flags} --backbone {run}/init_sa.pt",
                                     ("init_sa", f"semantics_{name}"))
        steps[f"sft_{name}"] = Step(f"train.py {flags} --resume --tasks {tasks_of(args, True, '')} {args.train}",
                                    (f"init_{name}",))
        for split in SPLITS:
            metrics = f"{run}/{split}_{name}.jsonl"
            steps[f"{split}_{name}"] = Step(f"evaluate.py --run {part} --split {split} --metrics {metrics}",
                                            (f"sft_{name}",))
    return steps


def copy_run(run: Path, other: Path, test: Path) -> None:
    """The files of a run that stages 1 and 2 wrote, with another test split."""
    other.mkdir(exist_ok=True)
    for name in ("items.jsonl", "semantics.jsonl", "codebook.pt", "train.jsonl", "valid.jsonl"):
        shutil.copy(run / name, other / name)
    shutil.copy(test, other / "test.jsonl")


def cut_users(run: Path, part: Path, share: int, seed: int) -> None:
    """A run whose train.jsonl holds all samples of `share` % of the users; everything else is the same."""
    copy_run(run, part, run / "test.jsonl")
    train = read_jsonl(run / "train.jsonl", ())
    users = sorted({s["user_id"] for s in train})
    chosen = set(random.Random(seed).sample(users, len(users) * share // 100))
    write_jsonl(part / "train.jsonl", [s for s in train if s["user_id"] in chosen])


def hold_out(run: Path, data: Path, seed: int) -> None:
    """Take 5 % of the items, all of them next items of test users, out of the catalogue and of every history."""
    items, test = read_jsonl(run / "items.jsonl", ()), read_jsonl(run / "test.jsonl", ())
    wanted = sorted({s["target"] for s in test}, key=str)
    cold = set(random.Random(seed).sample(wanted, min(len(wanted), len(items) // 20)))
    for item in items:
        del item["sid"]
    write_jsonl(data / "items.jsonl", [i for i in items if i["item_id"] not in cold])
    write_jsonl(data / "new_items.jsonl", [i for i in items if i["item_id"] in cold])
    for split in ("train", "valid", "test"):
        samples = [{**s, "history": [i for i in s["history"] if i not in cold]}
                   for s in read_jsonl(run / f"{split}.jsonl", ())]
        samples = [s for s in samples if s["history"]]
        write_jsonl(data / f"{split}.jsonl", [s for s in samples if s["target"] not in cold])
    write_jsonl(data / "cold_test.jsonl", [s for s in samples if s["target"] in cold])


# ---- running it ----

class Runner:
    """The steps of one seed's run: which are done, how each is made, what they found."""
    def __init__(self, run: Path, steps: dict[str, Step], args: argparse.Namespace) -> None:
        self.run, self.steps, self.args = run, steps, args
        (run / "log").mkdir(parents=True, exist_ok=True)

    def key(self, name: str) -> str:
        """Of a step's command and, through their keys, of all it needs."""
        step = self.steps[name]
        text = [step.command if isinstance(step.command, str) else name, *map(self.key, step.needs)]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]

    def is_done(self, name: str) -> bool:
        marker = self.run / "log" / f"{name}.done"
        return marker.exists() and marker.read_text().split()[0] == self.key(name)

    def plan(self, name: str) -> list[str]:
        """What is left to do for a step, in order, itself last."""
        if self.is_done(name):
            return []
        return [*dict.fromkeys(n for need in self.steps[name].needs for n in self.plan(need)), name]

    def make(self, name: str) -> None:
        """Raises CalledProcessError where a script fails; its log then says why."""
        start, command = time.time(), self.steps[name].command
        print(f"{time.strftime('%H:%M:%S')} {self.run.name} {name}", flush=True)
        if isinstance(command, str):
            self.execute(name, command)
        else:
            command()
        (self.run / "log" / f"{name}.done").write_text(f"{self.key(name)} {time.time() - start:.0f} seconds\n")

    def execute(self, name: str, command: str) -> None:
        files = [None]
        if command.startswith("for each "):
            pattern, command = command.removeprefix("for each ").split(": ", 1)
            files = sorted(self.run.glob(Path(pattern).name))
        share = str(max(1, (os.cpu_count() or 1) // self.args.jobs))
        threads = {"OMP_NUM_THREADS": share} if self.args.jobs > 1 else {}
        (self.run / f"{name}.jsonl").unlink(missing_ok=True)            # evaluate.py appends
        with open(self.run / "log" / f"{name}.txt", "w", encoding="utf-8") as log:
            for file in files:
                script, *flags = shlex.split(command)
                flags += [*(["--checkpoint", str(file)] if file else []),
                          *(["--device", self.args.device] if self.args.device and "semantics" not in script else [])]
                print("$ python", script, shlex.join(flags), file=log, flush=True)
                subprocess.run([sys.executable, str(ROOT / script), *flags], stdout=log, stderr=subprocess.STDOUT,
                               check=True, env={**os.environ, **threads})

    def rows(self, name: str) -> list[dict]:
        """The figures that a step has written; none if it is not done."""
        return read_jsonl(self.run / f"{name}.jsonl", ()) if self.is_done(name) else []

    def figures(self, name: str) -> dict:
        """The model's own row (the last but SID-level ones)."""
        return next((r for r in reversed(self.rows(name)) if r["level"] != "sid"), {})


def make_all(jobs: list[tuple[Runner, str]], at_once: int) -> list[str]:
    """Make steps, listed after all they need, as soon as those are done; what went wrong."""
    waiting, running, failed = dict.fromkeys(jobs), {}, []
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            busy = {*waiting, *running.values()}
            ready = [job for job in waiting if not {(job[0], need) for need in job[0].steps[job[1]].needs} & busy]
            for job in ready[:at_once - len(running)]:
                running[pool.submit(job[0].make, job[1])] = job
                del waiting[job]
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                runner, name = running.pop(future)
                if future.exception():
                    failed.append(f"{runner.run}/log/{name}.txt: {future.exception()}")
                    print("failed:", failed[-1], flush=True)
                    lost = {other for other in waiting if other[0] is runner and name in runner.plan(other[1])}
                    waiting = {job: None for job in waiting if job not in lost}
    return failed


# ---- the tables ----

def cell(values: list[float], digits: int = 4) -> str:
    """Mean, and the standard deviation over seeds where they differ."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def markdown(title: str, heads: list[str], rows: list[list[str]]) -> str:
    rows = [row for row in rows if any(row[1:])]
    lines = [heads, ["---"] * len(heads), *rows]
    return f"\n### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ranking_row(label: str, name: str, runners: list[Runner], heads: Sequence[str]) -> list[str]:
    """One arm in a table: figures named `valid X` from its validation, the others from its test."""
    out = [label]
    for head in heads:
        split, _, figure = head.rpartition(" ")
        out.append(cell([r.figures(f"{split or 'test'}_{name}").get(figure) for r in runners]))
    return out


def yardstick_rows(name: str, runners: list[Runner], heads: tuple[str, ...]) -> list[list[str]]:
    """Popularity and bigram, as the scripts count them beside an arm's figures."""
    out = []
    for method in ("popularity", "bigram"):
        row = [method]
        for head in heads:
            split, _, figure = head.rpartition(" ")
            found = [r for runner in runners for r in runner.rows(f"{split or 'test'}_{name}")]
            row.append(cell([r.get(figure) for r in found if r["method"] == method]))
        out.append(row)
    return out


def from_log(runner: Runner, name: str, figure: str, which: Callable):
    """Of a figure in a training's log: which(values in order); None where there are none."""
    path = runner.run / f"{name}_log.jsonl"
    values = [row[figure] for row in read_jsonl(path, ()) if figure in row] if runner.is_done(name) else []
    return which(values) if values else None


RANKING = ("valid NDCG@10", "HR@5", "HR@10", "NDCG@5", "NDCG@10")


def arms_table(title: str, names: list[str], runners: list[Runner]) -> str:
    rows = yardstick_rows(names[0], runners, RANKING)
    rows = [[row[0], "", *row[1:]] for row in rows]
    for name in names:
        label, *rest = ranking_row(ARMS[name][0], name, runners, RANKING)
        rows.append([label, cell([from_log(r, f"sft_{name}", "valid_loss", min) for r in runners], 3), *rest])
    return markdown(title, ["test, where not said otherwise", "valid loss", *RANKING], rows)


def geometry_table(names: list[str], runners: list[Runner]) -> str:
    rows = []
    for name in names:
        cells = [cell([from_log(r, f"sft_{name}", figure, which) for r in runners], digits)
                 for figure, digits in (("effective_rank", 1), ("cosine", 3), ("siblings", 3))
                 for which in (lambda v: v[0], lambda v: v[-1])]
        rows.append([ARMS[name][0], *cells])
    return markdown("Where the SID rows lie, before and after sft", ["", "rank", "after", "cosine", "after",
                                                                     "siblings", "after"], rows)


def depth_table(names: list[str], runners: list[Runner]) -> str:
    """Validation loss and HR@5 at every validation, mean over seeds."""
    rows = []
    for name in names:
        for figure, values in (
                ("valid loss", [from_log(r, f"sft_{name}", "valid_loss", list) for r in runners]),
                ("valid HR@5", [[row["HR@5"] for row in r.rows(f"along_{name}") if row["method"].startswith("sft_")]
                                for r in runners])):
            points = [statistics.mean(at) for at in zip(*filter(None, values))]
            rows.append([f"{ARMS[name][0]}, {figure}", *(f"{p:.4f}" for p in points)])
    most = max(map(len, rows)) if rows else 1
    rows = [row + [""] * (most - len(row)) for row in rows]
    return markdown("TS-Rec figure 4: along training", ["", *(f"epoch {n}" for n in range(1, most))], rows)


def other_tables(wanted: list[str], runners: list[Runner]) -> list[str]:
    """RL, comprehension, search, scaling, cold start, teachers."""
    out = []
    if "rl" in wanted:
        heads = [f"test50 {figure}" for figure in ("HR@1", "HR@5", "HR@10", "HR@50", "NDCG@10")]
        rows = [[*row, ""] for row in yardstick_rows("full", runners, heads)]
        arms = [(ARMS[start][0], start, f"rl_{start}", lambda values: values[0]) for start in ("neither", "full")]
        arms += [(f"{ARMS[start][0]} + RL {flags}".strip(), name, name, max) for name, (start, flags) in RL.items()]
        for label, name, log, which in arms:
            rows.append([*ranking_row(label, name, runners, heads),
                         cell([from_log(r, log, "NDCG@10", which) for r in runners])])
        out.append(markdown("TS-Rec table 4: SFT against SFT + RL, 50 beams",
                            ["", *(head.replace("50 ", " ") for head in heads), "valid NDCG@10"], rows))
    if "comprehension" in wanted:
        heads = ("title2sid HR@1", "title2sid HR@5", "sid2title accuracy", "sid2title accuracy_any",
                 "sid2title token_f1")
        out.append(markdown("TS-Rec figure 5: comprehension, 5 beams", ["", *heads], [
            ranking_row(ARMS[n][0], n, runners, heads) for n in TABLES["comprehension"]]))
    if "search" in wanted:
        heads = ("search HR@5", "search HR@10", "search NDCG@5", "search NDCG@10", "HR@10", "NDCG@10")
        out.append(markdown("STAR table 2: search, and the next item beside it", ["", *heads], [
            ranking_row(ARMS[n][0], n, runners, heads) for n in TABLES["search"]]))
    if "scaling" in wanted:
        rows = []
        for share in (*SHARES, 100):
            tail = f"_{share}" if share < 100 else ""
            found = yardstick_rows(f"full{tail}", runners, RANKING)
            found += [ranking_row(ARMS[n][0], n + tail, runners, RANKING) for n in TABLES["scaling"]]
            rows += [[f"{share} % of the users: {label}", *cells] for label, *cells in found]
        out.append(markdown("STAR figure 3: data scaling", ["", *RANKING], rows))
    if "cold" in wanted:
        heads = ("HR@5", "HR@10", "HR@50", "NDCG@10", "valid HR@10", "valid NDCG@10")
        rows = [ranking_row(f"TS-Rec, --new-items {how}", how, runners, heads) for how in NEW_ITEMS]
        out.append(markdown("Cold start: test targets are new items, valid targets are not", ["", *heads],
                            yardstick_rows("average", runners, heads) + rows))
    if "teachers" in wanted:
        rows = yardstick_rows("tfidf", runners, RANKING)
        rows += [ranking_row(label, name, runners, RANKING)
                 for name, label in (("tfidf", "offline teacher (TF-IDF)"), ("llm", "the authors' LLM"))]
        out.append(markdown("Teachers, on the released SIDs", ["", *RANKING], rows))
    return out


TABLES = {"tsrec": ["full", "no_sa", "no_align", "neither"], "depth": ["no_sa", "depth1", "depth2", "full"],
          "inits": ["no_sa", "mean", "printed", "vocab", "full", "aligned"],
          "star": ["neither", "star", "full"],
          "search": ["full", "search", "star", "star_search"], "scaling": ["full", "neither"], "rl": [],
          "comprehension": ["full", "no_sa", "no_align", "neither"], "cold": [], "teachers": []}
TITLES = {"tsrec": "TS-Rec table 3: what SA-Init and TS-Align add", "inits": "Initialisations",
          "star": "STAR table 1: align, then sft"}


def targets_of(table: str) -> list[str]:
    """The steps whose figures a table shows."""
    kinds = {"depth": ["valid", "test", "along"], "search": ["valid", "test", "search"],
             "comprehension": ["title2sid", "sid2title"]}.get(table, ["valid", "test"])
    names = [f"{kind}_{arm}" for arm in TABLES[table] for kind in kinds]
    if table == "scaling":
        names += [f"{split}_{arm}_{share}" for share in SHARES for arm in TABLES[table] for split in SPLITS]
    if table == "rl":
        names += [f"test50_{name}" for name in ("neither", "full", *RL)]
    others = {"cold": NEW_ITEMS, "teachers": ("tfidf", "llm")}.get(table, ())
    return names + [f"{split}_{name}" for name in others for split in SPLITS]


def print_tables(wanted: list[str], runners: list[Runner], out: Path) -> None:
    text = [arms_table(TITLES[t], TABLES[t], runners) for t in wanted if t in TITLES]
    text += [geometry_table(TABLES["inits"], runners)] if "inits" in wanted else []
    text += [depth_table(TABLES["depth"], runners)] if "depth" in wanted else []
    text = "".join(text + other_tables(wanted, runners))
    print(text)
    with replacing(out / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/ablation", help="folder of all runs")
    parser.add_argument("--data", help="as for tokenize_items.py; default: the demo")
    parser.add_argument("--seeds", default="42,43,44", help="comma-separated")
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated")
    parser.add_argument("--backbone", default="tiny", help="as for init_embeddings.py")
    parser.add_argument("--jobs", type=within(int, 1), default=1, help="steps at a time, each with its share of the cores")
    parser.add_argument("--device", default="", help="cpu, cuda, ...")
    parser.add_argument("--print", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--init", default="", help='more flags for init_embeddings.py, as in --init="--width 512"')
    parser.add_argument("--align", default="", help="more flags for train.py --stage align")
    parser.add_argument("--train", default="", help="more flags for train.py")
    parser.add_argument("--rl", default="", help="more flags for rl.py")
    args = parser.parse_args(argv)
    if set(args.tables.split(",")) - set(TABLES):
        parser.error(f"--tables: choose from {', '.join(TABLES)}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")) or set(args.out) & set(" '\""):
        parser.error("--seeds: numbers, comma-separated; --out: no blanks or quotes")
    return args


def main() -> int:
    args = parse_args()
    wanted = args.tables.split(",")
    if not (Path(args.data or "") / "official_semantics.jsonl").exists():
        wanted = [table for table in wanted if table != "teachers"]
    runners = []
    for seed in map(int, args.seeds.split(",")):
        run = Path(args.out) / f"seed-{seed}"
        parts = (training_steps, rl_steps, scaling_steps, cold_steps, teacher_steps)
        runners.append(Runner(run, {k: v for part in parts for k, v in part(run, args, seed).items()}, args))
    failed = []
    if not args.print:
        failed = make_all([(runner, step) for table in wanted for runner in runners for name in targets_of(table)
                           for step in runner.plan(name)], args.jobs)
    print_tables(wanted, runners, Path(args.out))
    if failed:
        print(f"{len(failed)} steps failed, see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
