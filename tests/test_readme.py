"""README.md, RESULTS.md and GPU.md stay true.

Each command is read by the parser of its script. Light commands are also run, on the toy shop. Flags, files,
functions and links that the pages name exist, and sums come out.
"""
import argparse
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, write_lines
from torch.distributed.run import parse_args as parse_torchrun
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import extract_semantics

for folder in ("data", "demo", "studies"):
    sys.path.insert(0, str(ROOT / "tests" / folder))

STAGES = ("tokenize_items", "extract_semantics", "init_embeddings", "train", "rl", "evaluate")
SOURCES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
           for path in [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]}
SCRIPTS = [name for name, text in SOURCES.items() if "\ndef main()" in text]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "tests/studies/RESULTS.md", "tests/studies/GPU.md")}
README, RESULTS, GPU = PAGES.values()

# Too heavy for a test: several processes, downloads, a server, or all of a study
TOO_MUCH = {"torchrun", "--encoder", "--backbone", "http"}
LIGHT_SCRIPTS = {*(f"{name}.py" for name in STAGES), "tests/studies/sid2title.py"}
SMALL = {"tokenize_items": ["--codebook-size", 8], "train": ["--epochs", 1, "--warmup", 2],
         "init_embeddings": ["--width", 32, "--layers", 2, "--vocab-size", 500, "--pretrain-steps", 5],
         "rl": ["--group-size", 4], "sid2title": ["--limit", 5]}
PLACEHOLDERS = r"\b(?:TIME|DEMO|IND|HALF|FIRST)_[A-Z0-9_]+\b"


def blocks_of(page: str) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.M | re.S)


def rows_of(page: str) -> list[list[str]]:
    """The cells of each row of the tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()
            if line.startswith("| ")]


def commands_of(page: str) -> list[str]:
    """The commands in code blocks, one each, and those within the text."""
    commands = []
    for kind, text in blocks_of(page):
        for line in text.splitlines() if kind == "bash" else []:
            commands += [part.strip() for part in line.split("&&")]
    inline = re.findall(r"`((?:python|torchrun)\s[^`]+)`", page)
    inline = [" ".join(text.split()) for text in inline]
    return commands + [text for text in inline if "..." not in text and "--nproc-per-node N" not in text]


COMMANDS = [command for page in PAGES.values() for command in commands_of(page)]


def split_up(command: str) -> tuple[str, list[str]]:
    """The script and its arguments in `python X.py ...` or `torchrun ... X.py ...`; else "" and all words."""
    words = shlex.split(os.path.expandvars(command))
    if words[0] == "torchrun":
        rest = parse_torchrun(words[1:])                # without what torchrun takes for itself
        words = ["python", rest.training_script, *rest.training_script_args]
    if words[0] == "python" and words[1].endswith(".py"):
        return words[1], words[2:]
    return "", words


def load_script(name: str):
    """The module of a script, "tests/studies/plot.py" or "train.py"."""
    return importlib.import_module(Path(name).stem)


def is_light(command: str) -> bool:
    """Can a test run it as it is, but for sizes?"""
    words = shlex.split(command)
    is_script = words[0] == "python" and words[1] in LIGHT_SCRIPTS
    is_other = words[0] == "sha256sum" or words[:2] == ["python", "-c"]
    return (is_script or is_other) and TOO_MUCH.isdisjoint(words)


def without_run_and_seed(command: str) -> str:
    """Commands that differ only in run or seed are run once."""
    return re.sub(r" --(run runs/\w+|seed \d+)", "", command)


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.setenv("DATA", "FOLDER")
    if command.startswith("torchrun"):
        monkeypatch.setenv("RANK", "0")                 # which torchrun sets
    script, words = split_up(command)
    if script:
        assert script in SCRIPTS
        assert load_script(script).parse_args(words)
    elif words[0] == ".":                               # an environment that was made before
        assert any(f"-m venv {words[1].split('/')[0]}" in other for other in COMMANDS)
    elif words[0] == "export":                          # a key that another command reads
        assert any(f"--api-key-env {words[1].split('=')[0]}" in other for other in COMMANDS)
    elif words[:2] == ["pip", "install"]:
        names = [word for word in words[2:] if not word.startswith("-")]
        assert all((ROOT / name).exists() or find_spec(name) for name in names)
    elif words[:2] in (["python", "-m"], ["python3", "-m"]):
        assert find_spec(words[2])
    elif words[:2] == ["transformers", "serve"]:        # it needs a server's packages
        assert len(words) == 3
    else:
        assert is_light(command)                        # test_light_commands_run does the rest


@pytest.fixture(scope="module")
def shop(finished_run, toy_data, tmp_path_factory) -> Path:
    """A folder that has every file which the commands read; its run is finished_run with more checkpoints."""
    folder = tmp_path_factory.mktemp("shop")
    run = shutil.copytree(finished_run, folder / "run")
    for name in ("align", "mean", "init_mean"):
        shutil.copy(run / "init.pt", run / f"{name}.pt")
    for name in ("rl", "sft_new", "star"):
        shutil.copy(run / "sft.pt", run / f"{name}.pt")
    shutil.copy(run / "init.pt", run / "init_new.pt")
    call(extract_semantics, "--run", run, "--queries", 2)
    shutil.copytree(toy_data, run / "data")
    write_lines(folder / "in_stock.jsonl", [{"item_id": 1}, {"item_id": 12}])
    write_lines(folder / "purchases.jsonl", [{"user_id": "u", "history": [1, 12], "target": 5}])
    write_lines(folder / "new_items.jsonl", [{"item_id": 1000, "title": "Acme steel rod, new"}])
    return folder


@pytest.fixture
def here(shop, finished_run, tmp_path, monkeypatch) -> Path:
    """A copy of the shop as the current folder, in which all runs that the pages name are the same one."""
    folder = Path(shutil.copytree(shop, tmp_path / "shop"))
    (folder / "runs").mkdir()
    for name in {name for page in PAGES.values() for name in re.findall(r"\bruns/(\w+)", page)}:
        (folder / "runs" / name).symlink_to(folder / "run")
    (folder / "FOLDER").symlink_to(folder / "run" / "data")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DATA", str(finished_run))
    monkeypatch.setattr(load_script("tokenize_items.py"), "RQVAE_UPDATES", 500)
    return folder


@pytest.mark.parametrize("command", dict.fromkeys(
    without_run_and_seed(command) for command in COMMANDS if is_light(command)))
def test_light_commands_run(command, here, capsys):
    script, words = split_up(command.replace("12,55,89", "12,55,8"))    # the toy shop has 60 items
    if script == "tokenize_items.py" and not {"--data", "--add"} & set(words):
        words += ["--data", "FOLDER"]
    capsys.readouterr()
    if script:
        call(load_script(script), *words, *SMALL.get(Path(script).stem, []))
    elif words[0] == "python":
        exec(words[2], {})
    else:
        print(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert capsys.readouterr().out.strip()


# ---- Flags, figures, drawings --------------------------------------------------------------------

@pytest.fixture(scope="module")
def flags_of() -> dict[str, set[str]]:
    """The flags of each script."""
    parsers = []

    def remember(parser, argv):
        parsers.append(parser)
        raise SystemExit
    for script in SCRIPTS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(argparse.ArgumentParser, "parse_args", remember)
            load_script(script).parse_args([])
    return {script: set(parser._option_string_actions) for script, parser in zip(SCRIPTS, parsers)}


@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(name, flags_of):
    known = set().union(*flags_of.values()) | {"--nproc-per-node"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", PAGES[name])) <= known
    # In "`--a`, `--b` (`x.py`, `y.py`)" and "`--a` or `--b` of `x.py`", all flags are of all these scripts
    listed = r"((?:`--[^`]+`(?:, | or )?)+)\s(?:\(|of )((?:`\w+\.py`(?:, )?)+)"
    for flags, scripts in re.findall(listed, PAGES[name]):
        for script in re.findall(r"\w+\.py", scripts):
            assert set(re.findall(r"--[a-z-]+", flags)) <= flags_of[script], (script, flags)


def test_the_table(capsys):
    table, = [text for kind, text in blocks_of(README) if not kind]
    evaluate.print_table([{"method": "x", "level": "item", **evaluate.rank_metrics([1], (1, 3, 5, 10))}])
    assert table.splitlines()[0] == capsys.readouterr().out.splitlines()[0]
    assert {kind for page in PAGES.values() for kind, _ in blocks_of(page)} == {"", "bash"}


def test_no_placeholder_is_left():
    assert not {name: found for name, page in PAGES.items() if (found := re.findall(PLACEHOLDERS, page))}


def test_published_figures_are_the_same_on_both_pages():
    published = [row for row in rows_of(README) if row[-1].startswith("TS-Rec table")]
    figures = [row[1:] for row in rows_of(RESULTS)]
    assert published and all(row[1:] in figures for row in published)


def test_sums_come_out():
    """As in "4 x 1.5445e9 + 12 x 2.3414e8 = 8.99 GB"; the numbers of parameters are Qwen2.5-1.5B's."""
    sums = re.findall(r"((?:[\d.e]+ [x+] )+[\d.e]+) = ([\d.]+) GB", GPU)
    assert len(sums) > 10
    for text, result in sums:
        terms = [math.prod(float(factor) for factor in term.split(" x ")) for term in text.split(" + ")]
        unit = 1e9 if " x " in text else 1
        assert f"{sum(terms) / unit:.2f}" == result, text
    assert "= 47.69 GB" in GPU and "about 48 GB" in README
    config = AutoConfig.for_model(
        "qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=None)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert f"{count:,}" in GPU
    assert f"{(count + (151665 + 768 - 151936) * 1536) / 1e9:.4f}e9" in GPU
    assert f"{(151665 + 768) * 1536 / 1e8:.4f}e8" in GPU


# ---- What the pages point to ---------------------------------------------------------------------

def test_equations_lead_to_code():
    places = []
    for paper, *_, cell in rows_of(README):
        script = ""
        for named, function in re.findall(r"`(?:([\w/]+\.py):)?(\w+)`", cell):
            script = named or script                    # in `x.py:f`, `g`, both f and g are of x.py
            if script:
                places.append((paper, script, function))
    for paper, script, function in places:
        pattern = rf"^(def |class |){function}\b"
        assert re.search(pattern, SOURCES[script], flags=re.M), (paper, script, function)
    papers = " | ".join(paper for paper, *_ in places)
    for part in ("eqs. 1, 2, 3", *(f"eq. {n}" for n in range(4, 10)), "3.2.1", "3.2.2", "4.2", "A.1", "A.2",
                 *(f"5.{n}" for n in range(1, 6)), "STAR eq. 1", "STAR 3.1", "algorithm 1", "STAR 3.2",
                 "STAR A.1.2, A.2", "STAR A.4", "GRPO", "Stochastic beam search"):
        assert part in papers, part
    assert len(places) > 40


def test_files_are_as_the_table_says(finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    call(extract_semantics, "--run", run, "--queries", 2)
    call(evaluate, "--run", run)
    for name in ("semantics", "queries", "predictions", "metrics", "test"):
        described = next(cell for first, cell, *_ in rows_of(README) if f"{name}.jsonl`" in first)
        line = json.loads((run / f"{name}.jsonl").read_text().splitlines()[0])
        keys = [key for key in line if "@" not in key]
        assert re.findall(r'"(\w+)":', described) == keys, name


@pytest.mark.parametrize("page", PAGES)
def test_files_in_tables_exist_or_are_written(page):
    cells = " ".join(" ".join(row) for row in rows_of(PAGES[page]))
    for name in set(re.findall(r"\b(\w+\.(?:py|jsonl|pt|txt))\b", cells)):
        stem = name.split("_", 1)[-1]                   # of sft_log.jsonl, say, a source has "_log.jsonl"
        written = any(name in text or stem in text for text in SOURCES.values())
        written = written or re.search(rf"--(out|predictions) \S*/{name}", cells)        # by a command
        assert written or (ROOT / name).exists(), name


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_headings_and_files(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        titles = re.findall("^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.M)
        headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert not anchor or anchor in headings, target
