"""tests/studies/ablation.py: its commands, the order of its steps, resuming, failures, data and tables."""
import importlib
import json
import shlex
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import ROOT, call, write_lines
from init_embeddings import load_model, mean_cosine

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import ablation  # noqa: E402
from ablation import Runner, Step  # noqa: E402


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def grid(run: Path, backbone: str = "tiny") -> dict[str, Step]:
    extra = {"items": "--max-history 20", "init": "", "align": "--lr 1e-2", "train": "--epochs 1", "rl": ""}
    return ablation.all_steps(run, 7, "somewhere", backbone, extra, device="cpu")


# ---- The grid ------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone", ["tiny", "some/model"])
def test_every_command_is_accepted_by_its_script(backbone, tmp_path):
    for step in grid(tmp_path, backbone).values():
        if isinstance(step.command, str):
            script, *flags = shlex.split(step.command)
            assert (ROOT / script).exists()
            importlib.import_module(Path(script).stem).parse_args(flags)        # SystemExit if it refuses


def test_every_table_can_be_made(tmp_path):
    runner = Runner(tmp_path, grid(tmp_path))
    for table in ablation.TABLES.values():
        assert table.steps
        for name in table.steps:
            plan = runner.plan(name)
            for place, step in enumerate(plan):                         # all needs before it
                assert set(runner.steps[step].needs) <= set(plan[:place])
        table.draw([runner])                                            # empty, but no error


def test_arms_differ_in_what_their_name_says(tmp_path):
    steps = {name: step.command for name, step in grid(tmp_path).items() if name.startswith("sft_")}
    assert "init_sa.pt" in steps["sft_full"] and "token2text" in steps["sft_full"]
    assert "init_gaussian.pt" in steps["sft_no_sa"] and "token2text" in steps["sft_no_sa"]
    assert "init_sa.pt" in steps["sft_no_align"] and "token2text" not in steps["sft_no_align"]
    assert "align_mean.pt" in steps["sft_star"] and "--tasks sequence " in steps["sft_star"]
    assert "full_mean.pt" in steps["sft_two_stage"] and "init_mean.pt" in steps["sft_alone"]
    assert "--tasks sequence,search " in steps["sft_star_search"]
    assert ",search" in steps["sft_search"] and ",search" not in steps["sft_full"]
    assert "--keep" in steps["sft_full"] and "--keep" not in steps["sft_star"]


def test_done_steps_are_skipped_until_an_input_changes(tmp_path):
    made = []
    steps = {"a": Step(lambda: made.append("a")), "b": Step(lambda: made.append("b"), ("a",)),
             "c": Step(lambda: made.append("c"), ("a",))}
    runner = Runner(tmp_path, steps)
    assert ablation.make_all([(runner, name) for name in runner.plan("b")], 2) == [] and made == ["a", "b"]
    assert runner.plan("b") == [] and runner.plan("c") == ["c"]
    changed = {**steps, "a": Step("tokenize_items.py")}
    assert Runner(tmp_path, changed).plan("b") == ["a", "b"]


@pytest.fixture
def failing_scripts(tmp_path, monkeypatch) -> None:
    """A project whose first script fails."""
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    (tmp_path / "tokenize_items.py").write_text("import sys\nsys.exit(f'why {sys.argv[1:]}')\n")


def test_a_failure_costs_only_what_needs_it(failing_scripts, tmp_path):
    made = []
    steps = {"bad": Step("tokenize_items.py --run x"), "lost": Step(lambda: made.append("lost"), ("bad",)),
             "other": Step(lambda: made.append("other"))}
    runner = Runner(tmp_path, steps, device="cpu")
    failed = ablation.make_all([(runner, name) for name in ("bad", "lost", "other")], 1)
    assert len(failed) == 1 and "bad.txt" in failed[0] and made == ["other"] and not runner.is_done("bad")
    log = (tmp_path / "log" / "bad.txt").read_text().splitlines()
    assert log == ["$ python tokenize_items.py --run x --device cpu", "why ['--run', 'x', '--device', 'cpu']"]


def test_failures_are_counted(failing_scripts, tmp_path, monkeypatch, capsys):
    flags = ["--out", str(tmp_path), "--seeds", "1,2", "--tables", "star"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *flags])
    assert ablation.main() == 1
    printed = capsys.readouterr()
    assert "2 steps failed" in printed.err and "seed-2/log/items.txt" in printed.out


def test_a_command_for_each_checkpoint(tmp_path, monkeypatch):
    for step in (5, 10):
        (tmp_path / f"sft_x_{step:05d}.pt").touch()
    runner, commands = Runner(tmp_path, {"along": Step("evaluate.py", checkpoints="sft_x_*.pt")}), []
    monkeypatch.setattr(runner, "execute", lambda command, log: commands.append(command))
    runner.make("along")
    assert commands == [f"evaluate.py --checkpoint {tmp_path}/sft_x_{step}.pt" for step in ("00005", "00010")]
    assert runner.is_done("along")


# ---- Steps that are functions --------------------------------------------------------------------

def test_a_share_of_the_users(finished_run, tmp_path):
    ablation.cut_users(finished_run, tmp_path / "part", 25, seed=1)
    whole, part = (read_lines(folder / "train.jsonl") for folder in (finished_run, tmp_path / "part"))
    users = {sample["user_id"] for sample in part}
    assert part == [sample for sample in whole if sample["user_id"] in users]
    assert len(users) == len({sample["user_id"] for sample in whole}) * 25 // 100


def test_held_out_items_occur_nowhere_in_training(finished_run, tmp_path):
    ablation.hold_out_items(finished_run, tmp_path, seed=1)
    cold = {item["item_id"] for item in read_lines(tmp_path / "new_items.jsonl")}
    warm = {item["item_id"] for item in read_lines(tmp_path / "items.jsonl")}
    assert cold and not cold & warm
    assert cold | warm == {item["item_id"] for item in read_lines(finished_run / "items.jsonl")}
    for name in ("train", "valid", "test"):
        for sample in read_lines(tmp_path / f"{name}.jsonl"):
            assert {sample["target"], *sample["history"]} <= warm
    asked = read_lines(tmp_path / "cold_test.jsonl")
    assert asked
    for sample in asked:
        assert sample["target"] in cold and sample["history"] and set(sample["history"]) <= warm


def last_row(run: Path) -> dict:
    """The model's line of the newest evaluation."""
    return [row for row in read_lines(run / "metrics.jsonl") if row["level"] == "item"][-1]


def test_new_items_as_the_model_scores_them(run, tmp_path):
    out, beams = tmp_path / "out.jsonl", ablation.COLD_BEAMS
    ablation.evaluate_as_scored(run, run / "sft.pt", "test", out, "cpu")
    call(evaluate, "--run", run, "--num-beams", beams, "--memory", 0)
    row = last_row(run)
    assert all(row[name] == value for name, value in read_lines(out)[0].items())        # no item is new

    checkpoint = torch.load(run / "sft.pt", weights_only=True)
    checkpoint["sid"]["new_items"] = [item["item_id"] for item in read_lines(run / "items.jsonl")[::2]]
    torch.save(checkpoint, run / "sft.pt")
    call(evaluate, "--run", run, "--num-beams", beams, "--memory", 0)
    assert last_row(run) != {**row, "seconds": last_row(run)["seconds"]}                # they are averaged
    before = read_lines(out)
    ablation.evaluate_as_scored(run, run / "sft.pt", "test", out, "cpu")
    assert read_lines(out) == before                                                    # they are not


def test_rows_are_those_in_use(finished_run, tmp_path):
    paths = [finished_run / "init.pt", finished_run / "sft.pt"]
    ablation.measure_rows(finished_run, paths, tmp_path / "rows.jsonl")
    in_use = {token for item in read_lines(finished_run / "items.jsonl") for token in item["sid"]}
    for line, path in zip(read_lines(tmp_path / "rows.jsonl"), paths, strict=True):
        model, tokenizer, _ = load_model(path, torch.device("cpu"))
        rows = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(sorted(in_use))]
        share = np.linalg.svd(rows.detach().numpy(), compute_uv=False)
        share /= share.sum()
        assert line["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
        assert line["checkpoint"] == path.name and line["cosine"] == mean_cosine(rows)


# ---- The tables, the command line ----------------------------------------------------------------

def test_tables_hold_means_and_deviations(tmp_path):
    runners = [Runner(tmp_path / str(seed), grid(tmp_path / str(seed))) for seed in (1, 2)]
    for runner, value in zip(runners, (0.1, 0.2)):
        for name in ("valid_full", "test_full"):
            write_lines(runner.run / f"{name}.jsonl", [
                {"method": "bigram", "level": "item", "HR@10": 0.05},
                {"method": "sft.pt", "level": "item", "HR@10": value},
                {"method": "sft.pt", "level": "sid", "HR@10": 0.9}])
            (runner.run / "log" / f"{name}.done").write_text(runner.key(name))
    row = ablation.model_row("x", "full", runners, ("HR@10", "valid HR@10"))
    assert row == ["x", "0.1500 (0.0707)", "0.1500 (0.0707)"]
    assert ablation.yardstick_rows("full", runners, ("HR@10",))[1] == ["bigram", "0.0500"]
    assert "| TS-Rec: SA-Init and TS-Align |" in ablation.arms_table("title", ["full", "no_sa"], runners)


def test_print_runs_nothing(tmp_path, capsys):
    call(ablation, "--print", "--out", tmp_path, "--seeds", "1,2")
    text = capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text() == text[:-1]
    assert "### TS-Rec, table 4" in text and "Teachers" not in text     # the demo has no released SIDs
    assert not list(tmp_path.glob("seed-*/*.jsonl"))


@pytest.mark.parametrize("flags", [["--tables", "tsrec,nothing"], ["--seeds", "4,x"], ["--out", "a b"]])
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        ablation.parse_args(flags)
    assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err
