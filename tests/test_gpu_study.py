"""tests/studies/gpu.py at its small size on a CPU, and its counts of host syncs."""
import importlib
import json
import sys

import pytest
import torch
from conftest import ROOT, call

sys.path.insert(0, str(ROOT / "tests" / "studies"))
gpu = importlib.import_module("gpu")
CPU = torch.device("cpu")


def counted(work) -> dict:
    found = {}
    with gpu.count_syncs(CPU, found):
        work()
    return found


@pytest.mark.parametrize("work", [
    lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool((x > 0).all()), lambda x: x[x > 0],
    lambda x: x.nonzero(), lambda x: torch.unique_consecutive(x), lambda x: x.masked_select(x > 0)])
def test_calls_that_wait_are_counted(work):
    x = torch.arange(4.0)
    assert counted(lambda: work(x)) == {"syncs": 1, "copies": 0}


def test_calls_that_do_not_wait_are_not_counted():
    x, rows = torch.arange(12.0).view(4, 3), torch.tensor([2, 0])
    assert counted(lambda: (x[rows] @ x.T).topk(2).values + x[1, 2]) == {"syncs": 0, "copies": 0}


def test_boolean_indices_count_in_assignments_and_in_backward_passes():
    x = torch.ones(4, requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    assert counted(lambda: torch.zeros(4).__setitem__(mask, torch.ones(2)))["syncs"] == 1
    assert counted(lambda: x[mask].sum().backward())["syncs"] == 2


def test_the_small_size_runs_and_a_second_call_measures_nothing(finished_run, tmp_path, monkeypatch, capsys):
    """Precision, search and train in this process; the figures are in the file and in the table."""
    out = tmp_path / "gpu.jsonl"
    flags = ("--run", finished_run, "--small", "--device", "cpu", "--out", out)
    call(gpu, *flags, "--part", "precision,search,train")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["precision"] + ["search"] * 2 + ["train"] * 3
    assert 0 <= rows[0]["same ten"] <= 1
    for row in rows[1:3]:                               # a search waits for nothing but its prompts
        assert row["syncs"] == 0 and row["copies"] <= 2 and row["ratio"] > 0
    for row in rows[3:]:                                # a pass: a batch's 7 tensors, a check of transformers
        assert row["copies"] <= 7 * row["passes"] and row["syncs"] <= row["passes"]
        assert row["tokens per second"] > 0
    assert not list(finished_run.glob("*resume*"))

    call(gpu, *flags, "--part", "precision,search,train")
    assert len(out.read_text().splitlines()) == len(rows)
    capsys.readouterr()
    call(gpu, "--print", "--out", out)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows) and {line.count(" | ") for line in table} == {4}


def test_parts_that_run_scripts(finished_run, tmp_path, monkeypatch, capsys):
    """Their commands are filled in, some lines are kept, and a stopped pretrained.py is started again."""
    echo = ("-c print('|',ascii({tmp!r}),'{run}','{device}','{backbone}')",)
    monkeypatch.setattr(gpu, "COMMANDS", {part: (echo, echo, "^[|]") for part in gpu.COMMANDS})
    out = tmp_path / "gpu.jsonl"
    flags = ("--run", finished_run, "--device", "cpu", "--out", out, "--part", "suite,smollm2")
    for backbone, count in (("", 1), ("smol", 2), ("smol", 3)):
        call(gpu, *flags, "--backbone", backbone)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == count
    assert rows[0]["exit code"] == 0 and str(finished_run) in rows[0]["lines"][0]
    assert rows[1]["lines"][0].endswith("cpu smol")


@pytest.mark.parametrize("name, millions", [
    ("SmolLM2-135M", 134.5), ("Qwen2.5-1.5B", 1543.7), ("Qwen3-1.7B", 1720.6)])
def test_shapes_are_those_of_the_models(name, millions):
    model = gpu.random_model(name, torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_commands_of_the_full_size_are_accepted(tmp_path):
    values = {"run": "runs/demo", "device": "cuda", "tmp": tmp_path, "backbone": "folder",
              "pretrained": "--arms mean"}
    for full, small, _ in gpu.COMMANDS.values():
        for command in full + small:
            script, *words = command.format(**values).split()
            name = script.removesuffix(".py").split("/")[-1]
            if script != "-m" and (ROOT / script).exists():
                importlib.import_module(name).parse_args(words)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parse_args(["--part", "suite,speed"])
    assert "speed is not one of" in capsys.readouterr().err
