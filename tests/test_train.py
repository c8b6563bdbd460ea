"""Stage 4: prompts, label masks, the loss against the naive one, accumulation, schedule, early stopping, errors."""
import collections
import json
import math
import random
import re

import evaluate
import pytest
import tokenize_items
import torch
import train as stage
from conftest import assert_one_line_error, assert_stops, call, random_model, run_script, write_lines
from init_embeddings import load_model, load_tokenizer, sid_digest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CPU = torch.device("cpu")
DATA = {
    "items": [{"item_id": 1, "title": "Steel rod", "description": "A long rod", "sid": ["<a_0>", "<b_1>", "<c_0>"]},
              {"item_id": "x", "title": "Blue wire", "description": "Copper", "sid": ["<a_1>", "<b_0>", "<c_1>"]}],
    "samples": [{"user_id": "u", "history": ["x", 1], "target": 1}],
    "users": [{"user_id": "u", "history": [1], "target": 1}],           # shuffled or not, the same
    "tokens": [{"token": "<a_1>", "description": "Wires of copper"}],
    "queries": [{"item_id": 1, "query": "a rod of steel", "split": "train"}]}
SID, TITLE, TEXT = "<a_0> <b_1> <c_0>", "Steel rod <eos>", "A long rod <eos>"
TWO = "<a_1><b_0><c_1>, <a_0><b_1><c_0>"
# Every template of every task, rendered with the first example, and the tokens that the loss counts; / is a line break.
TABLE = {
    "next": {f"The user has interacted with items {TWO} in chronological order. Can you predict the next possible item "
             "that the user may expect?": SID},
    "next_brief": {f"The user has interacted with items {TWO}": SID},
    "sequence": {"The user has interacted with items": f"{SID} , {SID}"},
    "basket": {"The user has interacted with items, in any order": f"{SID} , {SID}"},
    "title2sid": {"Which item has the title: Steel rod?": SID},
    "sid2title": {'What is the title of item "<a_0><b_1><c_0>"?': TITLE},
    "next_title": {f"The user has sequentially interacted with items {TWO}. Can you recommend the next item for him? "
                   "Tell me the title of the item.": TITLE},
    "next_description": {f"Please review the user's historical interactions: {TWO}, and describe what kind of item he "
                         "still needs.": TEXT},
    "text2token": {"Identify the specific SID token shared by items that exhibit the following scope and "
                   'characteristics: "Wires of copper"': "<a_1>"},
    "token2text": {"Describe the typical scope and shared features of items associated with the token: "
                   '"<a_1>"': "Wires of copper <eos>"},
    "description2sid": {"Can you tell me what item is described as A long rod?": SID},
    "text2sid": {"What item is called Steel rod and described as A long rod?": SID},
    "name_item": {"Could you please tell me what item <a_0><b_1><c_0> is called?": TITLE},
    "describe_item": {"Briefly describe item <a_0><b_1><c_0>.": TEXT},
    "sid2text": {"What is the title and description of item <a_0><b_1><c_0>?": "Steel rod / / " + TEXT},
    "retrieve": {
        f"The user has interacted with items {TWO} in chronological order. Can you predict the next possible item that "
        "the user may expect?": SID,
        f"Based on the items that the user has interacted with: {TWO}, can you determine what item would be "
        "recommended to the user next?": SID,
        f"Here is the item interaction history of the user: {TWO}, what to recommend to the user next?": SID},
    "titles2sid": {'The user has bought items with these titles, in chronological order: "Blue wire", "Steel rod". '
                   "Which item comes next?": SID},
    "search": {
        "As a recommender system, you are assisting a user who expresses a desire to obtain an item with the following "
        "characteristics: a rod of steel. Please recommend an item that meets these criteria.": SID,
        "The user wants a new item and searches for: a rod of steel. Please select a suitable item that matches the "
        "search intent.": SID,
        "Based on the user's current query a rod of steel, please generate an item that matches the user's "
        "intent.": SID},
}


def words_of(text: str) -> list[str]:
    """The tokens of a text as `word_tokenizer` shall see them: SID tokens, line breaks, and words."""
    return re.findall(r"<[abc]_\d>|\n|[^\s<>]+", text)


def word_tokenizer(pad: str = "<pad>", template: str | None = None, bos: str | None = None):
    """A tokenizer with one id per word, whose pieces a person can read; `template` adds BOS or EOS by itself."""
    words = sorted({w for row in TABLE.values() for texts in row.items() for text in texts for w in words_of(text)})
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
    vars(args).update({"precision": "float32", "rank": 0, "world": 1, **changes})
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

def first_pairs(name: str, data: dict = DATA) -> list[tuple[str, str]]:
    """What a task's first example becomes, by all of its templates."""
    return sorted({stage.task_pairs(name, data, str(seed))[0] for seed in range(40)})


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_label_mask_token_by_token(pad):
    tokenizer = word_tokenizer(pad)
    assert set(TABLE) == set(stage.TASKS)                               # a new task needs a row above
    rows = [(name, *pair) for name in TABLE for pair in first_pairs(name)]
    for name in TABLE:
        assert {instruction for n, instruction, _ in rows if n == name} == set(TABLE[name])
    examples = [stage.encode_examples(tokenizer, name, [pair], 99)[0] for name, *pair in rows]
    ids, labels = stage.collate(examples, CPU)                          # all in one batch, so most are padded
    for row, example, (name, instruction, _) in zip(range(len(ids)), examples, rows):
        tokens = tokenizer.convert_ids_to_tokens(ids[row, :len(example.ids)].tolist())
        counted = [False] + (labels[row] != -100).tolist()              # position t is judged on token t + 1
        shown = [f"[{token}]" if counted[t] else token for t, token in enumerate(tokens)]
        expected = words_of(instruction + "\n") + [f"[{token}]" for token in TABLE[name][instruction].split()]
        assert [token.replace("\n", "/") for token in shown] == [token.replace("\n", "/") for token in expected]
        assert not any(counted[len(example.ids):])                      # and never on padding
        assert "<unk>" not in tokens and example.task == name


def test_baskets_hold_the_same_items_in_an_order_of_the_seed():
    items = [{"item_id": n, "title": f"t{n}", "description": "", "sid": [f"<a_{n}>"]} for n in range(9)]
    data = {"items": items, "users": [{"user_id": "u", "history": list(range(8)), "target": 8}]}
    (_, in_order), = stage.task_pairs("sequence", data)
    assert in_order == ", ".join(f"<a_{n}>" for n in range(9))
    baskets = [stage.task_pairs("basket", data, seed)[0][1] for seed in ("42 0", "42 0", "42 1")]
    assert baskets[0] == baskets[1] != baskets[2]
    assert all(sorted(basket.split(", ")) == sorted(in_order.split(", ")) for basket in baskets)


def test_a_model_recommends_by_the_first_task_it_was_trained_on_that_does():
    tiny, hf = stage.PRESETS["tiny"]["tasks"], stage.PRESETS["hf"]["tasks"]
    expected = {tiny: "next_brief", hf: "next", stage.STAR_ALIGN: "next", "title2sid:0.5,retrieve,next": "retrieve"}
    assert {tasks: stage.recommends_by({"tasks": tasks}) for tasks in expected} == expected
    assert stage.recommends_by({"tasks": "title2sid", "recommends": "next_brief"}) == "next_brief"      # rl.py's
    assert stage.recommends_by({}) == "next"


def test_templates_are_drawn_by_the_seed():
    data = {**DATA, "samples": DATA["samples"] * 300}
    one, again, other = (stage.task_pairs("retrieve", data, seed) for seed in ("1", "1", "2"))
    assert one == again != other
    counts = collections.Counter(instruction for instruction, _ in one)
    assert set(counts) == set(TABLE["retrieve"]) and min(counts.values()) > 60
    assert set(stage.task_pairs("next", data, "1")) == set(stage.task_pairs("next", data, "2"))


def test_long_descriptions_are_cut_in_instructions_alone():
    words = [f"w{n}" for n in range(stage.DESCRIPTION_WORDS + 20)]
    data = {"items": [{**DATA["items"][0], "description": "  ".join(words)}]}
    cut = " ".join(words[:stage.DESCRIPTION_WORDS])
    assert stage.DESCRIPTION_WORDS == 100
    assert stage.task_pairs("description2sid", data) == [
        (f"Can you tell me what item is described as {cut}?", "<a_0><b_1><c_0>")]
    assert stage.task_pairs("text2sid", data)[0][0] == f"What item is called Steel rod and described as {cut}?"
    assert stage.task_pairs("describe_item", data)[0][1] == "  ".join(words)
    assert stage.task_pairs("sid2text", data)[0][1] == "Steel rod\n\n" + "  ".join(words)


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
    assert [name for name in TABLE if not stage.task_pairs(name, data)] == ["next_title", "next_description"]
    for name in ("title2sid", "sid2title", "description2sid", "text2sid", "name_item", "describe_item", "sid2text"):
        assert len(stage.task_pairs(name, data)) == 1                   # the other item
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

    def trained_on(name: str) -> list[list[int]]:
        pairs = stage.task_pairs(name, {"items": items, "samples": samples})
        return [e.ids[:e.start] for e in stage.encode_examples(tokenizer, name, pairs, 256)]
    trained = trained_on("next_brief")                                  # as the tiny backbone is
    assert len({tuple(p) for p in trained}) > 10

    def prompts_of(*flags) -> list[list[int]]:
        def caught(*args):
            raise Prompts(stage.prompt_ids(*args))
        monkeypatch.setattr(evaluate, "prompt_ids", caught)
        with pytest.raises(Prompts) as prompts:
            call(evaluate, "--run", run, *flags)
        return prompts.value.args[0]
    assert prompts_of("--split", "valid") == trained                    # with a real target
    assert prompts_of("--split", "valid", "--task", "next") == trained_on("next") != trained
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
        args = settings(micro_tokens=micro_tokens, clip=1e9)
        sums, norm = stage.train_step(stage.ResponseLoss(model), sgd, examples, args)
        loss = stage.loss_report(sums, {"next": 1.0})["loss"]
        results.append((loss, norm, model.state_dict()))
    assert results[0][0] == pytest.approx(naive_losses(random_model(), examples).mean().item(), abs=1e-5)
    for loss, norm, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6) and norm == pytest.approx(results[0][1], rel=1e-5)
        for name, weight in weights.items():
            assert torch.allclose(weight, results[0][2][name], atol=1e-6), name


def weighted_tasks(count: int = 9) -> tuple[list[stage.Example], dict[str, float]]:
    """Ragged examples of three tasks whose tokens count 1, 1/4 and 3."""
    weights = {"next": 1.0, "sid2title": 0.25, "search": 3.0}
    names = list(weights)
    return [e._replace(task=names[n % 3], weight=weights[names[n % 3]]) for n, e in enumerate(ragged(count))], weights


def test_task_weights_by_hand():
    """A batch's loss is sum(w * nll) / sum(w) over its supervised tokens, whatever its micro-batches."""
    assert stage.parse_tasks("next,sid2title:0.25") == {"next": 1.0, "sid2title": 0.25}
    examples, weights = weighted_tasks()
    total = count = 0.0
    each: dict[str, list] = {name: [] for name in weights}
    naive = random_model()
    for e in examples:
        losses = naive_losses(naive, [e])
        each[e.task] += losses.tolist()
        total, count = total + e.weight * losses.sum(), count + e.weight * len(losses)
    (total / count).backward()
    for micro_tokens in (10 ** 9, 40):
        model = random_model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        args = settings(micro_tokens=micro_tokens, clip=1e9)
        sums, _ = stage.train_step(stage.ResponseLoss(model), sgd, examples, args)
        report = stage.loss_report(sums, weights)
        assert report.pop("loss") == pytest.approx((total / count).item(), abs=1e-5)
        assert report == {f"loss/{name}": pytest.approx(sum(x) / len(x), abs=1e-5) for name, x in each.items()}
        for p, q in zip(model.parameters(), naive.parameters()):        # and so is what trains
            assert torch.allclose(p.grad, q.grad, atol=1e-5)


def test_loss_report_by_hand():
    sums = torch.zeros(len(stage.TASKS), 2)
    sums[list(stage.TASKS).index("next")] = torch.tensor([6.0, 3.0])
    sums[list(stage.TASKS).index("search")] = torch.tensor([10.0, 2.0])
    before = sums.clone()
    assert stage.loss_report(sums, {"next": 1.0, "search": 0.5}) == {
        "loss": (6 + 0.5 * 10) / (3 + 0.5 * 2), "loss/next": 2.0, "loss/search": 5.0}
    assert torch.equal(sums, before)


@pytest.mark.parametrize("count", [9, 1])
def test_processes_share_a_step(count):
    """What two processes compute one after the other: gradients average, sums add up, to those of one."""
    examples, weights = weighted_tasks(count)

    def step(**changes) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = random_model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        sums, _ = stage.train_step(stage.ResponseLoss(model), sgd, examples, settings(clip=1e9, **changes))
        return sums, [p.grad for p in model.parameters()]
    sums, gradients = step()
    for micro_tokens in (10 ** 9, 40):
        shares = [step(rank=rank, world=2, micro_tokens=micro_tokens) for rank in range(2)]
        assert torch.allclose(shares[0][0] + shares[1][0], sums, atol=1e-4)
        for whole, one, two in zip(gradients, *(share[1] for share in shares)):
            assert torch.allclose((one + two) / 2, whole, atol=1e-5)


def test_gradients_are_clipped():
    model, before = random_model(), random_model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    _, norm = stage.train_step(stage.ResponseLoss(model), sgd, ragged(), settings(clip=0.01))
    moved = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), before.parameters())) ** 0.5
    assert norm > 0.1 and float(moved.detach()) == pytest.approx(0.01, rel=1e-3)


def test_validation_loss_is_the_mean_over_tokens():
    model, examples = random_model(), ragged(12)
    expected = naive_losses(model, examples).mean().item()
    for micro_tokens in (10 ** 9, 40):
        loss_of = stage.ResponseLoss(model)
        value = stage.validation_loss(loss_of, examples, settings(micro_tokens=micro_tokens))
        assert value == pytest.approx(expected, abs=1e-5)
    assert loss_of.training and model.training and all(p.grad is None for p in model.parameters())


def test_weight_decay_is_for_matrices_only():
    model = random_model("qwen2", tied=False)
    groups = stage.make_optimizer(model, settings(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in model.parameters()}
    for changes in ({"stage": "align"}, {"lora": 4}):                   # it would move the rows that are masked
        groups = stage.make_optimizer(model, settings(weight_decay=0.3, **changes)).param_groups
        assert {group["weight_decay"] for group in groups} == {0.0}


def test_gradient_checkpointing_changes_memory_alone():
    plain, model, batch = random_model(), random_model(), stage.collate(ragged(), CPU)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (plain, model.train()):
        stage.response_loss(m, *batch).mean().backward()
    for p, q in zip(plain.parameters(), model.parameters()):
        assert torch.equal(p.grad, q.grad)


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


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_a_batch(world):
    """Together the whole batch exactly once, and every process as many pieces; what fills up weighs nothing."""
    for examples in (ragged(50), ragged(5), ragged(1), ragged(20) + [stage.Example("next", [1] * 200, 190)]):
        for limit in (1, 64, 10 ** 6):
            shares = [stage.micro_batches(examples, limit, rank, world) for rank in range(world)]
            pieces = [piece for share in shares for piece in share]
            live = [piece for piece in pieces if any(e.weight for e in piece)]
            assert sorted(e for piece in live for e in piece) == sorted(examples)
            assert len({len(share) for share in shares}) == 1 and len(pieces) - len(live) < world
            assert all(len(piece) == 1 for piece in pieces if piece not in live)
            for piece in live:
                assert len(piece) == 1 or len(piece) * max(len(e.ids) for e in piece) <= limit
    alike = [stage.Example("next", [n] * 9, 6) for n in range(3 * world)]
    shares = [stage.micro_batches(alike, 10 ** 6, rank, world) for rank in range(world)]
    assert [[len(piece) for piece in share] for share in shares] == [[3]] * world       # nobody idles


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


@pytest.mark.parametrize("kind", ["random", "collapsed"])
def test_geometry_equals_brute_force(kind):
    rng, g = random.Random(0), torch.Generator().manual_seed(1)
    items = [{"sid": [f"<{level}_{rng.randrange(5)}>" for level in "abc"]} for _ in range(40)]
    parents = stage.find_parents(items)
    assert len(parents) == 15
    for token, above in parents.items():
        level = "abc".index(token[1])
        assert above == {tuple(item["sid"][:level]) for item in items if item["sid"][level] == token}
    rows = torch.randn(len(parents), 6, generator=g)
    if kind == "collapsed":
        rows = torch.ones_like(rows) + 1e-4 * rows
    found = stage.geometry(rows.requires_grad_(), list(parents.values()))
    rows, names = rows.detach().double(), list(parents)

    singular = torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0).sqrt()
    share = [float(x / singular.sum()) for x in singular if x > 0]
    assert found["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-3)
    cosine = [[float(x @ y / x.norm() / y.norm()) for y in rows] for x in rows]
    pairs = [cosine[i][j] for i in range(15) for j in range(15) if i != j]
    assert found["cosine"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    if kind == "collapsed":
        assert found["effective_rank"] < 1.01 and found["cosine"] > 0.9999
        return
    hits = [bool(parents[names[max((j for j in range(15) if j != i), key=lambda j: cosine[i][j])]] & parents[names[i]])
            for i in range(15) if names[i][1] != "a"]
    assert found["siblings"] == pytest.approx(sum(hits) / len(hits)) and 0 < sum(hits) < len(hits)


def test_align_holds_out_other_items_of_each_task():
    names = stage.STAR_ALIGN.split(",")
    tasks = {name: [stage.Example(name, [n], 0) for n in range(45)] for name in names}
    train, valid = stage.split_examples(tasks, settings(stage="align"))
    assert sorted(train + valid) == sorted(e for examples in tasks.values() for e in examples)
    held = {name: [e.ids[0] for e in valid if e.task == name] for name in names}
    assert held == {name: [n for n in range(45) if n % 20 == t] for t, name in enumerate(names)}
    everything = sum(held.values(), [])
    assert len(everything) == len(set(everything)) == 17
    assert stage.split_examples(tasks, settings()) == ([e for examples in tasks.values() for e in examples], [])


GEOMETRY = {"effective_rank": 2.0, "cosine": 0.5, "siblings": 0.25}


def scripted_fit(monkeypatch, losses: list[float], leave_at: int = 0, norm: float = 0.5,
                 **changes) -> tuple[list[tuple], list[dict], int]:
    """Run fit() with scripted validation losses and no training; what was saved as best, the log, evaluations held."""
    losses, saved, at, left, steps = iter(losses), [], stage.Progress(), len(losses), []
    sums = torch.zeros(len(stage.TASKS), 2)
    sums[list(stage.TASKS).index("next")] = torch.tensor([6.0, 4.0])
    monkeypatch.setattr(stage, "validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(stage, "train_step", lambda *_: steps.append(at.step) or (sums, norm))
    monkeypatch.setattr(stage, "on_interrupt", lambda: lambda device: at.step == leave_at)
    args = settings(**{"batch_size": 4, "log_every": 10 ** 6, "save_every": 10 ** 6, **changes})
    saves = []

    def save(better: bool) -> None:
        saves.append(at.step)
        if better:
            saved.append((at.step, {"valid_loss": at.best}))
    finished = stage.fit(stage.ResponseLoss(random_model()), torch.optim.SGD([torch.zeros(1)]), lambda epoch: ragged(20),
                         ragged(3), {"next": 1.0}, args, at, lambda: GEOMETRY, save)
    assert finished == (not leave_at) and steps == list(range(1, len(steps) + 1))
    assert at.log[0] == {"step": 0, **GEOMETRY}
    expected = [row["step"] for row in at.log[1:] if "valid_loss" in row]
    every = [n for n in steps if n % args.save_every == 0]
    assert saves == sorted({*expected, *every, *([leave_at] if leave_at else [])})
    return saved, at.log[1:], left - len(list(losses))


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
    assert all(row["loss"] == row["loss/next"] == 1.5 and row["grad_norm"] == 0.5 for row in rows)
    assert all(GEOMETRY.items() <= row.items() for row in rows)
    assert [row["step"] for row in log if "valid_loss" in row] == [5, 10]


def test_saves_as_often_as_told_and_when_interrupted(monkeypatch):
    scripted_fit(monkeypatch, [2, 1], epochs=2, save_every=3)                   # 3, 5, 6, 9, 10: asserted within
    for step in (4, 5, 10):
        saved, log, held = scripted_fit(monkeypatch, [2, 1], leave_at=step, epochs=2)
        assert held == len(saved) == step // 5 and len(log) == held


def test_a_loss_that_is_no_number_stops_the_run(monkeypatch, capsys):
    assert_stops(capsys, scripted_fit, monkeypatch, [2, math.nan, 1, 1], words=("step 10", "--lr"))
    assert_stops(capsys, scripted_fit, monkeypatch, [2, 1], 0, math.nan, words=("gradient of step 1 ", "--lr"))


def test_weights_that_the_loss_leaves_out_do_not_train():
    """BERT's head transform; DistributedDataParallel would wait for its gradients."""
    model = random_model("bert", is_decoder=True)
    loss_of = stage.spread(model, 1, False)
    loss_of(*stage.collate(ragged(), CPU)).mean().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == ("cls.predictions" not in name or "decoder.weight" in name)


def test_learns_eight_examples_by_heart():
    loss_of = stage.ResponseLoss(random_model()).train()
    examples, args = ragged(8, seed=4), settings(lr=1e-2, weight_decay=0.0)
    optimizer = stage.make_optimizer(loss_of.model, args)
    first = stage.validation_loss(loss_of, examples, args)
    for _ in range(120):
        stage.train_step(loss_of, optimizer, examples, args)
    assert stage.validation_loss(loss_of, examples, args) < 0.1 < 3 < first


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
    assert [row["step"] for row in rows] == list(range(9))              # 120 samples, 16 a step
    shape = {"effective_rank", "cosine", "siblings"}
    assert rows[0].keys() == {"step"} | shape
    assert all({"step", "loss", "loss/next", "lr", "grad_norm", "tokens_per_second", "supervised_per_second"} | shape
               <= row.keys() for row in rows[1:])
    assert all(row["loss"] == row["loss/next"] for row in rows[1:])
    assert one["metrics"]["valid_loss"] == rows[-1]["valid_loss"] and one["step"] == 8
    out = capsys.readouterr().out
    assert ">>" in out and "<<" in out and "device cpu" in out and "8 updates" in out

    items = tokenize_items.read_catalogue(run / "items.jsonl")
    model, tokenizer, _ = load_model(run / "one.pt", CPU, items)        # the figure is the saved weights' own
    known = {item["item_id"] for item in items}
    samples = tokenize_items.read_samples(run / "valid.jsonl", known)
    pairs = stage.task_pairs("next", {"items": items, "samples": samples})
    valid = stage.encode_examples(tokenizer, "next", pairs, 99)
    loss = stage.validation_loss(stage.ResponseLoss(model), valid, settings(precision="fast"))
    assert loss == pytest.approx(rows[-1]["valid_loss"], rel=1e-3)


def test_sft_of_the_pipeline(finished_run):
    checkpoint = torch.load(finished_run / "sft.pt", weights_only=True)
    assert checkpoint["stage"] == "sft" and checkpoint["args"]["tasks"] == stage.PRESETS["tiny"]["tasks"]
    rows = [json.loads(line) for line in (finished_run / "sft_log.jsonl").read_text().splitlines()]
    losses = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert min(losses) == checkpoint["metrics"]["valid_loss"] and len(losses) == 2
    assert not list(finished_run.glob("*_resume.pt"))


def test_goes_on_from_a_checkpoint_and_after_new_items(run, tmp_path):
    new = write_lines(tmp_path / "new.jsonl", [{"item_id": "new", "title": "Acme steel rod"}])
    call(tokenize_items, "--run", run, "--codebook", run / "codebook.pt", "--items", new)
    digest, saved = sid_digest(tokenize_items.read_catalogue(run / "items.jsonl")), {}
    lines = (run / "train.jsonl").read_text()
    for tasks, more in (("text2token", ""), ("next_brief", ""), (
            "next_brief", json.dumps({"user_id": "u", "history": [1], "target": "new"}) + "\n")):
        (run / "train.jsonl").write_text(lines + more)
        call(stage, "--run", run, "--from", run / "sft.pt", "--tasks", tasks, *QUICK, "--out", run / "more.pt")
        saved[tasks, more] = torch.load(run / "more.pt", weights_only=True)
        assert saved[tasks, more]["args"]["tasks"] == tasks
        assert (saved[tasks, more]["sid"]["num_items"], saved[tasks, more]["sid"]["digest"]) == (61, digest)
    assert [s["sid"]["new_items"] for s in saved.values()] == [["new"], ["new"], []]    # new until it was a target
    assert torch.load(run / "sft.pt", weights_only=True)["sid"]["num_items"] == 60


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
    for wrong in ({"token": "<a_99>"}, {"token": 3}, {"description": None}, {"token": ["<a_1>"]}):
        write_lines(run / "semantics.jsonl", [{"token": "<a_1>", "description": "Rods."} | wrong])
        assert_stops(capsys, call, stage, "--run", run, "--tasks", "text2token", words=("semantics.jsonl, line 1",))
    for out, word in ((tmp_path, "is a folder"), (tmp_path / "text" / "out.pt", "cannot be written")):
        (run / "valid.jsonl").write_bytes(files["valid.jsonl"])
        assert_stops(capsys, call, stage, "--run", run, "--tasks", "next", "--out", out, words=(out, word))
    assert (run / "sft.pt").read_bytes() == files["sft.pt"]
    assert {p.name for p in run.iterdir()} == set(files)


def test_tasks_without_examples_stop_only_if_named(run, capsys):
    items = [{**item, "description": ""} for item in tokenize_items.read_catalogue(run / "items.jsonl")]
    write_lines(run / "items.jsonl", items)
    call(stage, "--run", run, "--stage", "align", "--epochs", 1, "--out", run / "align.pt")     # STAR's six tasks
    out = capsys.readouterr().out
    assert "describe_item | 0 examples" in out and "example     title2sid" in out
    assert_stops(capsys, call, stage, "--run", run, "--stage", "align", "--tasks", "title2sid,describe_item",
                 words=("--tasks", "describe_item"))


def test_as_a_user_sees_it(tmp_path):
    done = run_script("train.py", "--run", tmp_path / "none")
    assert_one_line_error(done, "items.jsonl", "cannot be read")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("flags", [
    ["--no-such-flag"], ["--precision", "half"], ["--epochs", "0"], ["--batch-size", "0"], ["--evals-per-epoch", "0"],
    ["--log-every", "0"], ["--patience", "0"], ["--max-response", "0"], ["--micro-tokens", "0"], ["--dropout", "1"],
    ["--tasks", "nxt"], ["--tasks", "next:0"], ["--tasks", "next:-1"], ["--tasks", "next:x"], ["--tasks", "next:inf"],
    ["--stage", "both"], ["--save-every", "0"], ["--lora", "-1"], ["--lora", "2", "--lora-dropout", "1"],
    ["--lora-dropout", "-0.1"], ["--stage", "align", "--lora", "2"], ["--lr", "-1"], ["--lr", "nan"], ["--clip", "-1"],
    ["--warmup", "-3"], ["--beta2", "1"], ["--lora-alpha", "inf"], ["--seed", "-1"], ["--seed", str(2 ** 70)],
    ["--epochs", "1.5"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("torchrun, flags, word", [
    (False, [], "torchrun"), (True, ["--lora", "2"], "exclude"), (True, ["--stage", "align"], "exclude")])
def test_shards_need_several_processes_and_all_weights(torchrun, flags, word, monkeypatch, capsys):
    if torchrun:
        monkeypatch.setenv("RANK", "0")
        assert stage.parse_args(["--fsdp"]).fsdp
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(["--fsdp", *flags])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in line and "--fsdp" in line and word in line


def test_presets_set_what_the_flags_leave_open(tmp_path):
    open_flags = {k for k, v in vars(stage.parse_args([])).items() if v is None} - {"start", "out"}
    for backbone in ("tiny", "Qwen/Qwen2.5-1.5B"):
        for name in ("sft", "align"):
            args = stage.parse_args(["--run", str(tmp_path), "--stage", name])
            weights = stage.fill_in(args, backbone)
            preset = stage.PRESETS["tiny" if backbone == "tiny" else "hf"]
            preset = preset | stage.PRESETS["align"] if name == "align" else preset
            assert {key: getattr(args, key) for key in open_flags} == preset and args.backbone == backbone
            assert set(weights) <= set(stage.TASKS) and weights == stage.parse_tasks(preset["tasks"])
    assert (args.epochs, args.lr, args.batch_size, args.weight_decay) == (10, 1e-3, 16, 0)       # STAR, A.4
    assert set(weights) == {"title2sid", "description2sid", "text2sid", "name_item", "describe_item", "sid2text"}
    args = stage.parse_args(["--run", str(tmp_path), "--lr", "7", "--tasks", "next"])
    assert stage.fill_in(args, "tiny") == {"next": 1.0} and args.lr == 7


def test_queries_bring_the_search_task_with_them(run, capsys):
    rows = [{"item_id": 3, "query": "a rope", "split": "train"}, {"item_id": 4, "query": "a beaker", "split": "test"}]
    write_lines(run / "queries.jsonl", rows)
    items = tokenize_items.read_catalogue(run / "items.jsonl")
    weights = stage.fill_in(stage.parse_args(["--run", str(run)]), "tiny")
    assert weights["search"] == 1 and stage.read_data(run, items, weights)["queries"] == rows[:1]
    assert "search" not in stage.fill_in(stage.parse_args(["--run", str(run), "--stage", "align"]), "tiny")
    for wrong in ({"item_id": 777, "query": "a rope"}, {"item_id": 3, "query": 777}):
        write_lines(run / "queries.jsonl", [*rows, {**wrong, "split": "train"}])
        assert_stops(capsys, stage.read_data, run, items, weights, words=("queries.jsonl, line 3", "777"))
