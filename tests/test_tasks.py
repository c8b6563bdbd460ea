"""evaluate.py --task: every task whose response is an item's SID, from the files."""
import json

import pytest

import evaluate
import extract_semantics
from conftest import assert_stops, call, write_lines
from train import TASKS


def last_row(run) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("task", ["title2sid", "description2sid", "text2sid", "next_brief", "next"])
def test_tasks_that_ask_for_sids(run, task, capsys):
    call(evaluate, "--run", run, "--task", task, "--limit", 12)
    untrained = task in ("description2sid", "text2sid")
    assert ("last trained without" in capsys.readouterr().out) == untrained
    row = last_row(run)
    assert (row["task"], row["n"], row["level"]) == (task, 12, "item")
    assert row["num_beams"] == (20 if TASKS[task].source == "samples" else 5)
    assert 0 <= row["HR@1"] <= row["HR@5"] <= 1


def test_search_reads_the_test_queries_only(run, capsys):
    call(extract_semantics, "--run", run, "--queries", 3)
    rows = [json.loads(line) for line in (run / "queries.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["split"] == "test"]
    assert 0 < len(test) < len(rows)
    call(evaluate, "--run", run, "--task", "search")
    row = last_row(run)
    assert row["n"] == len(test) and row["task"] == "search" and row["method"] == "sft.pt"
    found = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(row["query"], row["target"]) for row in found] == [(row["query"], row["item_id"]) for row in test]
    assert "sft.pt was last trained without search" in capsys.readouterr().out
    write_lines(run / "queries.jsonl", [{"item_id": 999, "query": "rod", "split": "test"}])
    assert_stops(capsys, call, evaluate, "--run", run, "--task", "search",
                 words=("queries.jsonl, line 1", "999"))


@pytest.mark.parametrize("flags, word", [
    ("--task sid2title", "sid2title"), ("--task text2token", "text2token"),
    ("--history 1 --task title2sid", "--history")])
def test_what_cannot_be_asked(flags, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_args(flags.split())
    assert stopped.value.code == 2 and word in capsys.readouterr().err


def test_a_task_whose_file_is_missing(run, capsys):
    assert_stops(capsys, call, evaluate, "--run", run, "--task", "search", words=("queries.jsonl",))
