"""README.md as a course: every command in it is run on the toy shop or, where that needs a GPU, a network or several
processes, read by the script's own parser; what its tables name exists; its sums come out."""
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec

import pytest
import torch
from torch.distributed.run import parse_args as parse_torchrun
from transformers import AutoConfig, AutoModelForCausalLM

import ablation
import evaluate
import extract_semantics
from conftest import ROOT, call, write_lines

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
STAGES = ("tokenize_items", "extract_semantics", "init_embeddings", "train", "rl", "evaluate")
SOURCES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
           for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]}
COMMANDS = [part.strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
            for part in re.sub(r"  +#.*", "", line).split("&&")]
INLINE = [" ".join(text.split()) for text in re.findall(r"`((?:python|torchrun)\s[^`]+)`", README)]
INLINE = [text for text in INLINE if "X.py" not in text and "..." not in text and "--nproc-per-node N" not in text]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| ")]

TOO_MUCH = {"torchrun", "--encoder", "--backbone", "--amazon", "http"}      # processes, weights of a hub, a network
SMALL = {"tokenize_items": ["--codebook-size", 8], "train": ["--epochs", 1, "--warmup", 2],
         "init_embeddings": ["--width", 32, "--layers", 2, "--vocab-size", 500, "--pretrain-steps", 5],
         "rl": ["--group-size", 4, "--eval-users", 5], "extract_semantics": [], "evaluate": []}
OTHERS = {"--nproc-per-node", "--no-deps"}                              # flags of torchrun and pip


def split_up(command: str) -> tuple[str, list[str]]:
    """The script and its arguments in `python X.py ...` or `torchrun ... X.py ...`; ("", words) of anything else."""
    words = shlex.split(os.path.expandvars(command))
    if words[0] == "torchrun":
        read = parse_torchrun(words[1:])                                # what torchrun takes for itself
        words = ["python", read.training_script, *read.training_script_args]
    is_script = words[0] == "python" and words[1].endswith(".py")
    return (words[1], words[2:]) if is_script else ("", words)


def is_light(command: str) -> bool:
    """Can a test run it as it is, but for sizes?"""
    words = shlex.split(command)
    script = words[0] == "sha256sum" or words[0] == "python" and words[1] != "-m" and not words[1].startswith("tests/")
    return script and (TOO_MUCH.isdisjoint(words) or "--dry-run" in words)


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS + INLINE))
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.setenv("DATA", "FOLDER")
    script, words = split_up(command)
    if script.removesuffix(".py") in STAGES:
        assert importlib.import_module(script.removesuffix(".py")).parse_args(words)
    elif script == "tests/ablation.py":
        assert ablation.parse_args(words)
    elif script:
        assert all(f'"{word}"' in SOURCES[script] for word in words if word.startswith("-"))
    elif words[0] == ".":                                               # an environment made before
        assert any(f"-m venv {words[1].split('/')[0]}" in other for other in COMMANDS)
    elif words[0] == "export":                                          # a key that a later command reads
        assert any(f"--api-key-env {words[1].split('=')[0]}" in other for other in COMMANDS)
    elif words[:2] == ["pip", "install"]:
        named = [word for word in words[2:] if not word.startswith("-")]
        assert all((ROOT / word).exists() or find_spec(word) for word in named)
    elif words[:2] in (["python", "-m"], ["python3", "-m"]):
        assert find_spec(words[2])
    else:
        assert is_light(command)                                        # test_commands_run does the rest


@pytest.fixture
def shop(run, finished_run, toy_data, monkeypatch):
    """A folder to stand in where all of the README's runs are one copy of the toy run, and its other files exist."""
    folder = run.parent
    shutil.copy(run / "sft.pt", run / "rl.pt")
    shutil.copy(run / "init.pt", run / "align.pt")
    call(extract_semantics, "--run", run, "--queries", 2)
    (folder / "runs").mkdir()
    for name in set(re.findall(r"\bruns/(\w+)", README)):
        (folder / "runs" / name).symlink_to(run)
    (folder / "FOLDER").symlink_to(toy_data)
    write_lines(folder / "in_stock.jsonl", [{"item_id": 1}, {"item_id": 12}])
    write_lines(folder / "new_items.jsonl", [{"item_id": 1000, "title": "Acme steel rod, new"}])
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DATA", str(finished_run))
    return folder


@pytest.mark.parametrize("command", dict.fromkeys(      # those that differ in run or seed alone do so once
    re.sub(r" --(run runs/\w+|seed \d+)", "", command) for command in COMMANDS if is_light(command)))
def test_commands_run(command, shop, capsys):
    script, words = split_up(command.replace("12,55,89", "12,55,8"))    # the toy shop has 60 items
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    name = script.removesuffix(".py")
    if name == "tokenize_items" and not {"--data", "--codebook"} & set(words):
        words += ["--data", "FOLDER"]
    capsys.readouterr()
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif not script:
        print(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    elif "--dry-run" in words:
        with pytest.raises(SystemExit) as done:
            call(importlib.import_module(name), *words)
        assert not done.value.code
    else:
        call(importlib.import_module(name), *words, *SMALL[name])
    assert capsys.readouterr().out.strip()


def test_the_table_and_the_drawings(capsys):
    plain = [text for kind, text in BLOCKS if not kind]
    table = [text for text in plain if text.startswith("method")]
    evaluate.print_table([{"method": "x", "level": "item", **evaluate.rank_metrics([1], (1, 3, 5, 10))}])
    assert [text.splitlines()[0] for text in table] == [capsys.readouterr().out.splitlines()[0]]
    assert len(plain) == 3 and all(text.strip() for text in plain)
    assert {kind for kind, _ in BLOCKS} == {"", "bash"}


def test_every_flag_is_some_script_s():
    known = {flag for text in SOURCES.values() for flag in re.findall(r'"(--[a-z][a-z0-9-]*)"', text)} | OTHERS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README)) <= known


def test_equations_lead_to_code():
    places = []
    for paper, *_, cell in ROWS:
        script = ""
        for named, name in re.findall(r"`(?:(\w+\.py):)?(\w+)`", cell):    # `x.py:f`, `g`: g is of x.py, too
            script = named or script
            places += [(paper, script, name)] * bool(script)
    for paper, script, name in places:
        assert re.search(rf"^(def |class |){name}\b", SOURCES[script], flags=re.M), (paper, script, name)
    papers = " | ".join(paper for paper, *_ in places)
    for part in ("eqs. 1, 2, 3", *(f"eq. {n}" for n in range(4, 10)), "3.2.1", "3.2.2", "4.2", "A.1", "A.2",
                 *(f"5.{n}" for n in range(1, 6)), "STAR eq. 1", "STAR 3.1", "algorithm 1", "STAR 3.2",
                 "STAR A.1.2, A.2", "STAR A.4", "GRPO", "Stochastic beam search"):
        assert part in papers, part
    assert len(places) > 40


def test_files_are_as_the_table_says(finished_run, tmp_path):
    call(evaluate, "--run", finished_run, "--metrics", tmp_path / "m.jsonl", "--predictions", tmp_path / "p.jsonl")
    call(extract_semantics, "--run", finished_run, "--out", tmp_path / "s", "--queries", 2, "--queries-out",
         tmp_path / "queries.jsonl")
    shutil.copy(tmp_path / "p.jsonl", tmp_path / "predictions.jsonl")
    for name in ("semantics", "queries", "predictions", "test"):
        path = tmp_path / f"{name}.jsonl" if (tmp_path / f"{name}.jsonl").exists() else finished_run / f"{name}.jsonl"
        told = next(cell for first, cell, *_ in ROWS if f"{name}.jsonl`" in first)
        assert re.findall(r'"(\w+)":', told) == list(json.loads(path.read_text().splitlines()[0])), name
    for name in set(re.findall(r"\b(\w+\.(?:py|jsonl|pt|txt))\b", " ".join(map(" ".join, ROWS)))):
        written = any(name in text or name.split("_", 1)[-1] in text for text in SOURCES.values())
        assert written or (ROOT / name).exists(), name


def test_sums_come_out():
    """"4 x 1.5445e9 + 12 x 2.3414e8 = 8.99 GB": and the numbers of parameters are Qwen2.5-1.5B's."""
    sums = re.findall(r"((?:[\d.e]+ [x+] )+[\d.e]+) = ([\d.]+) GB", README)
    assert len(sums) > 10
    for text, result in sums:
        terms = (math.prod(map(float, term.split(" x "))) for term in text.split(" + "))
        assert f"{sum(terms) / (1e9 if ' x ' in text else 1):.2f}" == result, text
    config = AutoConfig.for_model("qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                                  num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                                  tie_word_embeddings=True, pad_token_id=None)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert f"{count:,}" in README
    assert f"{(count + (151665 + 768 - 151936) * 1536) / 1e9:.4f}e9" in README
    assert f"{(151665 + 768) * 1536 / 1e8:.4f}e8" in README


def test_links_lead_to_headings():
    titles = re.findall("^#+ (.*)", README, flags=re.M)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
