"""tests/ablation.py: every command of its grid is one the scripts accept; order, resuming and failures; its data."""
import argparse
import importlib
import json
import shlex

import ablation
import pytest
from conftest import write_lines

PARTS = (ablation.training_steps, ablation.rl_steps, ablation.scaling_steps, ablation.cold_steps,
         ablation.teacher_steps)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_args(**changed) -> argparse.Namespace:
    return argparse.Namespace(**{"backbone": "tiny", "data": "somewhere", "init": "", "align": "", "train": "--epochs 1",
                                 "rl": "", "jobs": 1, "device": "", **changed})


def grid(run, **changed) -> dict[str, ablation.Step]:
    return {name: step for part in PARTS for name, step in part(run, make_args(**changed), 7).items()}


@pytest.mark.parametrize("backbone", ["tiny", "some/model"])
def test_every_command_is_accepted_by_its_script(backbone, tmp_path):
    for step in grid(tmp_path, backbone=backbone).values():
        if isinstance(step.command, str):
            script, *flags = shlex.split(step.command.split(": ")[-1])
            importlib.import_module(script.removesuffix(".py")).parse_args(flags)       # SystemExit where it does not


def test_every_table_can_be_made(tmp_path):
    runner = ablation.Runner(tmp_path, grid(tmp_path), make_args())
    for table in ablation.TABLES:
        assert ablation.targets_of(table)
        for name in ablation.targets_of(table):
            plan = runner.plan(name)
            for place, step in enumerate(plan):                         # all needs before it
                assert set(runner.steps[step].needs) <= set(plan[:place])


def test_arms_differ_in_what_their_name_says(tmp_path):
    steps = {name: step.command for name, step in grid(tmp_path).items() if name.startswith("sft_")}
    assert "init_sa.pt" in steps["sft_full"] and "token2text" in steps["sft_full"]
    assert "init_gaussian.pt" in steps["sft_no_sa"] and "token2text" in steps["sft_no_sa"]
    assert "init_sa.pt" in steps["sft_no_align"] and "token2text" not in steps["sft_no_align"]
    assert "align_mean.pt" in steps["sft_star"] and "text2token" not in steps["sft_star"]
    assert ",search" in steps["sft_search"] and ",search" not in steps["sft_full"]


def test_done_steps_rest_until_an_input_changes(tmp_path):
    made = []
    steps = {"a": ablation.Step(lambda: made.append("a")), "b": ablation.Step(lambda: made.append("b"), ("a",)),
             "c": ablation.Step(lambda: made.append("c"), ("a",))}
    runner = ablation.Runner(tmp_path, steps, make_args())
    assert ablation.make_all([(runner, name) for name in runner.plan("b")], 2) == [] and made == ["a", "b"]
    assert runner.plan("b") == [] and runner.plan("c") == ["c"]
    changed = dict(steps, a=ablation.Step("tokenize_items.py"))
    assert ablation.Runner(tmp_path, changed, make_args()).plan("b") == ["a", "b"]


def test_a_failure_costs_only_what_needs_it(tmp_path, capsys):
    made = []
    steps = {"bad": ablation.Step("evaluate.py --no-such-flag"), "lost": ablation.Step(lambda: made.append(1), ("bad",)),
             "other": ablation.Step(lambda: made.append("other"))}
    runner = ablation.Runner(tmp_path, steps, make_args())
    failed = ablation.make_all([(runner, name) for name in ("bad", "lost", "other")], 1)
    assert len(failed) == 1 and "bad.txt" in failed[0] and made == ["other"] and not runner.is_done("bad")
    assert "--no-such-flag" in (tmp_path / "log" / "bad.txt").read_text()


def test_a_share_of_the_users(finished_run, tmp_path):
    ablation.cut_users(finished_run, tmp_path / "part", 25, 1)
    whole, part = (read(folder / "train.jsonl") for folder in (finished_run, tmp_path / "part"))
    users = {s["user_id"] for s in part}
    assert part == [s for s in whole if s["user_id"] in users]
    assert len(users) == len({s["user_id"] for s in whole}) * 25 // 100


def test_held_out_items_occur_nowhere_in_training(finished_run, tmp_path):
    ablation.hold_out(finished_run, tmp_path, 1)
    cold = {item["item_id"] for item in read(tmp_path / "new_items.jsonl")}
    warm = {item["item_id"] for item in read(tmp_path / "items.jsonl")}
    assert cold and not cold & warm and cold | warm == {i["item_id"] for i in read(finished_run / "items.jsonl")}
    for name in ("train", "valid", "test"):
        assert all({s["target"], *s["history"]} <= warm for s in read(tmp_path / f"{name}.jsonl"))
    asked = read(tmp_path / "cold_test.jsonl")
    assert asked and all(s["target"] in cold and s["history"] and set(s["history"]) <= warm for s in asked)


def test_tables_hold_means_and_deviations(tmp_path):
    runners = [ablation.Runner(tmp_path / str(seed), grid(tmp_path / str(seed)), make_args()) for seed in (1, 2)]
    for runner, value in zip(runners, (0.1, 0.2)):
        for name in ("valid_full", "test_full"):
            write_lines(runner.run / f"{name}.jsonl", [
                {"method": "bigram", "level": "item", "HR@10": 0.05}, {"method": "sft.pt", "level": "item", "HR@10": value},
                {"method": "sft.pt", "level": "sid", "HR@10": 0.9}])
            (runner.run / "log" / f"{name}.done").write_text(runner.key(name))
    assert ablation.ranking_row("x", "full", runners, ("HR@10", "valid HR@10")) == ["x", "0.1500 (0.0707)"] + [
        "0.1500 (0.0707)"]
    assert ablation.yardstick_rows("full", runners, ("HR@10",))[1] == ["bigram", "0.0500"]
    assert "| TS-Rec: SA-Init and TS-Align |" in ablation.arms_table("t", ["full", "no_sa"], runners)
