"""tests/studies/baselines.py: SASRec learns and sees no later item, the mixture sums to one, both run."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_stops, call

sys.path.insert(0, str(ROOT / "tests" / "studies"))
baselines = importlib.import_module("baselines")


def small_sasrec(num_items: int = 12, dropout: float = 0.0):
    torch.manual_seed(0)
    return baselines.SASRec(num_items, max_history=5, dropout=dropout)


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_pieces_share_one_item_and_supervise_every_other_once():
    for length, wanted in ((3, [[0, 1, 2]]), (6, [[0, 1, 2, 3, 4, 5]]), (8, [[0, 1, 2, 3, 4, 5], [5, 6, 7]])):
        assert [piece.tolist() for piece in baselines.pieces(list(range(length)), 5)] == wanted


def test_sasrec_is_causal():
    model = small_sasrec().eval()
    one, other = torch.tensor([[3, 1, 4, 1, 5], [3, 1, 4, 9, 2]])[:, None]
    one, other = model(one), model(other)
    assert one.shape == (1, 5, 128)
    torch.testing.assert_close(one[:, :3], other[:, :3])
    assert not torch.allclose(one[:, 3:], other[:, 3:])


def test_padding_changes_neither_loss_nor_ranking():
    model = small_sasrec().eval()
    long, short = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([7, 8, 9])
    both = baselines.sequence_loss(model, [long, short])
    apart = [baselines.sequence_loss(model, [one]) * (len(one) - 1) for one in (long, short)]
    torch.testing.assert_close(both, sum(apart) / 6, atol=0.02, rtol=0)         # bf16, where there is any
    long, short = long.tolist(), short.tolist()
    together = baselines.rank_items(model, [long, short], [{}, {}], 0.0)
    assert together[1] == baselines.rank_items(model, [short], [{}], 0.0)[0]


def test_it_learns_which_item_follows_which():
    """Item i is followed by i + 5 mod 12, whatever came before."""
    sequences = [torch.tensor([(start + 5 * t) % 12 for t in range(4)]) for start in range(12)] * 8
    valid = [{"history": [i], "target": (i + 5) % 12} for i in range(12)]
    model = small_sasrec(dropout=0.1)
    before = baselines.sequence_loss(model, sequences).item()
    baselines.train_sasrec(model, sequences, valid, epochs=15)
    assert baselines.sequence_loss(model.eval(), sequences).item() < before / 2
    assert baselines.ndcg(model, valid) == 1


def test_the_best_epoch_is_kept(monkeypatch):
    model, figures, norms = small_sasrec(), iter([0.1, 0.3, 0.2]), []

    def ndcg(model, samples) -> float:
        norms.append(model.items.weight.norm().item())
        return next(figures)
    monkeypatch.setattr(baselines, "ndcg", ndcg)
    baselines.train_sasrec(model, [torch.tensor([1, 2, 3])] * 200, [], 3)
    assert model.items.weight.norm().item() == norms[1] != norms[2]


def test_the_mixture_sums_to_one():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    memory = torch.tensor([[0.0, 0.5, 0.25], [0.0, 0.0, 0.0]])
    mixed = baselines.mix(p, memory, 0.6)
    torch.testing.assert_close(mixed.sum(1), torch.ones(2))
    torch.testing.assert_close(mixed[0], torch.tensor([0.275, 0.465, 0.26]))
    torch.testing.assert_close(mixed[1], p[1])


def test_memory_moves_its_items_up():
    model, history = small_sasrec().eval(), [[1, 2]]
    last = baselines.rank_items(model, history, [{}], 0.6)[0][-1]
    assert baselines.rank_items(model, history, [{last: 0.9}], 0.6)[0][0] == last
    assert baselines.rank_items(model, history, [{last: 0.9}], 0.0)[0][0] != last


def test_sasrec_on_a_run(run, capsys):
    call(baselines, "sasrec", "--run", run, "--epochs", 2)
    printed, found = capsys.readouterr().out, rows(run)
    assert "epoch   2/2" in printed and "M parameters" in printed
    methods = ("sasrec", "sasrec + memory 0.6")
    wanted = [(method, split) for split in ("valid", "test") for method in methods]
    assert [(row["method"], row["split"]) for row in found] == wanted
    for row in found:
        assert row["n"] == 40 and row["seed"] == 42 and row["level"] == "item" and row["kinds"]
        assert 0 <= row["HR@1"] <= row["HR@3"] <= row["HR@5"] <= row["HR@10"] <= 1


def test_the_same_seed_gives_the_same_figures(run):
    for _ in range(2):
        call(baselines, "sasrec", "--run", run, "--epochs", 1)
    found = [row | {"seconds": 0, "minutes": 0} for row in rows(run)]
    assert found[:4] == found[4:]


def test_the_tokenizer_of_tiger_knows_sids_only(run):
    items = baselines.read_catalogue(run / "items.jsonl")
    path = baselines.make_start(run, items, seed=1)
    load_model = importlib.import_module("init_embeddings").load_model
    model, tokenizer, checkpoint = load_model(path, torch.device("cpu"), items)
    names = items[0]["sid"] + items[1]["sid"]
    ids = tokenizer(f"The user bought {''.join(names)}, élan", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == names and len(ids) == 6
    assert tokenizer.eos_token_id == 0 and checkpoint["args"]["backbone"] == "tiny"
    assert len(model.get_input_embeddings().weight) == len(tokenizer)


def test_tiger_on_a_run(run, monkeypatch, capsys):
    def in_this_process(command: list[str]) -> subprocess.CompletedProcess:
        call(importlib.import_module(Path(command[1]).stem), *command[2:])
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    call(baselines, "tiger", "--run", run, "--epochs", 1)
    printed, found = capsys.readouterr().out, rows(run)
    assert "minutes" in printed and not (run / "predictions.jsonl").exists()
    for split in ("valid", "test"):
        methods = [row["method"] for row in found if row["split"] == split]
        assert methods[-2:] == ["tiger.pt", "tiger.pt + memory 0.6"]


def test_mistakes_end_with_one_line(run, tmp_path, capsys):
    assert_stops(capsys, call, baselines, "sasrec", "--run", tmp_path / "none", words=("items.jsonl",))
    for split in ("train", "valid", "test"):
        (run / f"{split}.jsonl").rename(tmp_path / split)
        assert_stops(capsys, call, baselines, "sasrec", "--run", run, words=(f"{split}.jsonl",))
        (tmp_path / split).rename(run / f"{split}.jsonl")
    for flags in (["sasrec", "--dropout", "1"], ["bert"]):
        with pytest.raises(SystemExit) as stopped:
            baselines.parse_args(flags)
        assert stopped.value.code == 2


def test_a_stage_that_fails_ends_the_command(run, monkeypatch):
    commands = []

    def fail(command: list[str]) -> subprocess.CompletedProcess:
        commands.append(Path(command[1]).name)
        return subprocess.CompletedProcess(command, 2)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit) as stopped:
        call(baselines, "tiger", "--run", run)
    assert stopped.value.code == 2 and commands == ["train.py"]
