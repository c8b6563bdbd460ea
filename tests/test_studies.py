"""tests/studies, tests/data, tests/demo: --help and examples of every script, the smallest benchmark."""
import importlib
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call

FOLDERS = [ROOT / "tests" / name for name in ("studies", "data", "demo")]
SCRIPTS = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]
sys.path[:0] = [str(folder) for folder in FOLDERS]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help(path, capsys):
    script = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(["--help"])
    assert stopped.value.code == 0
    first_sentence = " ".join(script.__doc__.split("\n\n")[0].split())
    assert first_sentence in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_examples_are_accepted(path, capsys):
    """The commands in the docstring are for the project's root, and their flags exist."""
    script, name = importlib.import_module(path.stem), path.relative_to(ROOT)
    commands = re.findall(rf"^  python {name}(.*)$", script.__doc__.replace("\\\n", ""), flags=re.M)
    assert commands
    for command in commands:
        words = command.split("  #")[0].replace('"', "").replace("--train=", "--train ").split()
        script.parse_args(words if "--train" not in words else words[:words.index("--train")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_it_finds_the_six_scripts(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder) != ROOT])
    runpy.run_path(str(path))
    assert str(ROOT) in sys.path


def test_the_smallest_benchmark(finished_run, tmp_path, monkeypatch, capsys):
    """Its own checks compare what all methods find."""
    benchmark = importlib.import_module("benchmark")
    monkeypatch.setattr(benchmark.gc, "collect", lambda: None)          # slow in a process with many objects
    monkeypatch.setitem(benchmark.SIZES, "smoke", benchmark.SIZES["smoke"]._replace(tries=(2000,)))
    call(benchmark, "--smoke", "--works", "search,sampling,rl,trie", "--run", finished_run,
         "--out", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    measured = {row["contestant"] for row in rows if "ratio" in row}
    assert measured == {
        "ours", "prefill alone", "HF prefix_allowed_tokens_fn", "HF vectorised mask",
        "HF do_sample, vectorised mask", "prompt repeated, needed logits", "prompt repeated, all logits",
        "python dict per beam", "dense mask over the vocabulary"}
    assert all(row["ratio"] == 1 for row in rows if row["contestant"] == "ours" and "ratio" in row)
    table = capsys.readouterr().out
    assert all(row["work"] in table for row in rows)


def test_our_update_in_the_benchmark():
    """The optimizer step that is timed changes the weights."""
    benchmark = importlib.import_module("benchmark")
    sizes = benchmark.SIZES["smoke"]
    model = benchmark.random_backbone(sizes, benchmark.torch.device("cpu"))
    before = model.get_input_embeddings().weight.detach().clone()
    examples = benchmark.ragged_examples(sizes.batch, sizes.rows)
    benchmark.train_update(model, examples, "float32", beta2=0.95, weight_decay=0.0, micro_tokens=200)
    assert not benchmark.torch.equal(model.get_input_embeddings().weight, before)


def test_the_demo_is_what_its_script_makes():
    make_demo = importlib.import_module("make_demo")
    items, _ = make_demo.build_items(random.Random(make_demo.SEED), *make_demo.parse_shop())
    lines = (ROOT / "tests" / "demo" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert items == [json.loads(line) for line in lines]
    assert Path(make_demo.parse_args([]).out) == ROOT / "tests" / "demo"
