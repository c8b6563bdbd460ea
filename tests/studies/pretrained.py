"""The papers' questions with a really pretrained language model: initialisations, STAR's align, TS-Align.

Each arm is one way of training. All arms of a table have the same data, seed and number of updates, and
differ in what their name says. Models are compared as in the papers, without evaluate.py's memory.

  gaussian, normal, mean, none, vocab, centered   how the SID rows start; trained without TS-Align
  align          the mean of the vocabulary, then STAR's align, then sft
  depth1, depth2 centered, on the first one or two levels only
  *_ts           the same start, trained with TS-Align
  *_texts        the same start, trained on Title2SID and SID2Title only, and measured by them

Reads   RUN with the files of stages 1 and 2; a Hugging Face folder, --backbone
Writes  OUT: checkpoints, figures, every script's output in log/; OUT/table.md
The script can be stopped and run again: finished steps are skipped, an interrupted training continues.

Examples, from the project's root
  python tests/studies/pretrained.py --run runs/demo --backbone FOLDER --arms gaussian,centered
  python tests/studies/pretrained.py --run runs/demo --backbone FOLDER --print     # the figures so far
  python tests/studies/pretrained.py --run runs/demo --backbone FOLDER --arms centered_ts --comprehension
"""
import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tokenize_items import atomic_write, make_parser, number, read_jsonl  # noqa: E402

TASKS, TS_ALIGN = "sequence,title2sid:0.05", ",text2token:0.05,token2text:0.05"
TITLES = "title2sid,sid2title"            # what the items are called, and nothing about users
ALIGN_TASKS = "title2sid,name_item"         # two of STAR's six: short texts, so that a CPU can
RECIPE = ("--loss trie --epochs 2 --lr 1e-3 --warmup 20 --dropout 0 --evals-per-epoch 2 --patience 0 "
          "--micro-tokens 512 --save-every 44 --log-every 22")
ALIGN_RECIPE = "--epochs 1 --batch-size 16 --lr 5e-3 --micro-tokens 512"
STEP_FILE = re.compile(r"_(\d{5})\.pt$")


class Arm(NamedTuple):
    """One way of training a model."""
    label: str                          # what the table calls it
    init: str                           # flags of init_embeddings.py
    tasks: str = TASKS
    batch: int = 30                     # larger with more tasks, so that all arms have 88 updates an epoch
    align: bool = False                 # STAR's align before sft?


STARTS = {
    "gaussian": Arm("gaussian N(mu, Sigma)", "--init gaussian"),
    "normal": Arm("normal N(0, 0.02^2)", "--init normal"),
    "mean": Arm("mean of the vocabulary", "--init mean"),
    "none": Arm("SA-Init as printed", "--init sa --sa-norm none"),
    "vocab": Arm("SA-Init, vocab", "--init sa --sa-norm vocab"),
    "centered": Arm("SA-Init, centered", "--init sa --sa-norm centered"),
    "depth1": Arm("SA-Init, centered, level 1", "--init sa --sa-norm centered --sa-depth 1"),
    "depth2": Arm("SA-Init, centered, levels 1 and 2", "--init sa --sa-norm centered --sa-depth 2"),
    "align": Arm("mean, align, then sft (STAR)", "--init mean", align=True),
}
ARMS = {
    **STARTS,
    **{f"{name}_ts": arm._replace(label=f"{arm.label}, TS-Align", tasks=TASKS + TS_ALIGN, batch=33)
       for name, arm in STARTS.items()},
    **{f"{name}_texts": arm._replace(label=f"{arm.label}, only titles", tasks=TITLES, batch=23)
       for name, arm in STARTS.items()},
}


# ---- What is run ---------------------------------------------------------------------------------

def training_steps(name: str, args: argparse.Namespace) -> dict[str, str]:
    """The commands that train an arm, by the names of their logs."""
    arm, common, start = ARMS[name], f"--run {args.run} --seed {args.seed}", f"{args.out}/init_{name}.pt"
    steps = {f"init_{name}": f"init_embeddings.py {common} --backbone {args.backbone} --out {start} {arm.init}"}
    if arm.align:
        aligned = f"{args.out}/align_{name}.pt"
        steps[f"align_{name}"] = (f"train.py {common} --stage align --from {start} --out {aligned} --resume "
                                  f"--tasks {ALIGN_TASKS} {args.align}")
        start = aligned
    steps[f"sft_{name}"] = (f"train.py {common} --from {start} --out {args.out}/sft_{name}.pt --resume --keep "
                            f"--tasks {arm.tasks} --batch-size {arm.batch} {RECIPE} {args.train}")
    return steps


def kept_checkpoints(name: str, out: Path) -> list[tuple[int, Path]]:
    """The weights of every validation of an arm, as (updates, file), in order."""
    files = [path for path in out.glob(f"sft_{name}_?????.pt") if STEP_FILE.search(path.name)]
    return sorted((int(STEP_FILE.search(path.name)[1]), path) for path in files)


def measuring_steps(name: str, args: argparse.Namespace) -> dict[str, str]:
    """The commands that measure a trained arm: along training on validation, at the end on test."""
    final = f"--checkpoint {args.out}/sft_{name}.pt"
    ranks, tells = ARMS[name].tasks != TITLES, ARMS[name].tasks == TITLES or args.comprehension
    flags = {f"test_{name}": f"{final} --memory 0 --limit {args.limit_test}"} if ranks else {}
    for step, path in kept_checkpoints(name, Path(args.out)) if args.along else []:
        flags[f"valid_{name}_{step:05d}"] = (f"--checkpoint {path} --split valid --memory 0 --num-beams 10 "
                                             f"--limit {args.limit}")
    if tells:
        flags[f"title2sid_{name}"] = f"{final} --task title2sid"
    steps = {log: f"evaluate.py --run {args.run} --metrics {args.out}/{log}.jsonl "
                  f"--predictions {args.out}/predictions.jsonl {more}" for log, more in flags.items()}
    if tells:
        log = f"sid2title_{name}"
        steps[log] = (f"tests/studies/sid2title.py --run {args.run} {final} --metrics {args.out}/{log}.jsonl "
                      "--limit 300 --show 5")
    return steps


def run_step(log: str, command: str, out: Path) -> None:
    """Run a script unless its log says that it is done. Its output is OUT/log/NAME.txt."""
    done, part = out / "log" / f"{log}.txt", out / "log" / f"{log}.part"
    if done.exists():
        return
    print(f"{time.strftime('%H:%M:%S')} {command}", flush=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    (out / f"{log}.jsonl").unlink(missing_ok=True)              # evaluate.py appends
    with part.open("w") as text:
        text.write(f"$ {command}\n")
        text.flush()
        subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=True, stdout=text, stderr=text)
    part.rename(done)


# ---- The table -----------------------------------------------------------------------------------

def figure(path: Path, *names: str) -> list[str]:
    """Figures of the last item-level row of a metrics file, or blanks."""
    rows = [row for row in read_jsonl(path, {}) if row.get("level") != "sid"] if path.exists() else []
    return [f"{rows[-1][name]:.4f}" if rows and name in rows[-1] else "" for name in names]


def last_number(path: Path, pattern: str) -> str:
    """What the pattern's group last matched in a log, or a blank."""
    found = re.findall(pattern, path.read_text()) if path.exists() else []
    return found[-1] if found else ""


def table_row(name: str, out: Path) -> list[str]:
    """One arm: cosine of the SID rows; loss, HR@10 and NDCG@10 along training; test; comprehension."""
    log, along = out / f"sft_{name}_log.jsonl", []
    for row in read_jsonl(log, {}) if log.exists() else []:
        if "valid_loss" in row:
            hits = figure(out / f"valid_{name}_{row['step']:05d}.jsonl", "HR@10", "NDCG@10")
            along.append(", ".join(filter(None, [f"{row['step']}: {row['valid_loss']:.3f}", *hits])))
    return [ARMS[name].label, last_number(out / "log" / f"init_{name}.txt", r"mean cosine (-?[\d.]+)"),
            "; ".join(along), *figure(out / f"test_{name}.jsonl", "HR@10", "NDCG@10"),
            *figure(out / f"title2sid_{name}.jsonl", "HR@1", "HR@5"),
            *figure(out / f"sid2title_{name}.jsonl", "token_f1")]


def make_table(names: list[str], out: Path) -> str:
    heads = ["start", "cosine", "updates: valid loss, HR@10, NDCG@10", "test HR@10", "test NDCG@10",
             "Title2SID HR@1", "HR@5", "SID2Title F1"]
    rows = [table_row(name, out) for name in names if (out / "log" / f"init_{name}.txt").exists()]
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def neighbours(names: list[str], out: Path) -> str:
    """What init_embeddings.py printed as the text tokens nearest to some SID tokens."""
    logs = {name: out / "log" / f"init_{name}.txt" for name in names}
    return "".join(f"{name}: {line}\n" for name, log in logs.items() if log.exists()
                   for line in log.read_text().splitlines() if line.startswith("neighbours"))


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed")
    flag = parser.add_argument
    flag("--backbone", default="", help="a Hugging Face folder or name")
    flag("--out", help="folder of this study, instead of RUN/pretrained")
    flag("--arms", default="gaussian,mean,none,vocab,centered,align,gaussian_ts,centered_ts",
         help=f"comma-separated; of {', '.join(ARMS)}")
    flag("--limit", type=number(int, 0), default=500, help="validation users along training; 0: all")
    flag("--along", action="store_true", help="rank validation users with the weights of every validation")
    flag("--limit-test", type=number(int, 0), default=0, help="test users; 0: all")
    flag("--comprehension", action="store_true", help="measure Title2SID and SID2Title, too")
    flag("--train", default="", help='more flags for train.py, as in --train="--lr 3e-4"')
    flag("--align", default=ALIGN_RECIPE, help="flags for train.py --stage align")
    flag("--print", action="store_true", help="print the figures so far and run nothing")
    args = parser.parse_args(argv)
    args.out = args.out or f"{args.run}/pretrained"
    if not set(args.arms.split(",")) <= set(ARMS):
        parser.error(f"--arms: choose from {', '.join(ARMS)}")
    if not args.print and not args.backbone:
        parser.error("--backbone is missing")
    return args


def main() -> None:
    args = parse_args()
    names, out = args.arms.split(","), Path(args.out).resolve()
    args.run, args.out = str(Path(args.run).resolve()), str(out)
    for name in [] if args.print else names:
        for steps in (training_steps, measuring_steps):         # what is measured is known after training
            for log, command in steps(name, args).items():
                run_step(log, command, out)
    text = make_table(names, out)
    print(text + neighbours(names, out))
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
