"""reproduce.py: its commands are understood, its tables hold what the runs have written."""
import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_stops, call, write_lines

sys.path[:0] = [str(ROOT / "tests" / "studies")]
import reproduce  # noqa: E402
import tokenize_items  # noqa: E402
from ablation import Runner  # noqa: E402


def row(method: str, split: str, hr: float, **more) -> dict:
    heads = dict.fromkeys(reproduce.HEADS["test"], hr)
    return {"method": method, "split": split, "level": "item", "task": "next_brief", **heads, **more}


def test_every_command_is_accepted_by_its_script(tmp_path):
    run = tmp_path / "industrial-42"
    groups = list(reproduce.GROUPS)
    steps = {**reproduce.run_steps(run, 42, "somewhere", groups, True), **reproduce.half_steps(run)}
    assert {"rl_test", "sasrec", "tiger", "sft_filtered", "half_whole", "lcrec_test", "star_test"} <= set(steps)
    assert "text2token" not in steps["lcrec"].command and steps["star"].command.endswith("--tasks sequence")
    for step in steps.values():
        assert set(step.needs) <= set(steps)
        if isinstance(step.command, str):
            script, *flags = shlex.split(step.command)
            assert importlib.import_module(Path(script).stem).parse_args(flags)
    (tmp_path / "sids.jsonl").write_text("")            # as from_peers.py writes it
    assert reproduce.released_file(tmp_path, "sids") == tmp_path / "sids.jsonl"
    (tmp_path / "official_sids.jsonl").write_text("")
    assert reproduce.released_file(tmp_path, "sids") == tmp_path / "official_sids.jsonl"
    others = reproduce.index_runs(tmp_path, 42, "industrial", str(tmp_path), "", 1)
    assert [other.run.parent.name for other in others] == ["rqvae", "sinkhorn", "released", "random"]
    for other in others:
        assert other.plan("sft_test")[-1] == "sft_test"
        for step in other.steps.values():
            if isinstance(step.command, str):
                script, *flags = shlex.split(step.command)
                assert importlib.import_module(Path(script).stem).parse_args(flags)
    assert others[3].plan("items") == ["plain", "sids", "items"]
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
    assert "| ours | 2 | 0.2000 | 0.2000 |" in text and "| 0.2000 (0.1000 to 0.3000) |\n" in text
    assert "| ours | 2 | 0.7000 | 0.7000 | 0.7000 |" in text
    assert "| never seen | 3 | 0.100 / 0.200 |" in text and "| ours | 0.500 | 0.500 |" in text
    assert "| ours | 2 | 0.8000 |" in reproduce.table("filtered", runs, "test", filtered=True)
    assert "RL" not in text


def test_random_sids_are_different_and_taken_by_stage_1(run):
    reproduce.draw_sids(run, 42)
    rows = [json.loads(line) for line in (run / "random.jsonl").read_text().splitlines()]
    items = tokenize_items.read_catalogue(run / "items.jsonl")
    assert [row["item_id"] for row in rows] == [item["item_id"] for item in items]
    assert len({tuple(row["sid"]) for row in rows}) == len(items)
    assert tokenize_items.codes_of(rows).max() <= tokenize_items.codes_of(items).max()
    tokenize_items.check_sids("random.jsonl", rows)


def test_the_table_of_indexes(tmp_path, run):
    for index, hr in (("", 0.2), ("released", 0.1)):
        other = tmp_path / index / "demo-42"
        (other / "log").mkdir(parents=True)
        shutil.copy(run / "items.jsonl", other)
        (other / "log" / "items.txt").write_text(
            "SIDs from x.jsonl: 7 collisions, kept" if index else
            "level   - | mse 1.0 (without codes)\nlevel   a | mse 0.5000 | codes\ncollisions 12 of 40 items")
        write_lines(other / "metrics.jsonl", [row(method, split, hr) for split in ("valid", "test")
                                              for method in ("sft.pt", "sft.pt + memory 0.6")])
    lines = reproduce.index_table(tmp_path, "demo", [42, 43]).splitlines()
    assert [line.split(" | ")[:4] for line in lines if line.startswith(("| RQ-KMeans (", "| the"))] == [
        ["| RQ-KMeans (the default)", "1", "0.5000", "12"], ["| the peers' released SIDs", "1", "", "7"]]
    assert lines[-1].endswith("| 0.1000 |")
    uniform = [{"sid": [f"<a_{i}>", "<b_0>"], "item_id": i, "title": "x"} for i in range(4)]
    write_lines(tmp_path / "items.jsonl", uniform)
    assert reproduce.perplexities(tmp_path) == pytest.approx([4, 1])


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
