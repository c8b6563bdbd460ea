"""tests/studies/pretrained.py: its commands, resuming, and the table made of logs."""
import importlib
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_lines

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import pretrained  # noqa: E402


def arguments(out: Path, *flags: str):
    args = pretrained.parse_args(["--run", "runs/x", "--backbone", "folder", "--out", str(out), *flags])
    return args


@pytest.mark.parametrize("name", [name for name in pretrained.ARMS if "normal" not in name])
def test_every_command_is_accepted_by_its_script(name, tmp_path):
    (tmp_path / f"sft_{name}_00083.pt").touch()
    args = arguments(tmp_path, "--comprehension", "--along", "--train=--lr 3e-4")
    steps = pretrained.training_steps(name, args) | pretrained.measuring_steps(name, args)
    assert f"valid_{name}_00083" in steps and f"sid2title_{name}" in steps
    assert (f"align_{name}" in steps) == pretrained.ARMS[name].align
    for command in steps.values():
        script, *flags = shlex.split(command)
        sys.path.insert(0, str((ROOT / script).parent))
        importlib.import_module(Path(script).stem).parse_args(flags)        # SystemExit if it refuses


def test_arms_differ_in_what_their_name_says(tmp_path):
    args = arguments(tmp_path)
    gaussian, centered = (pretrained.training_steps(name, args) for name in ("gaussian", "centered"))
    assert gaussian["sft_gaussian"].replace("gaussian", "centered") == centered["sft_centered"]
    assert "--sa-norm centered" in centered["init_centered"] and "--init gaussian" in gaussian["init_gaussian"]
    assert "token2text" not in centered["sft_centered"]
    assert "token2text" in pretrained.training_steps("centered_ts", args)["sft_centered_ts"]
    assert "align_align.pt" in pretrained.training_steps("align", args)["sft_align"]


def test_checkpoints_of_other_arms_are_not_taken(tmp_path):
    for name in ("sft_mean.pt", "sft_mean_00166.pt", "sft_mean_00083.pt", "sft_mean_ts_00083.pt",
                 "sft_mean_resume.pt"):
        (tmp_path / name).touch()
    assert [step for step, _ in pretrained.kept_checkpoints("mean", tmp_path)] == [83, 166]


def test_finished_steps_are_skipped_and_failures_are_repeated(tmp_path, monkeypatch):
    commands = []

    def run(command, **flags):
        commands.append(command)
        if "fails" in command:
            raise RuntimeError
    monkeypatch.setattr(pretrained.subprocess, "run", run)
    for _ in range(2):
        pretrained.run_step("good", "train.py --seed 1", tmp_path)
        with pytest.raises(RuntimeError):
            pretrained.run_step("bad", "train.py fails", tmp_path)
    assert [command[1:] for command in commands] == [
        ["train.py", "--seed", "1"], ["train.py", "fails"], ["train.py", "fails"]]
    assert (tmp_path / "log" / "good.txt").read_text() == "$ train.py --seed 1\n"


def test_table_of_logs(tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "sft_mean_log.jsonl", [
        {"step": 80, "loss": 3.0}, {"step": 83, "valid_loss": 2.5}, {"step": 166, "valid_loss": 2.0}])
    write_lines(tmp_path / "valid_mean_00083.jsonl", [
        {"method": "skip-gram", "level": "item", "HR@10": 0.9, "NDCG@10": 0.9},
        {"method": "sft", "level": "item", "HR@10": 0.125, "NDCG@10": 0.0625},
        {"method": "sft", "level": "sid", "HR@10": 0.7, "NDCG@10": 0.7}])
    write_lines(tmp_path / "test_mean.jsonl", [{"level": "item", "HR@10": 0.25, "NDCG@10": 0.1}])
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "init_mean.txt").write_text(
        "$ x\nembedding and head (tied) | mean norm 3.1 | mean cosine 1.000\nneighbours  <a_0> | 'tiles' 0.41\n")
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "--out", str(tmp_path), "--print"])
    pretrained.main()
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 3                                      # the other arms have not begun
    assert table[2] == ("| mean of the vocabulary | 1.000 | 83: 2.500, 0.1250, 0.0625; 166: 2.000 "
                        "| 0.2500 | 0.1000 |  |  |  |")
    assert "mean: neighbours  <a_0> | 'tiles' 0.41" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--arms", "nothing"], []])
def test_mistakes_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        pretrained.parse_args(flags)
