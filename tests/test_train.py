"""Stage 4: prompts, label masks, the loss against the naive one, accumulation, schedule, early stopping, errors."""
import json
import math
import random

import evaluate
import pytest
import tokenize_items
import torch
import train as stage
from conftest import assert_one_line_error, assert_stops, call, random_model, run_script, write_lines
from init_embeddings import load_model, load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CPU = torch.device("cpu")
DATA = {
    "items": [{"item_id": 1, "title": "Steel rod", "description": "A long rod", "sid": ["<a_0>", "<b_1>", "<c_0>"]},
              {"item_id": "x", "title": "Blue wire", "description": "Copper", "sid": ["<a_1>", "<b_0>", "<c_1>"]}],
    "samples": [{"user_id": "u", "history": ["x", 1], "target": 1}],
    "tokens": [{"token": "<a_1>", "description": "Wires of copper"}]}
ITEM_1, ITEM_X = "<a_0> <b_1> <c_0>", "<a_1> <b_0> <c_1>"
# One example per task: its tokens, those that the loss counts in brackets; / is the line break.
TABLE = {
    "next": f"The user has interacted with items {ITEM_X} , {ITEM_1} in chronological order. Can you predict the next "
            "possible item that the user may expect? / [<a_0>] [<b_1>] [<c_0>]",
    "title2sid": "Which item has the title: Steel rod? / [<a_0>] [<b_1>] [<c_0>]",
    "sid2title": f'What is the title of item " {ITEM_1} "? / [Steel] [rod] [<eos>]',
    "next_title": f"The user has sequentially interacted with items {ITEM_X} , {ITEM_1} . Can you recommend the next "
                  "item for him? Tell me the title of the item. / [Steel] [rod] [<eos>]",
    "next_description": f"Please review the user's historical interactions: {ITEM_X} , {ITEM_1} , and describe what "
                        "kind of item he still needs. / [A] [long] [rod] [<eos>]",
    "text2token": "Identify the specific SID token shared by items that exhibit the following scope and "
                  'characteristics: "Wires of copper" / [<a_1>]',
    "token2text": "Describe the typical scope and shared features of items associated with the token: "
                  '" <a_1> " / [Wires] [of] [copper] [<eos>]',
}


def word_tokenizer(pad: str = "<pad>", template: str | None = None, bos: str | None = None):
    """A tokenizer with one id per word, whose pieces a person can read; `template` adds BOS or EOS by itself."""
    words = sorted({w.strip("[]") for row in TABLE.values() for w in row.split()} | {"rod?", '"Wires', 'copper"'})
    names = ["<pad>", "<eos>", "<s>", "<unk>", *(w for w in words if w[0] != "<"), "\n"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 2), ("<eos>", 1)])
    tokenizer.add_tokens([f"<{level}_{code}>" for level in "abc" for code in range(2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad, unk_token="<unk>",
                                   bos_token=bos)


def settings(**changes):
    """The arguments as main() has them for the tiny backbone, in float32, with `changes`."""
    args = stage.parse_args([])
    vars(args).update({k: v for k, v in stage.PRESETS["tiny"].items() if getattr(args, k) is None})
    vars(args).update({"precision": "float32", **changes})
    return args


def ragged(count: int = 11, seed: int = 0, rows: int = 97) -> list[stage.Example]:
    """Examples of random ids; id 0, which is EOS and padding, occurs in prompts and ends every other response."""
    rng = random.Random(seed)
    out = []
    for n in range(count):
        prompt = [rng.randrange(rows) for _ in range(rng.randrange(1, 20))]
        response = [rng.randrange(rows) for _ in range(rng.randrange(1, 6))] + [0] * (n % 2)
        out.append(stage.Example("next", prompt + response, len(prompt)))
    return out


def naive_losses(model, examples: list[stage.Example]) -> torch.Tensor:
    """Each supervised token's loss from the full (B, T, V) logits under an attention mask."""
    length = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [5] * (length - len(e.ids)) for e in examples])         # any padding will do
    mask = torch.tensor([[1] * len(e.ids) + [0] * (length - len(e.ids)) for e in examples])
    log_probs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    return torch.stack([-log_probs[row, t - 1, e.ids[t]] for row, e in enumerate(examples)
                        for t in range(e.start, len(e.ids))])


# ---------------------------------------------------------------------------------------------------------
# Prompts, responses and the label mask
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_label_mask_token_by_token(pad):
    tokenizer = word_tokenizer(pad)
    assert set(TABLE) == set(stage.TASKS)                               # a new task needs a row above
    examples = [stage.encode_examples(tokenizer, name, stage.task_pairs(name, DATA), 99)[0] for name in TABLE]
    ids, labels = stage.collate(examples, CPU)                          # all in one batch, so most are padded
    for row, example, expected in zip(range(len(ids)), examples, TABLE.values()):
        tokens = tokenizer.convert_ids_to_tokens(ids[row, :len(example.ids)].tolist())
        counted = [False] + (labels[row] != -100).tolist()              # position t is judged on token t + 1
        shown = [f"[{token}]" if counted[t] else token for t, token in enumerate(tokens)]
        assert " ".join(shown).replace("\n", "/") == expected
        assert not any(counted[len(example.ids):])                      # and never on padding
        assert "<unk>" not in tokens


def test_collate_equals_a_naive_loop():
    examples = ragged(9)
    ids, labels = stage.collate(examples, CPU)
    for row, example in enumerate(examples):
        for t in range(ids.shape[1]):
            counts = t + 1 < len(example.ids) and t + 1 >= example.start
            assert labels[row, t] == (example.ids[t + 1] if counts else -100)
            assert t >= len(example.ids) or ids[row, t] == example.ids[t]
    assert (labels != -100).sum() == sum(len(e.ids) - e.start for e in examples)


def test_a_long_text_is_cut_without_eos_and_a_sid_never_is():
    tokenizer = word_tokenizer()
    for name, kept in (("next_description", ["A", "long"]), ("token2text", ["Wires", "of"])):
        example = stage.encode_examples(tokenizer, name, stage.task_pairs(name, DATA), 2)[0]
        assert tokenizer.convert_ids_to_tokens(example.ids[example.start:]) == kept
    whole = stage.encode_examples(tokenizer, "token2text", stage.task_pairs("token2text", DATA), 4)[0]
    assert whole.ids[-1] == tokenizer.eos_token_id
    for name in ("next", "title2sid"):
        example = stage.encode_examples(tokenizer, name, stage.task_pairs(name, DATA), 1)[0]
        assert len(example.ids) - example.start == 3


def test_examples_without_text_are_left_out_and_braces_are_text():
    items = [{**DATA["items"][0], "title": " ", "description": ""}, {**DATA["items"][1], "title": "{sid} {x} 5%"}]
    data = {**DATA, "items": items}
    assert [len(stage.task_pairs(name, data)) for name in TABLE] == [1, 1, 1, 0, 0, 1, 1]
    assert stage.task_pairs("title2sid", data) == [("Which item has the title: {sid} {x} 5%?", "<a_1><b_0><c_1>")]
    assert stage.encode_examples(word_tokenizer(), "next_title", [], 99) == []


@pytest.mark.parametrize("template, bos, first", [
    (None, None, []), (None, "<s>", []), ("<s> $A", "<s>", [2]), ("<s> $A <eos>", "<s>", [2]), ("$A <eos>", None, [])])
def test_bos_where_the_tokenizer_adds_one(template, bos, first):
    tokenizer = word_tokenizer(template=template, bos=bos)
    again = load_tokenizer(tokenizer.backend_tokenizer.to_str(),        # as it comes out of a checkpoint
                           {"bos_token": bos, "eos_token": "<eos>", "pad_token": "<pad>"})
    plain = stage.prompt_ids(word_tokenizer(), ["Which item", "the title"])
    for t in (tokenizer, again):
        assert stage.prompt_ids(t, ["Which item", "the title"]) == [first + ids for ids in plain]
        example = stage.encode_examples(t, "sid2title", stage.task_pairs("sid2title", DATA), 99)[0]
        assert t.convert_ids_to_tokens(example.ids[example.start:]) == ["Steel", "rod", "<eos>"]
        assert example.ids.count(2) == len(first)


class Prompts(Exception):
    """Carries the prompts out of evaluate.main()."""


def test_evaluation_reads_the_prompts_of_training_id_for_id(run, monkeypatch):
    items = tokenize_items.read_catalogue(run / "items.jsonl")
    samples = tokenize_items.read_samples(run / "valid.jsonl", {item["item_id"] for item in items})
    _, tokenizer, _ = load_model(run / "init.pt", CPU, items)
    pairs = stage.task_pairs("next", {"items": items, "samples": samples})
    trained = [e.ids[:e.start] for e in stage.encode_examples(tokenizer, "next", pairs, 256)]
    assert len({tuple(p) for p in trained}) > 10

    def prompts_of(*flags) -> list[list[int]]:
        def caught(*args):
            raise Prompts(stage.prompt_ids(*args))
        monkeypatch.setattr(evaluate, "prompt_ids", caught)
        with pytest.raises(Prompts) as prompts:
            call(evaluate, "--run", run, *flags)
        return prompts.value.args[0]
    assert prompts_of("--split", "valid") == trained                    # with a real target
    history = ",".join(map(str, samples[3]["history"]))
    assert prompts_of("--history", history) == [trained[3]]             # without any


# ---------------------------------------------------------------------------------------------------------
# Loss and gradients
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("llama", False), ("gpt2", True)])
def test_response_loss_equals_the_naive_loss(kind, tied):
    model, examples = random_model(kind, tied), ragged()
    losses = stage.response_loss(model, *stage.collate(examples, CPU))
    losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = naive_losses(model, examples)
    expected.mean().backward()
    assert torch.allclose(losses, expected, atol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-5), name
    with torch.no_grad():                                               # and transformers' own loss agrees
        ids, _ = stage.collate(examples, CPU)
        labels = torch.full_like(ids, -100)
        for row, e in enumerate(examples):
            labels[row, e.start:len(e.ids)] = torch.tensor(e.ids[e.start:])
        assert float(model(input_ids=ids, labels=labels).loss) == pytest.approx(float(losses.mean()), abs=1e-5)


def test_gradient_equals_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)     # the loss, too, in float64
    model = random_model("gpt2").double()
    batch = stage.collate(ragged(4), CPU)
    stage.response_loss(model, *batch).mean().backward()
    rng = random.Random(0)
    with torch.no_grad():
        for p in rng.sample(list(model.parameters()), 6):
            weight, gradient = p.view(-1), p.grad.view(-1)
            i = int(gradient.abs().argmax())
            values = []
            for shift in (1e-5, -2e-5):
                weight[i] += shift
                values.append(float(stage.response_loss(model, *batch).mean()))
            weight[i] += 1e-5
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[i]), rel=1e-5, abs=1e-8)


def test_micro_batches_do_not_change_the_update():
    examples, results = ragged(13), []
    assert len(stage.micro_batches(examples, 10 ** 9)) == 1 and len(stage.micro_batches(examples, 1)) == 13
    for micro_tokens in (10 ** 9, 60, 1):
        model = random_model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)               # Adam's first step sees only the sign
        loss, norm = stage.train_step(model, sgd, examples, settings(micro_tokens=micro_tokens, clip=1e9))
        results.append((loss, norm, model.state_dict()))
    assert results[0][0] == pytest.approx(naive_losses(random_model(), examples).mean().item(), abs=1e-5)
    for loss, norm, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6) and norm == pytest.approx(results[0][1], rel=1e-5)
        for name, weight in weights.items():
            assert torch.allclose(weight, results[0][2][name], atol=1e-6), name


def test_task_weights_by_hand():
    """A batch's loss is sum(w * nll) / sum(w) over its supervised tokens, whatever its micro-batches."""
    assert stage.parse_tasks("next,sid2title:0.25") == {"next": 1.0, "sid2title": 0.25}
    weighted = [e._replace(weight=[1.0, 0.25, 3.0][n % 3]) for n, e in enumerate(ragged(9))]
    total = count = 0.0
    for e in weighted:
        losses = naive_losses(random_model(), [e])
        total, count = total + e.weight * losses.sum().item(), count + e.weight * len(losses)
    for micro_tokens in (10 ** 9, 40):
        model = random_model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        loss, _ = stage.train_step(model, sgd, weighted, settings(micro_tokens=micro_tokens, clip=1e9))
        assert loss == pytest.approx(total / count, abs=1e-5)


def test_gradients_are_clipped():
    model, before = random_model(), random_model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    _, norm = stage.train_step(model, sgd, ragged(), settings(clip=0.01))
    moved = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), before.parameters())) ** 0.5
    assert norm > 0.1 and float(moved.detach()) == pytest.approx(0.01, rel=1e-3)


def test_validation_loss_is_the_mean_over_tokens():
    model, examples = random_model(), ragged(12)
    expected = naive_losses(model, examples).mean().item()
    for micro_tokens in (10 ** 9, 40):
        value = stage.validation_loss(model, examples, settings(micro_tokens=micro_tokens))
        assert value == pytest.approx(expected, abs=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_weight_decay_is_for_matrices_only():
    model = random_model("qwen2", tied=False)
    groups = stage.make_optimizer(model, settings(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in model.parameters()}


def test_dropout_changes_nothing_but_training():
    plain, model, (ids, _) = random_model(), random_model(), stage.collate(ragged(), CPU)
    stage.add_dropout(model, 0.3)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        torch.manual_seed(0)
        first, second = model.train()(ids).logits, model(ids).logits
        torch.manual_seed(0)
        assert not torch.equal(first, second) and torch.equal(model(ids).logits, first)
        assert torch.equal(model.eval()(ids).logits, plain(ids).logits)
        stage.add_dropout(plain, 0.0)
        assert torch.equal(plain.train()(ids).logits, plain.eval()(ids).logits)


# ---------------------------------------------------------------------------------------------------------
# Batches, schedule, the loop
# ---------------------------------------------------------------------------------------------------------

def test_micro_batches_cover_all_and_respect_the_limit():
    examples = ragged(50) + [stage.Example("next", [1] * 200, 190)]
    for limit in (1, 30, 64, 1000):
        pieces = stage.micro_batches(examples, limit)
        assert sorted(e for piece in pieces for e in piece) == sorted(examples)
        for piece in pieces:                                            # one example may exceed it, alone
            assert piece and (len(piece) == 1 or len(piece) * max(len(e.ids) for e in piece) <= limit)
    assert len(stage.micro_batches(examples[:50], 10 ** 6)) == 1


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_epoch_batches_cover_all_by_seed(batch_size):
    examples = ragged(150)
    batches = stage.epoch_batches(examples, batch_size, random.Random(3))
    assert sorted(e for batch in batches for e in batch) == sorted(examples)
    assert len(batches) == math.ceil(150 / batch_size) and max(map(len, batches)) <= batch_size
    assert batches == stage.epoch_batches(examples, batch_size, random.Random(3))
    if batch_size < 1000:
        rng = random.Random(3)
        assert stage.epoch_batches(examples, batch_size, rng) != stage.epoch_batches(examples, batch_size, rng)


def test_learning_rate_warms_up_peaks_and_ends_at_nothing():
    args = settings(lr=2.0, warmup=10)
    rates = [stage.learning_rate(step, 110, args) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert stage.learning_rate(0, 5, settings(lr=2.0, warmup=0)) == 2.0
    assert stage.learning_rate(4, 5, settings(lr=2.0, warmup=50)) == pytest.approx(0.2)


def scripted_fit(monkeypatch, losses: list[float], **changes) -> tuple[list[tuple], list[dict], int]:
    """Run fit() with scripted validation losses and no training; what was saved, the log, evaluations held."""
    losses, saved, log, left = iter(losses), [], [], len(losses)
    monkeypatch.setattr(stage, "validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(stage, "train_step", lambda *_: (1.5, 0.5))
    args = settings(**{"batch_size": 4, "log_every": 10 ** 6, **changes})
    stage.fit(random_model(), ragged(20), ragged(3), args, lambda *a: saved.append(a), log)
    return saved, log, left - len(list(losses))


def test_stops_after_patience_and_keeps_the_best(monkeypatch, capsys):
    saved, log, held = scripted_fit(monkeypatch, [5, 4, 4.5, 4.2, 3.9, 4, 3.9, 3.95, 1, 0], epochs=9, patience=3)
    assert [(step, metrics["valid_loss"]) for step, metrics in saved] == [(5, 5), (10, 4), (25, 3.9)]
    assert held == 8 and [row["valid_loss"] for row in log] == [5, 4, 4.5, 4.2, 3.9, 4, 3.9, 3.95]
    assert "stopped early" in capsys.readouterr().out


def test_evaluates_as_often_as_told_and_after_the_last_step(monkeypatch):
    saved, log, held = scripted_fit(monkeypatch, [3, 2, 1, 0, -1], epochs=2, evals_per_epoch=2, batch_size=3)
    assert held == 5 and [row["step"] for row in log] == [3, 6, 9, 12, 14]      # 7 steps an epoch, every third
    assert [step for step, _ in saved] == [3, 6, 9, 12, 14]


def test_log_rows_follow_the_schedule(monkeypatch):
    changes = dict(epochs=2, log_every=2, lr=1.0, warmup=4)
    _, log, _ = scripted_fit(monkeypatch, [2, 1], **changes)
    rows = [row for row in log if "lr" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert [row["lr"] for row in rows] == [
        stage.learning_rate(row["step"] - 1, 10, settings(**changes)) for row in rows]
    assert all(row["loss"] == 1.5 and row["grad_norm"] == 0.5 for row in rows)
    assert [row["step"] for row in log if "valid_loss" in row] == [5, 10]


def test_a_loss_that_is_no_number_stops_the_run(monkeypatch, capsys):
    assert_stops(capsys, scripted_fit, monkeypatch, [2, math.nan, 1, 1], words=("step 10", "--lr"))


def test_learns_eight_examples_by_heart():
    model = random_model().train()
    examples, args = ragged(8, seed=4), settings(lr=1e-2, weight_decay=0.0)
    optimizer = stage.make_optimizer(model, args)
    first = stage.validation_loss(model, examples, args)
    for _ in range(120):
        stage.train_step(model, optimizer, examples, args)
    assert stage.validation_loss(model, examples, args) < 0.1 < 3 < first


# ---------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------

QUICK = ("--epochs", 1, "--batch-size", 16, "--warmup", 2, "--log-every", 1)


def test_same_seed_same_weights_bit_for_bit(run, capsys):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        call(stage, "--run", run, "--tasks", "next", *QUICK, "--seed", seed, "--out", run / f"{name}.pt")
    one, two, other = (torch.load(run / f"{n}.pt", weights_only=True) for n in ("one", "two", "other"))
    assert all(torch.equal(weight, two["weights"][name]) for name, weight in one["weights"].items())
    assert not all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
    start = torch.load(run / "init.pt", weights_only=True)
    assert one["weights"].keys() == start["weights"].keys() and one["config"] == start["config"]
    assert one["sid"] == start["sid"] and one["tokenizer"] == start["tokenizer"]
    assert not torch.equal(one["weights"]["model.embed_tokens.weight"], start["weights"]["model.embed_tokens.weight"])

    expected = {"tasks": "next", "epochs": 1, "batch_size": 16, "warmup": 2, "seed": 1, "backbone": "tiny",
                "lr": stage.PRESETS["tiny"]["lr"], "dropout": stage.PRESETS["tiny"]["dropout"]}
    assert expected.items() <= one["args"].items() and one["stage"] == "sft"
    rows = [json.loads(line) for line in (run / "one_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))           # 120 samples, 16 a step
    assert all({"step", "loss", "lr", "tokens_per_second"} <= row.keys() for row in rows)
    assert one["metrics"]["valid_loss"] == rows[-1]["valid_loss"] and one["step"] == 8
    out = capsys.readouterr().out
    assert ">>" in out and "<<" in out and "device cpu" in out and "8 updates" in out

    items = tokenize_items.read_catalogue(run / "items.jsonl")
    model, tokenizer, _ = load_model(run / "one.pt", CPU, items)        # the figure is the saved weights' own
    known = {item["item_id"] for item in items}
    pairs = stage.task_pairs("next", {"items": items, "samples": tokenize_items.read_samples(run / "valid.jsonl", known)})
    loss = stage.validation_loss(model, stage.encode_examples(tokenizer, "next", pairs, 99), settings(precision="fast"))
    assert loss == pytest.approx(rows[-1]["valid_loss"], rel=1e-3)


def test_sft_of_the_pipeline(finished_run):
    checkpoint = torch.load(finished_run / "sft.pt", weights_only=True)
    assert checkpoint["stage"] == "sft" and checkpoint["args"]["tasks"] == stage.PRESETS["tiny"]["tasks"]
    rows = [json.loads(line) for line in (finished_run / "sft_log.jsonl").read_text().splitlines()]
    assert min(row["valid_loss"] for row in rows) == checkpoint["metrics"]["valid_loss"]


def test_goes_on_from_a_checkpoint_and_after_new_items(run, tmp_path):
    new = write_lines(tmp_path / "new.jsonl", [{"item_id": "new", "title": "Acme steel rod"}])
    call(tokenize_items, "--run", run, "--codebook", run / "codebook.pt", "--items", new)
    call(stage, "--run", run, "--from", run / "sft.pt", "--tasks", "text2token", *QUICK, "--out", run / "more.pt")
    assert torch.load(run / "more.pt", weights_only=True)["args"]["tasks"] == "text2token"


def test_another_catalogue_is_refused(run, capsys):
    lines = (run / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    before = (run / "sft.pt").read_bytes()
    items[0]["sid"], items[1]["sid"] = items[1]["sid"], items[0]["sid"]
    for other in (items, items[::-1], [json.loads(line) for line in lines[:-1]]):
        write_lines(run / "items.jsonl", other)
        assert_stops(capsys, call, stage, "--run", run, *QUICK, words=("init.pt", "another catalogue"))
    assert (run / "sft.pt").read_bytes() == before


def test_unknown_tasks_stop_before_a_model_is_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr(stage, "load_model", lambda *_: pytest.fail("loaded a model first"))
    for tasks in ("next,nonsense", "", "next,"):
        with pytest.raises(SystemExit) as stopped:
            call(stage, "--run", run, "--tasks", tasks)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and "error: " in line and "is not a task" in line and "title2sid" in line


def test_bad_input_is_one_line(run, tmp_path, capsys):
    files = {p.name: p.read_bytes() for p in run.iterdir()}
    for name, data in {"text": b"not a checkpoint\n", "empty": b"", "cut": files["init.pt"][:2000]}.items():
        (tmp_path / name).write_bytes(data)
    torch.save([1, 2], tmp_path / "list")
    torch.save({"weights": 1, "sid": 2}, tmp_path / "keys")
    for name in ("none", "text", "empty", "cut", "list", "keys"):
        assert_stops(capsys, call, stage, "--run", run, "--from", tmp_path / name, words=(tmp_path / name,))
    (run / "semantics.jsonl").unlink()
    assert_stops(capsys, call, stage, "--run", run, "--tasks", "text2token", words=("semantics.jsonl",))
    items = [{**json.loads(line), "description": ""} for line in files["items.jsonl"].decode().splitlines()]
    write_lines(run / "items.jsonl", items)
    assert_stops(capsys, call, stage, "--run", run, "--tasks", "next_description", words=("next_description",))
    (run / "valid.jsonl").write_text('{"user_id": "u", "history": [1], "target": 777}\n')
    assert_stops(capsys, call, stage, "--run", run, "--tasks", "next", words=("valid.jsonl, line 1", "777"))
    assert (run / "sft.pt").read_bytes() == files["sft.pt"]
    assert {p.name for p in run.iterdir()} | {"semantics.jsonl"} == set(files)


def test_as_a_user_sees_it(tmp_path):
    done = run_script("train.py", "--run", tmp_path / "none")
    assert_one_line_error(done, "items.jsonl", "cannot be read")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("flags", [
    ["--no-such-flag"], ["--precision", "half"], ["--epochs", "0"], ["--batch-size", "0"], ["--evals-per-epoch", "0"],
    ["--log-every", "0"], ["--patience", "0"], ["--max-response", "0"], ["--micro-tokens", "0"], ["--dropout", "1"],
    ["--tasks", "nxt"], ["--tasks", "next:0"], ["--tasks", "next:-1"], ["--tasks", "next:x"], ["--tasks", "next:inf"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_presets_set_what_the_flags_leave_open():
    open_flags = {k for k, v in vars(stage.parse_args([])).items() if v is None} - {"start", "out"}
    for name, preset in stage.PRESETS.items():
        assert open_flags <= set(preset), name
        assert set(stage.parse_tasks(preset["tasks"])) <= set(stage.TASKS)
    assert stage.parse_args(["--lr", "7"]).lr == 7
