"""reproduce.py: its commands are understood, its tables hold what the runs have written."""
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_stops, call, write_lines

sys.path[:0] = [str(ROOT / "tests" / "studies")]
import reproduce  # noqa: E402
from ablation import Runner  # noqa: E402


def row(method: str, split: str, hr: float, **more) -> dict:
    heads = dict.fromkeys(reproduce.HEADS, hr)
    return {"method": method, "split": split, "level": "item", "task": "next_brief", **heads, **more}


def test_every_command_is_accepted_by_its_script(tmp_path):
    run = tmp_path / "industrial-42"
    groups = list(reproduce.GROUPS)
    steps = {**reproduce.run_steps(run, 42, "somewhere", groups, True), **reproduce.half_steps(run)}
    assert {"rl_test", "sasrec", "tiger", "sft_filtered", "half_whole"} <= set(steps)
    for step in steps.values():
        assert set(step.needs) <= set(steps)
        if isinstance(step.command, str):
            script, *flags = shlex.split(step.command)
            assert importlib.import_module(Path(script).stem).parse_args(flags)
    late = reproduce.run_steps(run, 46, "", groups, False)
    assert not {"rl", "sasrec", "sft_filtered"} & set(late)


def test_tables_hold_the_latest_figures_of_all_seeds(tmp_path):
    kinds = {"never seen": {"n": 3, "HR@1": 0.1, "HR@10": 0.2}}
    for seed, hr in ((42, 0.1), (43, 0.3)):
        write_lines(tmp_path / f"demo-{seed}" / "metrics.jsonl", [
            row("sft.pt", "test", 0.9), row("sft.pt", "test", hr, codes=[0.5, 0.25], kinds=kinds),
            row("sft.pt", "valid", 0.7), row("sft.pt", "test", 0.8, exclude_history=True)])
    runs = [tmp_path / "demo-42", tmp_path / "demo-43"]
    text = reproduce.all_tables(tmp_path, [Runner(run, {}) for run in runs])
    assert "| sft.pt | 2 | 0.2000 (0.1000 to 0.3000) |" in text and "| sft.pt | 2 | 0.7000 |" in text
    assert "| never seen | 3 | 0.100 / 0.200 |" in text and "| sft.pt | 0.500 | 0.500 |" in text
    assert "| sft.pt | 2 | 0.8000 |" in reproduce.table("filtered", runs, "test", filtered=True)
    assert "rl.pt" not in text


def test_half_of_the_training_samples(run, tmp_path):
    half = run.with_name("half")
    reproduce.cut_train(run, half)
    whole = (run / "train.jsonl").read_text().splitlines()
    assert (half / "train.jsonl").read_text().splitlines() == [
        json.dumps(json.loads(line), ensure_ascii=False) for line in whole[:len(whole) // 2]]


def test_another_commit_is_refused(tmp_path, capsys):
    (tmp_path / "commit").write_text("0" * 40)
    assert_stops(capsys, reproduce.check_commit, tmp_path, words=("0000000000", "--out"))


def test_print_runs_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse_args(["--groups", "nothing"])
    capsys.readouterr()
    call(reproduce, "--print", "--out", tmp_path)
    assert "### demo, test" in capsys.readouterr().out and not (tmp_path / "commit").exists()
