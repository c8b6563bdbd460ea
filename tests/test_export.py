"""evaluate.py --export: a Hugging Face folder with the same logits and ids, which stage 3 reads back."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import init_embeddings
from conftest import assert_stops, call
from init_embeddings import load_model, sid_token_ids
from test_evaluate import read_lines
from tokenize_items import read_catalogue

CPU = torch.device("cpu")


@pytest.fixture
def exported(run, tmp_path, capsys):
    folder = tmp_path / "served"
    call(evaluate, "--run", run, "--export", folder)
    assert f"wrote {folder}" in capsys.readouterr().out
    return folder


def test_the_folder_has_the_checkpoint(run, exported):
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(run / "sft.pt", CPU, items)
    theirs, names = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    sid = checkpoint["sid"]
    wanted = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"])
    assert torch.equal(wanted, sid_token_ids(names, sid["num_levels"], sid["codebook_size"]))
    for item, row in zip(items, read_lines(exported / "sids.jsonl"), strict=True):
        assert row == {"sid": "".join(item["sid"]), "item_id": item["item_id"], "title": item["title"]}
        text = f"The user bought {row['sid']}"
        ids = names(text).input_ids
        assert ids == tokenizer(text).input_ids and ids[-3:] == names.convert_tokens_to_ids(item["sid"])


def test_the_engine_is_told_neither_to_sample_nor_to_penalise(run, exported):
    config = AutoModelForCausalLM.from_pretrained(exported).generation_config
    assert not config.do_sample and config.max_new_tokens == 3
    assert config.repetition_penalty in (None, 1.0) and config.temperature in (None, 1.0)
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert "The user bought <a_" in text and "3 tokens" in text and "{" not in text


def test_stage_3_reads_it_back(run, exported):
    call(init_embeddings, "--run", run, "--backbone", exported, "--out", run / "back.pt")
    again, _, checkpoint = load_model(run / "back.pt", CPU)
    before, _, _ = load_model(run / "sft.pt", CPU)
    assert checkpoint["args"]["backbone"] == str(exported)
    assert again.get_input_embeddings().weight.shape == before.get_input_embeddings().weight.shape


def test_an_existing_folder_is_refused(run, exported, capsys):
    assert_stops(capsys, call, evaluate, "--run", run, "--export", exported, words=(exported, "new folder"))
