"""evaluate.py --task: free decoding against a slow beam search, text figures by hand, every task from the files."""
import json

import pytest
import torch

import evaluate
import extract_semantics
from conftest import assert_stops, call, random_model, write_lines
from evaluate import decode_texts, text_metrics
from train import TASKS


@torch.no_grad()
def slow_beams(model, prompt: list[int], num_beams: int, max_tokens: int, eos: int) -> list[list[int]]:
    """Beam search by whole forward passes over copies of the prompt, one beam at a time."""
    beams = [([], 0.0)]
    for _ in range(max_tokens):
        grown = []
        for text, score in beams:
            if text and text[-1] == eos:
                grown.append((text, score))
                continue
            gains = model(torch.tensor([prompt + text])).logits[0, -1].log_softmax(0).tolist()
            grown += [(text + [token], score + gain) for token, gain in enumerate(gains)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
    return [text[:text.index(eos)] if eos in text else text for text, _ in beams]


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("num_beams", [1, 5])
def test_decoded_texts_equal_a_slow_beam_search(kind, tied, num_beams):
    model = random_model(kind, tied, rows=23)
    prompts = [[3], [5, 1, 9, 12, 4, 4, 8], [7, 2, 2]]
    eos = slow_beams(model, prompts[0], num_beams, 3, -1)[0][1]         # a token that ends some beams early
    found = decode_texts(model, prompts, num_beams, 6, eos)
    assert found == [slow_beams(model, prompt, num_beams, 6, eos) for prompt in prompts]
    assert any(len(text) < 6 for beams in found for text in beams)


def test_text_metrics_by_hand():
    wanted = ["Steel  Rod 2 in", "wool blanket", "clay pot"]
    found = [["steel rod 2 IN"], ["blanket", "Wool blanket"], ["", "pot"]]
    figures = text_metrics(wanted, found)
    assert figures["accuracy"] == pytest.approx(1 / 3) and figures["accuracy_any"] == pytest.approx(2 / 3)
    assert figures["token_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def last_row(run) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("task", ["title2sid", "description2sid", "text2token", "retrieve", "titles2sid"])
def test_tasks_that_ask_for_sids(run, task):
    call(evaluate, "--run", run, "--task", task, "--limit", 12)
    row = last_row(run)
    assert row["task"] == task and row["n"] == 12 and row["level"] == ("token" if task == "text2token" else "item")
    assert row["num_beams"] == (20 if TASKS[task].source == "samples" else 5) and 0 <= row["HR@1"] <= row["HR@5"] <= 1


@pytest.mark.parametrize("task", ["sid2title", "token2text", "next_title"])
def test_tasks_that_ask_for_texts(run, task, capsys):
    call(evaluate, "--run", run, "--task", task, "--limit", 3, "--num-beams", 2, "--show", 1)
    row = last_row(run)
    assert row["level"] == "text" and row["num_beams"] == 2 and row["accuracy"] <= row["accuracy_any"] <= 1
    out = capsys.readouterr().out
    assert "wanted" in out and "decoded" in out and "token_f1" in out


def test_search_reads_the_test_queries_only(run, capsys):
    call(extract_semantics, "--run", run, "--queries", 3)
    rows = [json.loads(line) for line in (run / "queries.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["split"] == "test"]
    assert 0 < len(test) < len(rows)
    call(evaluate, "--run", run, "--task", "search")
    row = last_row(run)
    assert row["n"] == len(test) and row["task"] == "search" and row["method"] == "sft.pt"
    found = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(p["user_id"], p["target"]) for p in found] == [(r["query"], r["item_id"]) for r in test]
    write_lines(run / "queries.jsonl", [{"item_id": 999, "query": "rod", "split": "test"}])
    assert_stops(capsys, call, evaluate, "--run", run, "--task", "search", words=("queries.jsonl", "line 1", "999"))


def test_what_cannot_be_asked(run, capsys):
    assert_stops(capsys, call, evaluate, "--run", run, "--task", "search", words=("queries.jsonl",))
    (run / "valid.jsonl").write_text("")
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_args(["--history", "1", "--task", "title2sid"])
    assert stopped.value.code == 2 and "--history" in capsys.readouterr().err
