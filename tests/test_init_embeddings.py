"""Stage 3: the SID rows against the equations, the grown vocabulary, checkpoints, backbones from a folder."""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import evaluate
import init_embeddings
from conftest import assert_stops, call, random_model, toy_items, write_lines
from extract_semantics import read_semantics
from init_embeddings import (check_head, check_tokens, extend_vocabulary, gaussian_rows, initial_rows,
                             load_model, parse_args, pretrain, rescale, save_model, sid_digest, sid_token_ids)
from tokenize_items import item_text, sid_token
from train import prompt_ids

CPU = torch.device("cpu")
TEXTS = [item_text(i) for i in toy_items()]
RUNNING_TEXT = 'Acme Steel rod <a_2><b_3><c_1>, then "<a_0>" and <c_1> again (new)\n'
TINY = ["--width", 32, "--layers", 1, "--vocab-size", 300, "--pretrain-steps", 3]


def rows_of(text_rows, keyword_ids, num_levels: int, codebook_size: int, **changes) -> torch.Tensor:
    """initial_rows by eq. 9 as printed, unless the changes say otherwise."""
    options = {"init": "sa", "sa_norm": "none", "sa_depth": 3, "seed": 7, **changes}
    return initial_rows(text_rows, keyword_ids, num_levels, codebook_size, **options)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- small tokenizers of the kinds that backbones bring ----

def fast(tokenizer: Tokenizer, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: no BOS, no pad token."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False))
    return fast(t, eos_token="<|end|>")


def with_bos() -> PreTrainedTokenizerFast:
    """Llama 3's kind: byte-level, a post-processor puts <s> in front, no pad token."""
    t = byte_level().backend_tokenizer
    t.add_special_tokens(["<s>"])
    bos = ("<s>", t.token_to_id("<s>"))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return fast(t, bos_token="<s>", eos_token="<|end|>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: blanks spelled as a sign of their own, BOS in front, unknown letters."""
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(t, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower-cases, [CLS] in front and [SEP] behind, neither BOS nor EOS."""
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer, t.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    t.train_from_iterator(TEXTS, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=names, show_progress=False))
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return fast(t, unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]",
                mask_token="[MASK]")


TOKENIZERS = {make.__name__: make for make in (byte_level, with_bos, sentencepiece, wordpiece)}
BACKBONES = {       # name -> tokenizer, model with so many rows
    "llama": (with_bos, lambda rows: random_model("llama", tied=False, rows=rows)),
    "llama2": (sentencepiece, lambda rows: random_model("llama", tied=False, rows=rows + 9)),
    "gpt2": (byte_level, lambda rows: random_model("gpt2", tied=True, rows=rows + 5)),
}


# ---- rows ----

@pytest.fixture
def pretrained() -> torch.Tensor:
    """Anisotropic rows, far from zero mean, as in real models; (V, D)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(50, 8, generator=g) @ torch.randn(8, 8, generator=g) + torch.linspace(-2, 3, 8)


KEYWORD_IDS = {(0, 0): [4, 9], (0, 1): [7], (1, 0): [1, 1, 2, 30], (2, 2): [49, 3]}


def test_keyword_mean_by_hand(pretrained):
    rows = rows_of(pretrained, KEYWORD_IDS, 3, 3)
    for (level, code), ids in KEYWORD_IDS.items():
        by_hand = sum(pretrained[i] for i in ids) / len(ids)    # eq. 9; a piece said twice counts twice
        torch.testing.assert_close(rows[level, code], by_hand)


def test_vocab_norm(pretrained):
    plain = rows_of(pretrained, KEYWORD_IDS, 3, 3)
    rows = rows_of(pretrained, KEYWORD_IDS, 3, 3, sa_norm="vocab")
    length = float(np.mean([np.linalg.norm(v) for v in pretrained.numpy()]))
    for level, code in KEYWORD_IDS:
        assert rows[level, code].norm().item() == pytest.approx(length, rel=1e-5)
        assert F.cosine_similarity(rows[level, code], plain[level, code], dim=0) > 1 - 1e-6


def test_centered_norm(pretrained):
    text = pretrained.double().numpy()
    plain = np.stack([text[ids].mean(0) for ids in KEYWORD_IDS.values()])
    mu = text.mean(0)
    away = plain - plain.mean(0)                            # e_s - mean_s e_s
    assert np.allclose((mu + away).mean(0), mu)             # what they shared is gone ...
    length = np.linalg.norm(text - mu, axis=1).mean()       # ... and each is as far from mu as a word
    expected = mu + away / np.linalg.norm(away, axis=1, keepdims=True) * length
    rows = rows_of(pretrained, KEYWORD_IDS, 3, 3, sa_norm="centered")
    found = torch.stack([rows[t] for t in KEYWORD_IDS])
    assert np.allclose(found.numpy(), expected, atol=1e-4)
    # all rows shifted alike: centered does not see it
    shifted = rescale(torch.tensor(plain + 5.0), torch.tensor(text), "centered")
    assert np.allclose(shifted.numpy(), expected)
    # a single SA row has nothing but its share: it becomes mu, not NaN
    assert torch.allclose(rescale(pretrained[:1], pretrained, "centered"), pretrained.mean(0), atol=1e-5)


def test_mean_of_vocabulary(pretrained):
    rows = rows_of(pretrained, KEYWORD_IDS, 2, 4, init="mean")
    assert rows.shape == (2, 4, 8)
    torch.testing.assert_close(rows, (sum(pretrained) / 50).expand(2, 4, 8))


def test_normal_rows_have_the_spread_of_hugging_face(pretrained):
    rows = rows_of(pretrained, KEYWORD_IDS, 2, 4, init="normal")
    again = rows_of(pretrained * 9 + 3, KEYWORD_IDS, 2, 4, init="normal")
    assert rows.shape == (2, 4, 8) and torch.equal(rows, again)
    assert rows.std() == pytest.approx(0.02, rel=0.4) and abs(rows.mean()) < 0.01


def test_gaussian_has_the_fitted_moments(pretrained):
    noise = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(3))
    rows = gaussian_rows(pretrained, noise).double().numpy()
    text = pretrained.double().numpy()
    sigma = np.cov(text.T, bias=True)
    scale = np.sqrt(np.diag(sigma))
    assert np.abs((rows.mean(0) - text.mean(0)) / scale).max() < 0.03       # 6 standard errors of 40,000 rows
    assert np.abs((np.cov(rows.T, bias=True) - sigma) / np.outer(scale, scale)).max() < 0.05
    flat = pretrained.clone()
    flat[:, 2] = 1.5                                        # a direction without variance
    rows = gaussian_rows(flat, noise[:100])
    assert torch.allclose(rows[:, 2], torch.tensor(1.5), atol=1e-2)


@pytest.mark.parametrize("depth", (0, 1, 2, 3))
def test_depth(pretrained, depth):
    every = {(l, k): [5 * l + k, 2 * k] for l in range(3) for k in range(4)}
    sa, gaussian = (rows_of(pretrained, every, 3, 4, init=init) for init in ("sa", "gaussian"))
    assert (sa != gaussian).any(-1).all()
    rows = rows_of(pretrained, every, 3, 4, sa_depth=depth)
    assert torch.equal(rows[:depth], sa[:depth]) and torch.equal(rows[depth:], gaussian[depth:])
    # what centering takes out is the share of the rows that are set, not of those left gaussian
    if depth:
        rows = rows_of(pretrained, every, 3, 4, sa_depth=depth, sa_norm="centered")
        expected = rescale(sa[:depth].flatten(0, 1), pretrained, "centered").view(depth, 4, -1)
        assert torch.allclose(rows[:depth], expected, atol=1e-5)
        assert torch.equal(rows[depth:], gaussian[depth:])


def test_unused_codes_are_gaussian(pretrained):
    rows, other = (rows_of(pretrained, ids, 3, 3) for ids in (KEYWORD_IDS, {}))
    for level in range(3):
        for code in range(3):
            assert torch.equal(rows[level, code], other[level, code]) == ((level, code) not in KEYWORD_IDS)


def test_init_checkpoint_holds_the_equations(finished_run):
    """init.pt of the finished run: its SID rows follow from its own pretrained rows and semantics.jsonl."""
    model, tokenizer, checkpoint = load_model(finished_run / "init.pt", CPU)
    ids = sid_token_ids(tokenizer, 3, 8)
    weight = model.get_input_embeddings().weight.detach().double().numpy()
    text, mu = weight[:ids.min()], weight[:ids.min()].mean(0)
    assert len(weight) == len(tokenizer) == len(text) + 24
    rows, plain = [], []
    for row in read(finished_run / "semantics.jsonl"):
        pieces = tokenizer.encode(" " + " ".join(row["keywords"]), add_special_tokens=False)    # eq. 8
        plain.append(text[pieces].mean(0))
        rows.append(weight[tokenizer.convert_tokens_to_ids(row["token"])])
    away = np.stack(plain) - np.mean(plain, 0)
    length = np.linalg.norm(text - mu, axis=1).mean()
    assert np.allclose(rows, mu + length * away / np.linalg.norm(away, axis=1, keepdims=True), atol=1e-5)
    assert checkpoint["stage"] == "init" and checkpoint["step"] == 0
    assert checkpoint["sid"] == {"num_levels": 3, "codebook_size": 8, "num_items": 60, "new_items": [],
                                 "digest": sid_digest(read(finished_run / "items.jsonl"))}


# ---- semantics.jsonl and the catalogue ----

def meanings(items: list[dict]) -> list[dict]:
    """What stage 2 would write for these items."""
    tokens = sorted({token for item in items for token in item["sid"]})
    return [{"token": token, "description": "Things.", "keywords": ["steel", "rod"],
             "sampled": [item["item_id"] for item in items if token in item["sid"]]} for token in tokens]


def test_semantics_of_an_earlier_tokenisation_are_refused(tmp_path, capsys):
    """The token names are the same, but other items carry them."""
    items = [{"item_id": n, "sid": [f"<a_{n % 2}>", f"<b_{n // 2}>"]} for n in range(4)]
    path = write_lines(tmp_path / "semantics.jsonl", meanings(items))
    assert read_semantics(path, items) == meanings(items)
    assert read_semantics(path, [*items, {"item_id": "new", "sid": ["<a_0>", "<b_9>"]}])    # added later
    again = [{**item, "sid": items[n - 1]["sid"]} for n, item in enumerate(items)]
    assert {row["token"] for row in meanings(again)} == {row["token"] for row in meanings(items)}
    for other in (again, items[1:], [{**item, "sid": ["<a_5>", item["sid"][1]]} for item in items]):
        assert_stops(capsys, read_semantics, path, other, words=(path, "<a_0>", "extract_semantics.py"))
    by_hand = [{name: row[name] for name in ("token", "description", "keywords")} for row in meanings(items)]
    assert read_semantics(write_lines(path, by_hand), items) == by_hand


# ---- the vocabulary ----

@pytest.mark.parametrize("kind, tied, spare", [
    ("qwen2", True, 0), ("llama", False, 0), ("gpt2", True, 0), ("qwen2", True, 40), ("llama", False, 40),
    ("llama", False, 7)])
def test_extend_vocabulary(kind, tied, spare):
    tokenizer = byte_level()
    before_size = len(tokenizer)
    model = random_model(kind, tied, rows=before_size + spare)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sample = tokenizer(TEXTS[0]).input_ids
    ids = extend_vocabulary(model, tokenizer, 3, 4)
    assert ids.flatten().tolist() == list(range(before_size, before_size + 12))     # spare rows are used
    assert tokenizer.convert_ids_to_tokens(ids[1].tolist()) == [sid_token(1, k) for k in range(4)]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(embedding) == len(head) == before_size + max(spare, 12)              # never shrinks
    assert model.config.vocab_size == len(embedding)
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    for name, p in model.named_parameters():                # pretrained rows bit for bit
        assert torch.equal(p[:len(before[name])] if p.dim() else p, before[name]), name
    assert torch.isfinite(embedding).all() and torch.isfinite(head).all()
    assert tokenizer(TEXTS[0]).input_ids == sample
    # a second call finds them there
    assert torch.equal(extend_vocabulary(model, tokenizer, 3, 4), ids) and len(tokenizer) == before_size + 12


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sid_tokens_are_single_and_survive(name):
    tokenizer = TOKENIZERS[name]()
    ids = extend_vocabulary(random_model(rows=len(tokenizer)), tokenizer, 3, 12)
    check_tokens(tokenizer, ids)
    for level in range(3):
        for code in (0, 1, 11):                             # <a_1> is not the beginning of <a_11>
            i, token = int(ids[level, code]), sid_token(level, code)
            for text, count in ((token, 1), (f"x{token}{token}y", 2), (f"item {token}, {token}", 2)):
                assert tokenizer(text, add_special_tokens=False).input_ids.count(i) == count
            assert tokenizer.decode([i]).strip() == token
    both = tokenizer("<a_1><b_11><c_0>", add_special_tokens=False).input_ids
    assert both[-3:] == [ids[0, 1], ids[1, 11], ids[2, 0]]


def test_tokens_that_do_not_survive_are_refused(capsys):
    tokenizer = byte_level()
    piece = tokenizer.tokenize("x sturdy")[-1]              # spelled with a blank's sign: no such text
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids(piece)]])
    assert_stops(capsys, check_tokens, tokenizer, ids, words=(piece,))


# ---- checkpoints ----

@pytest.mark.parametrize("name, tied", [("byte_level", True), ("byte_level", False), ("with_bos", False),
                                        ("sentencepiece", True), ("wordpiece", True)])
def test_round_trip(tmp_path, name, tied):
    tokenizer = TOKENIZERS[name]()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token           # as load_pretrained does
    kind = "gpt2" if name == "sentencepiece" else "llama"
    model = random_model(kind, tied, rows=len(tokenizer))
    ids = extend_vocabulary(model, tokenizer, 3, 4)
    sid = {"num_levels": 3, "codebook_size": 4, "num_items": 0, "digest": ""}
    save_model(tmp_path / "x.pt", model, tokenizer, sid, stage="init", args={"a": [1, None]}, step=3)

    stored = torch.load(tmp_path / "x.pt", weights_only=True)
    heads = [n for n in stored["weights"] if n == "lm_head.weight"]
    assert len(heads) == (0 if tied else 1)
    matrix = model.get_input_embeddings().weight
    assert (tmp_path / "x.pt").stat().st_size < 100_000 + 4 * sum(p.numel() for p in model.parameters())
    assert sum(w.shape == matrix.shape for w in stored["weights"].values()) == (1 if tied else 2)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]             # no temporary file left

    again, reader, rest = load_model(tmp_path / "x.pt", CPU)
    assert rest == {"sid": sid, "stage": "init", "args": {"a": [1, None]}, "step": 3}
    old, new = model.state_dict(), again.state_dict()
    assert list(old) == list(new) and all(torch.equal(old[n], new[n]) for n in old)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    x = torch.cat([torch.arange(1, 9), ids.flatten()])[None]
    assert torch.equal(model(x).logits, again.eval()(x).logits)

    for text in (RUNNING_TEXT, "", *TEXTS[:3]):
        assert tokenizer(text).input_ids == reader(text).input_ids
        plain, same = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, reader))
        assert plain == same and tokenizer.decode(plain) == reader.decode(plain)
    assert torch.equal(sid_token_ids(reader, 3, 4), ids)
    for kind in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{kind}_token_id") == getattr(reader, f"{kind}_token_id")
    prompt, = prompt_ids(reader, ["Which item?"])
    assert prompt == prompt_ids(tokenizer, ["Which item?"])[0]
    assert (prompt[0] == reader.bos_token_id) == (name in ("with_bos", "sentencepiece"))
    # saving what was loaded gives the same checkpoint
    save_model(tmp_path / "y.pt", again, reader, **rest)
    twice = torch.load(tmp_path / "y.pt", weights_only=True)
    assert list(twice["weights"]) == list(stored["weights"]) and twice["special"] == stored["special"]
    assert load_model(tmp_path / "y.pt", CPU)[1](RUNNING_TEXT).input_ids == reader(RUNNING_TEXT).input_ids


# ---- backbones from a folder ----

@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_from_a_folder(name, run, tmp_path, capsys):
    make_tokenizer, make_model = BACKBONES[name]
    tokenizer, folder = make_tokenizer(), tmp_path / "backbone"
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    call(init_embeddings, "--run", run, "--backbone", folder, "--sa-norm", "none", "--out", run / "other.pt")
    assert ("tied" in capsys.readouterr().out) == (name == "gpt2")
    text, plain = len(tokenizer), AutoModelForCausalLM.from_pretrained(folder)
    model, tokenizer, _ = load_model(run / "other.pt", CPU)
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None
    assert sid_token_ids(tokenizer, 3, 8).flatten().tolist() == list(range(text, text + 24))
    row = read(run / "semantics.jsonl")[0]
    pieces = tokenizer.encode(" " + " ".join(row["keywords"]), add_special_tokens=False)
    for new, old in ((model.get_input_embeddings(), plain.get_input_embeddings()),
                     (model.get_output_embeddings(), plain.get_output_embeddings())):
        assert torch.equal(new.weight[:text], old.weight[:text])
        assert len(new.weight) == max(text + 24, len(old.weight))
        torch.testing.assert_close(new.weight[tokenizer.convert_tokens_to_ids(row["token"])],
                                   old.weight[pieces].mean(0))  # eq. 9, each matrix in its own space
    call(evaluate, "--run", run, "--checkpoint", run / "other.pt", "--limit", 4)
    assert "other.pt" in capsys.readouterr().out


UNSUITED = {        # name -> architecture, settings, tokenizer, word of the message
    "soft-capping": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 5.0}, byte_level, "logits"),
    "a scaled head": ("cohere", {"logit_scale": 0.25}, byte_level, "logits"),
    "BERT": ("bert", {}, byte_level, "logits"),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, byte_level, "attention"),
    "ALiBi": ("falcon", {"alibi": True, "new_decoder_architecture": False}, byte_level, "attention"),
    "no end token": ("llama", {}, wordpiece, "end"),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_backbones_are_refused(name, run, tmp_path, capsys):
    kind, extra, make_tokenizer, word = UNSUITED[name]
    tokenizer, before, folder = make_tokenizer(), (run / "init.pt").read_bytes(), tmp_path / "backbone"
    random_model(kind, rows=len(tokenizer), **extra).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(init_embeddings, "--run", run, "--backbone", folder)
    line = capsys.readouterr().err.strip().splitlines()[-1]     # after Hugging Face's loading bar
    assert stopped.value.code == 2 and line.startswith("error: ") and str(folder) in line and word in line
    assert (run / "init.pt").read_bytes() == before


def test_positions_that_do_not_start_at_0_are_refused(monkeypatch, capsys):
    """As in RoBERTa, whose positions count from 2 unless they are given."""
    model = random_model("gpt2")
    check_head(model, "gpt2")
    shifted = functools.partial(model.forward, position_ids=torch.arange(2, 10)[None])
    monkeypatch.setattr(model, "forward", shifted)
    assert_stops(capsys, check_head, model, "shifted", words=("--backbone", "shifted"))


# ---- the command line ----

def test_same_seed_same_file(run, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        call(init_embeddings, "--run", run, *TINY, "--seed", seed, "--out", tmp_path / f"{name}.pt")
    a, b, c = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "abc")
    assert a["tokenizer"] == b["tokenizer"] and list(a["weights"]) == list(b["weights"])
    assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"])
    assert not all(torch.equal(a["weights"][n], c["weights"][n]) for n in a["weights"])


@pytest.mark.parametrize("steps", (1, 2, 9, 10, 11))
def test_any_number_of_pretraining_steps(steps):
    model = random_model(rows=97)
    assert np.isfinite(pretrain(model, torch.arange(30), steps, seed=0))


def edit(name: str, change):
    """A change of the rows of one of a run's files."""
    return lambda run: write_lines(run / name, change(read(run / name)))


def keywords(value):
    """A change of the second token's keywords."""
    return edit("semantics.jsonl", lambda rows: [rows[0], {**rows[1], "keywords": value}, *rows[2:]])


INIT_ERRORS = {     # name -> (flags, a change to the run, words of the message)
    "no catalogue": ([], lambda run: (run / "items.jsonl").unlink(), ["items.jsonl"]),
    "no semantics": ([], lambda run: (run / "semantics.jsonl").unlink(), ["semantics.jsonl"]),
    "semantics of another tokenisation": ([], edit("items.jsonl", lambda rows: [
        {**row, "sid": rows[n - 1]["sid"]} for n, row in enumerate(rows)]), ["semantics.jsonl"]),
    "a token without a line": ([], edit("semantics.jsonl", lambda rows: rows[1:]),
                               ["semantics.jsonl", "<a_0>"]),
    "a token that nobody carries": ([], edit("semantics.jsonl", lambda rows: [
        *rows, {**rows[0], "token": "<f_99>"}]), ["semantics.jsonl", "<f_99>"]),
    "no keywords": ([], keywords([]), ["semantics.jsonl", "<a_1>"]),
    "blank keywords": ([], keywords([" ", ""]), ["semantics.jsonl", "<a_1>"]),
    "keywords that are no list": ([], keywords("steel rods"), ["semantics.jsonl, line 2", "keywords"]),
    "a codebook that is none": ([], lambda run: (run / "codebook.pt").write_text("hello"), ["codebook.pt"]),
    "no such folder": (["--backbone", "{run}/nowhere"], None, ["nowhere"]),
    "an empty folder": (["--backbone", "{run}/empty"], lambda run: (run / "empty").mkdir(), ["empty"]),
    "no such checkpoint": (["--backbone", "{run}/none.pt"], None, ["none.pt"]),
    "a backbone that is no checkpoint": (["--backbone", "{run}/codebook.pt"], None, ["codebook.pt"]),
}


@pytest.mark.parametrize("name", INIT_ERRORS)
def test_errors(run, capsys, monkeypatch, name):
    flags, change, words = INIT_ERRORS[name]
    monkeypatch.setattr(init_embeddings, "build_tiny", None)    # all is said before the pretraining
    if change:
        change(run)
    before = (run / "init.pt").read_bytes()
    flags = [flag.format(run=run) for flag in flags]
    assert_stops(capsys, call, init_embeddings, "--run", run, *TINY, *flags, words=words)
    assert (run / "init.pt").read_bytes() == before


CORRUPT = {
    "text": lambda path: path.write_text("this is no checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:50_000]),
    "another file of the run": lambda path: (path.parent / "codebook.pt").replace(path),
    "a bare tensor": lambda path: torch.save(torch.zeros(3), path),
    "an object": lambda path: torch.save(SimpleNamespace(a=1), path),
    "none": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_checkpoint(run, capsys, name):
    CORRUPT[name](run / "sft.pt")
    assert_stops(capsys, load_model, run / "sft.pt", CPU, read(run / "items.jsonl"), words=("sft.pt",))


def test_a_checkpoint_is_for_one_catalogue(finished_run, capsys):
    items = read(finished_run / "items.jsonl")
    added = {**items[0], "item_id": "new"}
    load_model(finished_run / "init.pt", CPU, [*items, added])  # tokenize_items.py --add appends
    for other in ([{**items[0], "sid": items[1]["sid"]}, *items[1:]],
                  [{**items[0], "item_id": "0"}, *items[1:]],
                  items[::-1], items[:-1], [added, *items],
                  [*items, {**added, "sid": ["<a_0>", "<b_0>", "<c_8>"]}]):         # a code it lacks
        assert_stops(capsys, load_model, finished_run / "init.pt", CPU, other, words=("init.pt", "SIDs"))


def test_flags(capsys):
    args = parse_args([])
    assert (args.run, args.init, args.backbone, args.seed) == ("runs/demo", "sa", "tiny", 42)
    for wrong in (["--width", "33"], ["--layers", "0"], ["--pretrain-steps", "0"], ["--init", "zero"],
                  ["--sa", "1"], ["--sa-depth", "-1"], ["--sa-depth", "9"], ["--seed", "-1"],
                  ["--seed", str(2 ** 32)]):
        with pytest.raises(SystemExit) as stopped:
            parse_args(wrong)
        assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err.splitlines()[-1]


def test_backbone_may_be_an_earlier_checkpoint(run):
    """The text rows of init.pt, other SID rows: the same file as pretraining again would give."""
    size = ["--width", 32, "--layers", 2, "--vocab-size", 500, "--pretrain-steps", 10]
    stored = []
    for flags in (["--backbone", run / "init.pt"], size, ["--backbone", run / "sft.pt"]):
        call(init_embeddings, "--run", run, "--init", "gaussian", *flags, "--out", run / "out.pt")
        stored.append(torch.load(run / "out.pt", weights_only=True))
    short, long, other = stored
    assert short["tokenizer"] == long["tokenizer"] and short["args"]["backbone"] == "tiny"
    assert short["weights"].keys() == long["weights"].keys()
    assert all(torch.equal(short["weights"][name], weight) for name, weight in long["weights"].items())
    assert not torch.equal(other["weights"]["model.norm.weight"], long["weights"]["model.norm.weight"])


def test_batches_of_similar_length():
    lengths = [5, 30, 1, 9, 9, 2, 120, 7]
    batches = init_embeddings.length_batches(lengths, 30)
    assert sorted(row for rows in batches for row in rows) == list(range(8))
    for rows in batches:
        longest = max(lengths[row] for row in rows)
        assert len(rows) * longest <= 30 or len(rows) == 1              # padding included
    assert [[lengths[row] for row in rows] for rows in batches] == [[1, 2, 5, 7], [9, 9], [30], [120]]
