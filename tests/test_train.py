"""Stage 4: prompts, label mask, the loss against the naive one, batches, schedule, the loop, errors."""
import collections
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import evaluate
import tokenize_items
import train as stage
from conftest import assert_stops, call, random_model, toy_interactions, write_lines
from init_embeddings import check_lengths, load_model, load_tokenizer, sid_digest

CPU = torch.device("cpu")
DATA = {
    "items": [
        {"item_id": 1, "title": "Steel rod", "description": "A long rod", "sid": ["<a_0>", "<b_1>", "<c_0>"]},
        {"item_id": "x", "title": "Blue wire", "description": "Copper", "sid": ["<a_1>", "<b_0>", "<c_1>"]}],
    "samples": [{"user_id": "u", "history": ["x", 1], "target": 1}],
    "users": [{"user_id": "u", "items": [1, 1]}],                       # the same in any order
    "tokens": [{"token": "<a_1>", "description": "Wires of copper"}],
    "queries": [{"item_id": 1, "query": "a rod of steel", "split": "train"}]}
SID, TITLE, TEXT = "<a_0> <b_1> <c_0>", "Steel rod <eos>", "A long rod <eos>"
TWO = "<a_1><b_0><c_1>, <a_0><b_1><c_0>"
# Every template of every task, rendered with the first example, and the tokens that the loss counts.
TABLE = {
    "next": {f"The user has interacted with items {TWO} in chronological order. Can you predict the next "
             "possible item that the user may expect?": SID},
    "next_brief": {f"The user has interacted with items {TWO}": SID},
    "sequence": {"The user has interacted with items": f"{SID} , {SID}"},
    "basket": {"The user has interacted with items, in any order": f"{SID} , {SID}"},
    "title2sid": {"Which item has the title: Steel rod?": SID},
    "sid2title": {'What is the title of item "<a_0><b_1><c_0>"?': TITLE},
    "next_title": {f"The user has sequentially interacted with items {TWO}. Can you recommend the next item "
                   "for him? Tell me the title of the item.": TITLE},
    "next_description": {f"Please review the user's historical interactions: {TWO}, and describe what kind "
                         "of item he still needs.": TEXT},
    "text2token": {"Identify the specific SID token shared by items that exhibit the following scope and "
                   'characteristics: "Wires of copper"': "<a_1>"},
    "token2text": {"Describe the typical scope and shared features of items associated with the token: "
                   '"<a_1>"': "Wires of copper <eos>"},
    "description2sid": {"Can you tell me what item is described as A long rod?": SID},
    "text2sid": {"What item is called Steel rod and described as A long rod?": SID},
    "name_item": {"Could you please tell me what item <a_0><b_1><c_0> is called?": TITLE},
    "describe_item": {"Briefly describe item <a_0><b_1><c_0>.": TEXT},
    "sid2text": {"What is the title and description of item <a_0><b_1><c_0>?": f"Steel rod \n \n {TEXT}"},
    "retrieve": {
        f"The user has interacted with items {TWO} in chronological order. Can you predict the next possible "
        "item that the user may expect?": SID,
        f"Based on the items that the user has interacted with: {TWO}, can you determine what item would be "
        "recommended to the user next?": SID,
        f"Here is the item interaction history of the user: {TWO}, what to recommend to the user next?": SID},
    "titles2sid": {'The user has bought items with these titles, in chronological order: "Blue wire", "Steel '
                   'rod". Which item comes next?': SID},
    "search": {
        "As a recommender system, you are assisting a user who expresses a desire to obtain an item with the "
        "following characteristics: a rod of steel. Please recommend an item that meets these criteria.": SID,
        "The user wants a new item and searches for: a rod of steel. Please select a suitable item that "
        "matches the search intent.": SID,
        "Based on the user's current query a rod of steel, please generate an item that matches the user's "
        "intent.": SID},
}


def words_of(text: str) -> list[str]:
    """The tokens of a text as `word_tokenizer` shall see them: SID tokens, line breaks, and words."""
    return re.findall(r"<[abc]_\d>|\n|<eos>|[^\s<>]+", text)


def word_tokenizer(pad: str = "<pad>", template: str | None = None, bos: str | None = None):
    """A tokenizer with one id per word; `template` adds BOS or EOS by itself."""
    texts = [text for rows in TABLE.values() for row in rows.items() for text in row]
    words = sorted({word for text in texts for word in words_of(text) if word[0] not in "<\n"})
    names = ["<pad>", "<eos>", "<s>", "<unk>", *words, "\n"]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 2), ("<eos>", 1)])
    tokenizer.add_tokens([f"<{level}_{code}>" for level in "abc" for code in range(2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad,
                                   unk_token="<unk>", bos_token=bos)


def ragged(count: int = 11, seed: int = 0, rows: int = 97) -> list[stage.Example]:
    """Examples of random ids; id 0, EOS and padding, occurs in prompts and ends every other response."""
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


def checkpoint(path) -> dict:
    return torch.load(path, weights_only=True)


def log_of(path) -> list[dict]:
    return [json.loads(line) for line in path.with_name(f"{path.stem}_log.jsonl").read_text().splitlines()]


# ---- Prompts, responses and the label mask -------------------------------------------------------

def texts_of(name: str, data: dict = DATA, seed: str = "") -> list[tuple[str, str]]:
    return [(pair.instruction, pair.response) for pair in stage.make_pairs(name, data, seed)]


def first_example(tokenizer, name: str, max_response: int) -> stage.Example:
    return stage.make_examples(tokenizer, name, DATA, max_response)[0]


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_label_mask_token_by_token(pad):
    tokenizer = word_tokenizer(pad)
    assert set(TABLE) == set(stage.TASKS)                               # a new task needs a row above
    names, examples, expected = [], [], []
    for name, table in TABLE.items():
        drawn = {texts_of(name, DATA, str(seed))[0][0]: str(seed) for seed in range(40)}
        assert drawn.keys() == table.keys()                             # all of its templates
        for instruction, seed in drawn.items():
            names.append(name)
            examples.append(stage.make_examples(tokenizer, name, DATA, 99, len(name), seed)[0])
            response = [f"[{token}]" for token in words_of(table[instruction])]
            expected.append(words_of(instruction + "\n") + response)

    batch = stage.collate(examples, CPU)                                # all in one, so most are padded
    assert batch.ids.shape[1] % 8 == 0
    for row, (name, example) in enumerate(zip(names, examples)):
        tokens = tokenizer.convert_ids_to_tokens(batch.ids[row, :len(example.ids)].tolist())
        counted = [False] + (batch.labels[row] != -100).tolist()        # position t is judged on token t + 1
        shown = [f"[{token}]" if counted[t] else token for t, token in enumerate(tokens)]
        assert shown == expected[row]
        assert not any(counted[len(example.ids):])                      # and never on padding
        assert "<unk>" not in tokens and example.task == name
    supervised = [name for name, e in zip(names, examples) for _ in e.ids[e.start:]]
    assert [stage.TASK_NAMES[n] for n in batch.tasks.tolist()] == supervised
    assert batch.weights.tolist() == [len(name) for name in supervised]


def test_collate_equals_a_naive_loop():
    examples = ragged(9)
    batch = stage.collate(examples, CPU)
    for row, example in enumerate(examples):
        for t in range(batch.ids.shape[1]):
            counts = t + 1 < len(example.ids) and t + 1 >= example.start
            assert batch.labels[row, t] == (example.ids[t + 1] if counts else -100)
            assert t >= len(example.ids) or batch.ids[row, t] == example.ids[t]
    assert (batch.labels != -100).sum() == sum(len(e.ids) - e.start for e in examples)


def test_baskets_hold_the_same_items_in_an_order_of_the_seed():
    items = [{"item_id": n, "title": f"t{n}", "description": "", "sid": [f"<a_{n}>"]} for n in range(9)]
    data = {"items": items, "users": [{"user_id": "u", "items": list(range(9))}]}
    (_, in_order), = texts_of("sequence", data)
    assert in_order == ", ".join(f"<a_{n}>" for n in range(9))
    baskets = [texts_of("basket", data, seed)[0][1] for seed in ("42 0", "42 0", "42 1")]
    assert baskets[0] == baskets[1] != baskets[2]
    assert all(sorted(basket.split(", ")) == sorted(in_order.split(", ")) for basket in baskets)


def test_a_model_recommends_by_the_first_task_it_was_trained_on_that_does():
    alone = {name for name in stage.TASKS if filled_in("tiny", "--tasks", name).recommends == name}
    assert alone == {"next", "next_brief", "retrieve"}
    assert filled_in("tiny").recommends == "next_brief"
    assert filled_in("Qwen/Qwen2.5-1.5B").recommends == "next"
    for tasks, expected in (("title2sid,retrieve,next", "retrieve"), ("next_title,titles2sid", "next")):
        assert filled_in("tiny", "--tasks", tasks).recommends == expected
    text = {name for name, task in stage.TASKS.items() if task.is_text}
    assert text == {"sid2title", "next_title", "next_description", "token2text", "name_item", "describe_item",
                    "sid2text"}


def test_templates_are_drawn_by_the_seed():
    data = {**DATA, "samples": DATA["samples"] * 300}
    one, again, other = (texts_of("retrieve", data, seed) for seed in ("1", "1", "2"))
    assert one == again != other
    counts = collections.Counter(instruction for instruction, _ in one)
    assert set(counts) == set(TABLE["retrieve"]) and min(counts.values()) > 60
    assert texts_of("next", data, "1") == texts_of("next", data, "2")


def test_long_descriptions_are_cut_in_instructions_alone():
    words = [f"w{n}" for n in range(stage.DESCRIPTION_WORDS + 20)]
    data = {"items": [{**DATA["items"][0], "description": "  ".join(words)}]}
    cut = " ".join(words[:stage.DESCRIPTION_WORDS])
    assert stage.DESCRIPTION_WORDS == 100
    assert texts_of("description2sid", data) == [
        (f"Can you tell me what item is described as {cut}?", "<a_0><b_1><c_0>")]
    assert texts_of("text2sid", data)[0][0] == f"What item is called Steel rod and described as {cut}?"
    assert texts_of("describe_item", data)[0][1] == "  ".join(words)
    assert texts_of("sid2text", data)[0][1] == "Steel rod\n\n" + "  ".join(words)


def test_a_long_text_is_cut_without_eos_and_a_sid_never_is():
    tokenizer = word_tokenizer()
    for name, kept in (("next_description", ["A", "long"]), ("token2text", ["Wires", "of"])):
        example = first_example(tokenizer, name, 2)
        assert tokenizer.convert_ids_to_tokens(example.ids[example.start:]) == kept
    assert first_example(tokenizer, "token2text", 4).ids[-1] == tokenizer.eos_token_id
    for name in ("next", "title2sid"):
        example = first_example(tokenizer, name, 1)
        assert len(example.ids) - example.start == 3


def test_examples_without_text_are_left_out_and_braces_are_text():
    blank, braces = {"title": " ", "description": ""}, {"title": "{sid} {x} 5%"}
    items = [DATA["items"][0] | blank, DATA["items"][1] | braces]
    data = {**DATA, "items": items}
    assert [name for name in TABLE if not texts_of(name, data)] == ["next_title", "next_description"]
    for name, task in stage.TASKS.items():
        if task.source == "items":
            assert [pair.row for pair in stage.make_pairs(name, data)] == items[1:]
    assert texts_of("title2sid", data) == [("Which item has the title: {sid} {x} 5%?", "<a_1><b_0><c_1>")]
    assert stage.make_examples(word_tokenizer(), "next_title", data, 99) == []


@pytest.mark.parametrize("template, bos, first", [
    (None, None, []), (None, "<s>", []), ("<s> $A", "<s>", [2]), ("<s> $A <eos>", "<s>", [2]),
    ("$A <eos>", None, [])])
def test_bos_where_the_tokenizer_adds_one(template, bos, first):
    tokenizer = word_tokenizer(template=template, bos=bos)
    again = load_tokenizer(tokenizer.backend_tokenizer.to_str(),        # as it comes out of a checkpoint
                           {"bos_token": bos, "eos_token": "<eos>", "pad_token": "<pad>"})
    plain = stage.prompt_ids(word_tokenizer(), ["Which item", "the title"])
    for t in (tokenizer, again):
        assert stage.prompt_ids(t, ["Which item", "the title"]) == [first + ids for ids in plain]
        example = first_example(t, "sid2title", 99)
        assert t.convert_ids_to_tokens(example.ids[example.start:]) == ["Steel", "rod", "<eos>"]
        assert example.ids.count(2) == len(first)


class Prompts(Exception):
    """Carries the prompts out of evaluate.main()."""


def test_evaluation_reads_the_prompts_of_training_id_for_id(run, monkeypatch):
    items = tokenize_items.read_catalogue(run / "items.jsonl")
    samples = tokenize_items.read_samples(run / "valid.jsonl", {item["item_id"] for item in items})
    _, tokenizer, _ = load_model(run / "init.pt", CPU, items)

    def trained_on(name: str) -> list[list[int]]:
        examples = stage.make_examples(tokenizer, name, {"items": items, "samples": samples}, 256)
        return [e.ids[:e.start] for e in examples]
    trained = trained_on("next_brief")                                  # as the tiny backbone is
    assert len({tuple(p) for p in trained}) > 10

    def prompts_of(*flags) -> list[list[int]]:
        def caught(*args):
            raise Prompts(stage.prompt_ids(*args))
        monkeypatch.setattr(evaluate, "prompt_ids", caught)
        with pytest.raises(Prompts) as prompts:
            call(evaluate, "--run", run, *flags)
        return prompts.value.args[0]
    assert prompts_of("--split", "valid") == trained                    # with a target
    assert prompts_of("--split", "valid", "--task", "next") == trained_on("next") != trained
    history = ",".join(map(str, samples[3]["history"]))
    assert prompts_of("--history", history) == [trained[3]]             # without one


# ---- Data: users' sequences, what is held out, lengths -------------------------------------------

@pytest.mark.parametrize("length, max_history", [(30, 10), (130, 10), (130, 1), (130, 60)])
def test_no_transition_of_a_user_is_left_out_and_none_is_invented(length, max_history):
    items = {"u": list(range(length)), "v": list(range(length))[::-1]}
    users = [{"user_id": u, "items": items[u], "timestamps": list(range(length))} for u in items]
    for split in ("leave-one-out", "chronological"):
        samples = tokenize_items.split_samples(users, split)["train"]
        last = {sample["user_id"]: len(sample["history"]) for sample in samples}
        for sample in samples:
            sample["history"] = sample["history"][-max_history:]
        rows = stage.user_sequences(samples)
        for u in users:
            own, whole = [row["items"] for row in rows if row["user_id"] == u["user_id"]], u["items"]
            found = {pair for piece in own for pair in zip(piece, piece[1:])}
            end = last[u["user_id"]] + 1                                # its last training target
            assert found == set(zip(whole[:end], whole[1:end]))
            assert max(map(len, own)) <= stage.MAX_SEQUENCE and (length > 50 or own == [whole[:end]])


def test_the_toy_users_are_whole(finished_run):
    items = tokenize_items.read_catalogue(finished_run / "items.jsonl")
    data = stage.read_data(finished_run, items, {"basket": 1.0})
    expected = [{"user_id": user["user_id"], "items": user["items"][:-2]} for user in toy_interactions()]
    assert data["users"] == expected                                    # the last two: validation and test


def test_samples_that_do_not_continue_start_a_new_sequence():
    parts = [([1, 2], 3), ([2, 3], 4), ([7, 8], 9), ([9], 1), ([4, 9], 5)]
    samples = [{"user_id": "u", "history": history, "target": target} for history, target in parts]
    assert [row["items"] for row in stage.user_sequences(samples)] == [[1, 2, 3, 4], [7, 8, 9, 1], [4, 9, 5]]


def test_align_holds_out_every_20th_example_of_each_task(finished_run, tmp_path, monkeypatch):
    trained, validated, batches_of = [], [], stage.epoch_batches
    monkeypatch.setattr(stage, "epoch_batches", lambda rows, *_: trained.extend(rows) or batches_of(rows, *_))
    monkeypatch.setattr(stage, "validation_loss", lambda loss_of, rows, *_: validated.extend(rows) or 1.0)
    call(stage, "--run", finished_run, "--stage", "align", "--tasks", "title2sid,name_item", "--epochs", 1,
         "--batch-size", 1000, "--out", tmp_path / "align.pt")
    items = tokenize_items.read_catalogue(finished_run / "items.jsonl")
    _, tokenizer, _ = load_model(finished_run / "init.pt", CPU, items)
    for name in ("title2sid", "name_item"):
        rows = stage.make_examples(tokenizer, name, {"items": items}, 128)
        assert [e for e in validated if e.task == name] == rows[::20]
        assert [e for e in trained if e.task == name] == [e for n, e in enumerate(rows) if n % 20]


def test_lengths_are_checked_against_positions_and_the_window_in_search_alone(capsys):
    full = random_model("llama").config                                 # 256 positions
    windows = [random_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0).config,
               random_model("mistral", sliding_window=8).config,
               random_model("gemma3_text", head_dim=8, sliding_window=8).config]
    unused = random_model("qwen2", use_sliding_window=False, sliding_window=8).config
    for config in (full, unused, *windows):
        check_lengths(256, config)
        assert_stops(capsys, check_lengths, 257, config, words=("257", "256"))
    for config in (full, unused):
        check_lengths(256, config, in_search=True)
    for config in windows:
        check_lengths(8, config, in_search=True)
        assert_stops(capsys, check_lengths, 9, config, True, words=("9", "8"))
    check_lengths(10 ** 6, SimpleNamespace())                           # a backbone without a limit


# ---- Loss and gradients --------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tied", [
    ("qwen2", True), ("llama", False), ("gpt2", True), ("mistral", False)])
def test_response_loss_equals_the_naive_loss(kind, tied):
    window = {"sliding_window": 8} if kind == "mistral" else {}
    model, examples = random_model(kind, tied, **window), ragged()
    batch = stage.collate(examples, CPU)
    losses = stage.ResponseLoss(model)(batch.ids, batch.labels)
    losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = naive_losses(model, examples)
    expected.mean().backward()
    assert torch.allclose(losses, expected, atol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-5), name
    with torch.no_grad():                                               # and transformers' own loss agrees
        labels = torch.full_like(batch.ids, -100)
        for row, e in enumerate(examples):
            labels[row, e.start:len(e.ids)] = torch.tensor(e.ids[e.start:])
        loss = model(input_ids=batch.ids, labels=labels).loss
        assert float(loss) == pytest.approx(float(losses.mean()), abs=1e-5)


def test_gradient_equals_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)     # the loss, too, in float64
    model, batch = random_model("gpt2").double(), stage.collate(ragged(4), CPU)
    loss_of = stage.ResponseLoss(model)
    loss_of(batch.ids, batch.labels).mean().backward()
    with torch.no_grad():
        for p in random.Random(0).sample(list(model.parameters()), 6):
            weight, gradient = p.view(-1), p.grad.view(-1)
            i = int(gradient.abs().argmax())
            values = []
            for shift in (1e-5, -2e-5):
                weight[i] += shift
                values.append(float(loss_of(batch.ids, batch.labels).mean()))
            weight[i] += 1e-5
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[i]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("micro_tokens, max_norm", [(10 ** 9, 1e9), (400, 1e9), (10 ** 9, 0.01)])
def test_an_update_by_hand(micro_tokens, max_norm, finished_run, tmp_path, monkeypatch):
    """The loss is sum(w * nll) / sum(w) over a batch's supervised tokens, whatever its micro-batches.

    SGD shows the size of the gradient, which the first step of Adam does not.
    """
    tasks = {"title2sid": 1.0, "sid2title": 0.25, "text2token": 3.0}
    items = tokenize_items.read_catalogue(finished_run / "items.jsonl")
    model, tokenizer, _ = load_model(finished_run / "init.pt", CPU, items)
    data, total, count, means = stage.read_data(finished_run, items, tasks), 0, 0, {}
    for name, weight in tasks.items():
        losses = naive_losses(model, stage.make_examples(tokenizer, name, data, 128))
        means[f"loss/{name}"] = pytest.approx(losses.mean().item(), abs=1e-5)
        total += weight * losses.sum()
        count += weight * len(losses)
    (total / count).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()

    monkeypatch.setattr(stage, "make_optimizer", lambda model, *_: torch.optim.SGD(model.parameters()))
    monkeypatch.setattr(stage, "MAX_GRAD_NORM", max_norm)
    call(stage, "--run", finished_run, "--tasks", "title2sid,sid2title:0.25,text2token:3", "--epochs", 1,
         "--batch-size", 1000, "--lr", 0.5, "--dropout", 0, "--precision", "float32", "--log-every", 1,
         "--micro-tokens", micro_tokens, "--out", tmp_path / "out.pt")
    row, = log_of(tmp_path / "out.pt")
    assert row["loss"] == pytest.approx((total / count).item(), abs=1e-5) and row["lr"] == 0.5
    assert {name: value for name, value in row.items() if name.startswith("loss/")} == means
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.1
    after = checkpoint(tmp_path / "out.pt")["weights"]
    for name, p in model.named_parameters():
        expected = p.detach() - 0.5 * min(1, max_norm / norm) * p.grad
        assert torch.allclose(after[name], expected, atol=1e-6), name


def test_task_losses_by_hand():
    nll, counts = torch.zeros(len(stage.TASKS)), torch.zeros(len(stage.TASKS))
    for name, value, count in (("next", 6.0, 3.0), ("search", 10.0, 2.0)):
        nll[stage.TASK_NAMES.index(name)] = value
        counts[stage.TASK_NAMES.index(name)] = count
    before = nll.clone()
    assert stage.task_losses(nll, counts, {"next": 1.0, "search": 0.5}) == {
        "loss": (6 + 0.5 * 10) / (3 + 0.5 * 2), "loss/next": 2.0, "loss/search": 5.0}
    assert torch.equal(nll, before)


def test_validation_loss_is_the_mean_over_tokens(monkeypatch):
    model, examples = random_model(), ragged(12)
    expected = naive_losses(model, examples).mean().item()
    for micro_tokens in (10 ** 9, 40):
        loss_of = stage.ResponseLoss(model)
        value = stage.validation_loss(loss_of, examples, micro_tokens, "float32", 0, 1)
        assert value == pytest.approx(expected, abs=1e-5)
    assert loss_of.training and model.training and all(p.grad is None for p in model.parameters())

    sums = []                                                           # of more processes than examples
    monkeypatch.setattr(stage, "sum_over_processes", lambda value: sums.append(value.item()) or value)
    for rank in range(20):
        stage.validation_loss(loss_of, examples, 40, "float32", rank, 20)
    assert sum(sums[::2]) / sum(sums[1::2]) == pytest.approx(expected, abs=1e-5)


def test_weight_decay_is_for_matrices_only():
    model = random_model("qwen2", tied=False)
    optimizer = stage.make_optimizer(model, 0.1, 0.95, 0.3)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in model.parameters()}


def test_gradient_checkpointing_changes_memory_alone():
    plain, model, batch = random_model(), random_model(), stage.collate(ragged(), CPU)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (plain, model.train()):
        stage.ResponseLoss(m)(batch.ids, batch.labels).mean().backward()
    for p, q in zip(plain.parameters(), model.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_dropout_changes_nothing_but_training():
    plain, model, ids = random_model(), random_model(), stage.collate(ragged(), CPU).ids
    stage.add_dropout(model, 0.3)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        torch.manual_seed(0)
        first, second = model.train()(ids).logits, model(ids).logits
        torch.manual_seed(0)
        assert not torch.equal(first, second) and torch.equal(model(ids).logits, first)
        assert torch.equal(model.eval()(ids).logits, plain(ids).logits)


# ---- Batches and schedule ------------------------------------------------------------------------

def test_micro_batches_cover_all_and_respect_the_limit():
    examples = ragged(50) + [stage.Example("next", [1] * 200, 190)]
    for limit in (1, 30, 64, 1000):
        pieces = stage.micro_batches(examples, limit, 0, 1)
        assert sorted(e for piece in pieces for e in piece) == sorted(examples)
        for piece in pieces:                                            # one example may exceed it, alone
            assert len(piece) == 1 or len(piece) * max(len(e.ids) for e in piece) <= limit
    assert len(stage.micro_batches(examples[:50], 10 ** 6, 0, 1)) == 1


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_a_batch(world):
    """Together the whole batch exactly once; every process has as many pieces, fillers weigh nothing."""
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
    batches = stage.epoch_batches(examples, batch_size, "42 0")
    assert sorted(e for batch in batches for e in batch) == sorted(examples)
    assert len(batches) == math.ceil(150 / batch_size) and max(map(len, batches)) <= batch_size
    assert batches == stage.epoch_batches(examples, batch_size, "42 0")
    if batch_size < 1000:
        assert batches != stage.epoch_batches(examples, batch_size, "42 1")


def test_learning_rate_warms_up_peaks_and_ends_at_nothing():
    rates = [stage.learning_rate(step, 110, 2.0, 10) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("steps, peak", [(1, 0), (5, 0), (12, 1), (30, 3), (199, 19)])
def test_the_learning_rate_of_a_short_run_falls(steps, peak):
    """Warm-up lasts at most a tenth of the run."""
    rates = [stage.learning_rate(step, steps, 2.0, 100) for step in range(steps)]
    assert rates.index(2.0) == max(0, peak - 1) and all(a > b for a, b in zip(rates[peak:], rates[peak + 1:]))
    assert steps == 1 or rates[-1] < 1


# ---- The loop ------------------------------------------------------------------------------------

def scripted(monkeypatch, run, losses: list[float], *flags, leave_at: int = 0) -> SimpleNamespace:
    """main() on the 24 examples of text2token, with these validation losses, interrupted at `leave_at`."""
    losses, found = iter(losses), SimpleNamespace(best=[], resumes=[], steps=0)

    def interrupted() -> bool:
        found.steps += 1
        return found.steps == leave_at

    def save_model(*_, step, metrics, **__) -> None:
        found.best.append((step, metrics["valid_loss"]))

    def save_progress(path, model, optimizer, state, *_) -> None:
        found.resumes.append(state)
    monkeypatch.setattr(stage, "validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(stage, "catch_interrupts", lambda device: interrupted)
    monkeypatch.setattr(stage, "save_model", save_model)
    monkeypatch.setattr(stage, "save_progress", save_progress)
    flags = ("--run", run, "--tasks", "text2token", "--batch-size", 6, "--out", run / "out.pt", *flags)
    try:
        call(stage, *flags)
        found.code = 0
    except SystemExit as left:
        found.code = left.code
    found.log, found.unused = log_of(run / "out.pt"), len(list(losses))
    found.validated = [row["step"] for row in found.log if "valid_loss" in row]
    return found


def test_stops_after_patience_and_keeps_the_best(monkeypatch, run):
    losses = [5, 4, 4.5, 4.2, 3.9, 4, 3.9, 3.95, 1, 0]
    found = scripted(monkeypatch, run, losses, "--epochs", 9, "--patience", 3)
    assert found.best == [(4, 5), (8, 4), (20, 3.9)] and found.steps == 32 and found.unused == 2
    assert [row["valid_loss"] for row in found.log] == losses[:8] and found.code == 0


def test_validates_and_logs_as_often_as_told_and_after_the_last_update(monkeypatch, run):
    found = scripted(monkeypatch, run, [3, 2, 1, 0, -1], "--epochs", 2, "--evals-per-epoch", 2,
                     "--batch-size", 5, "--log-every", 4, "--lr", 1e-2, "--warmup", 100, "--save-every", 3)
    assert found.validated == [2, 4, 6, 8, 10] == [step for step, _ in found.best]      # 5 updates an epoch
    assert [state["step"] for state in found.resumes] == [3, 6, 9]
    rows = [row for row in found.log if "lr" in row]
    assert [row["step"] for row in rows] == [4, 8] and found.unused == 0
    assert [row["lr"] for row in rows] == [stage.learning_rate(step, 10, 1e-2, 100) for step in (3, 7)]
    keys = {"step", "epoch", "loss", "loss/text2token", "lr", "grad_norm", "tokens_per_second", "valid_loss"}
    assert all(row.keys() == keys for row in rows) and [row["epoch"] for row in rows] == [0.8, 1.6]


@pytest.mark.parametrize("leave_at", [3, 4, 8])
def test_an_interrupt_saves_and_leaves(leave_at, monkeypatch, run, capsys):
    found = scripted(monkeypatch, run, [2, 1], "--epochs", 2, leave_at=leave_at)
    validations = leave_at // 4
    assert found.code == 130 and found.steps == leave_at and len(found.best) == len(found.log) == validations
    expected = {"step": leave_at, "best": [math.inf, 2, 1][validations], "bad_evals": 0}
    assert len(found.resumes) == 1 and expected.items() <= found.resumes[0].items()
    assert "--resume" in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_the_run(monkeypatch, run, capsys):
    assert scripted(monkeypatch, run, [2, math.nan, 1, 1], "--epochs", 4).code == 2
    assert re.fullmatch("error: .*step 8 .*--lr.*\n", capsys.readouterr().err)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    assert scripted(monkeypatch, run, [2], "--epochs", 1, "--log-every", 1).code == 2
    assert re.fullmatch("error: .*gradient of step 1 .*--lr.*\n", capsys.readouterr().err)


# ---- Whole runs ----------------------------------------------------------------------------------

QUICK = ("--epochs", 1, "--batch-size", 16, "--log-every", 1, "--precision", "float32")


def test_learns_by_heart(finished_run, tmp_path):
    call(stage, "--run", finished_run, "--tasks", "title2sid", "--epochs", 40, "--batch-size", 20,
         "--lr", 1e-2, "--dropout", 0, "--log-every", 5, "--patience", 99, "--out", tmp_path / "out.pt")
    losses = [row["loss"] for row in log_of(tmp_path / "out.pt") if "loss" in row]
    assert losses[-1] < 1.5 < 3 < losses[0]


def test_same_seed_same_weights_bit_for_bit(run, capsys):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        call(stage, "--run", run, "--tasks", "next", *QUICK, "--seed", seed, "--out", run / f"{name}.pt")
    start, one, two, other = (checkpoint(run / f"{name}.pt") for name in ("init", "one", "two", "other"))
    assert all(torch.equal(weight, two["weights"][name]) for name, weight in one["weights"].items())
    assert not all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
    assert one["weights"].keys() == start["weights"].keys() and one["config"] == start["config"]
    assert one["sid"] == start["sid"] and one["tokenizer"] == start["tokenizer"]
    assert all(not torch.equal(weight, start["weights"][name]) for name, weight in one["weights"].items())

    preset = {key: stage.PRESETS["tiny"][key] for key in ("lr", "dropout", "warmup", "weight_decay", "beta2")}
    given = {"tasks": {"next": 1.0}, "epochs": 1, "batch_size": 16, "seed": 1, "backbone": "tiny"}
    assert {**preset, **given}.items() <= one["args"].items() and one["stage"] == "sft"
    rows = log_of(run / "one.pt")
    assert [row["step"] for row in rows] == list(range(1, 9))           # 120 samples, 16 a step
    assert all(row["loss"] == row["loss/next"] for row in rows)
    assert one["metrics"]["valid_loss"] == rows[-1]["valid_loss"] and one["step"] == 8
    out = capsys.readouterr().out
    assert ">>" in out and "<<" in out and "device cpu" in out and "8 updates" in out

    items = tokenize_items.read_catalogue(run / "items.jsonl")
    model, tokenizer, _ = load_model(run / "one.pt", CPU, items)        # the figure is the saved weights' own
    samples = tokenize_items.read_samples(run / "valid.jsonl", {item["item_id"] for item in items})
    valid = stage.make_examples(tokenizer, "next", {"items": items, "samples": samples}, 99)
    with torch.no_grad():
        assert float(naive_losses(model, valid).mean()) == pytest.approx(rows[-1]["valid_loss"], rel=1e-4)


def test_sft_of_the_pipeline(finished_run):
    sft, tasks = checkpoint(finished_run / "sft.pt"), stage.parse_tasks(stage.PRESETS["tiny"]["tasks"])
    assert sft["stage"] == "sft" and sft["args"]["tasks"] == tasks
    losses = [row["valid_loss"] for row in log_of(finished_run / "sft.pt") if "valid_loss" in row]
    assert min(losses) == sft["metrics"]["valid_loss"] and len(losses) == 2
    assert not list(finished_run.glob("*_resume.pt"))


def test_goes_on_from_a_checkpoint_and_after_new_items(run, tmp_path):
    new = write_lines(tmp_path / "new.jsonl", [{"item_id": "new", "title": "Acme steel rod"}])
    call(tokenize_items, "--run", run, "--add", new)
    digest = sid_digest(tokenize_items.read_catalogue(run / "items.jsonl"))
    lines, sample = (run / "train.jsonl").read_text(), {"user_id": "u", "history": [1], "target": "new"}
    out = run / "more.pt"
    for tasks, more, still_new in (("text2token", "", ["new"]), ("next_brief", "", ["new"]),
                                   ("next_brief", json.dumps(sample), [])):     # until it was a target
        (run / "train.jsonl").write_text(lines + more)
        call(stage, "--run", run, "--from", run / "sft.pt", "--tasks", tasks, *QUICK, "--out", out)
        saved = checkpoint(out)
        assert saved["args"]["tasks"] == {tasks: 1.0}
        assert (saved["sid"]["num_items"], saved["sid"]["digest"]) == (61, digest)
        assert saved["sid"]["new_items"] == still_new
    assert checkpoint(run / "sft.pt")["sid"]["num_items"] == 60


def test_tasks_without_examples_stop_only_if_all_are(run, capsys):
    items = [{**item, "description": ""} for item in tokenize_items.read_catalogue(run / "items.jsonl")]
    write_lines(run / "items.jsonl", items)
    call(stage, "--run", run, "--tasks", "title2sid,describe_item", *QUICK, "--out", run / "out.pt")
    out = capsys.readouterr().out
    assert "describe_item | 0 examples" in out and "title2sid | 60 examples" in out
    assert_stops(capsys, call, stage, "--run", run, "--tasks", "description2sid,describe_item",
                 words=("--tasks", "describe_item"))


def test_queries_bring_the_search_task_with_them(run, capsys):
    rows = [{"item_id": 3, "query": "a rope", "split": "train"},
            {"item_id": 4, "query": "a jar", "split": "test"}]
    write_lines(run / "queries.jsonl", rows)
    items = tokenize_items.read_catalogue(run / "items.jsonl")
    tasks = filled_in("tiny", has_queries=True).tasks
    assert tasks["search"] == 1 and stage.read_data(run, items, tasks)["queries"] == rows[:1]
    assert "search" not in filled_in("tiny").tasks
    assert "search" not in filled_in("tiny", "--stage", "align", has_queries=True).tasks
    for wrong in ({"item_id": 777, "query": "a rope"}, {"item_id": 3, "query": 777}):
        write_lines(run / "queries.jsonl", [*rows, {**wrong, "split": "train"}])
        assert_stops(capsys, stage.read_data, run, items, tasks, words=("queries.jsonl, line 3",))


# ---- Flags and bad input -------------------------------------------------------------------------

def filled_in(backbone: str, *flags, has_queries: bool = False):
    args = stage.parse_args(list(flags))
    stage.fill_in(args, backbone, has_queries)
    return args


def test_presets_set_what_the_flags_leave_open():
    open_flags = {name for name, value in vars(stage.parse_args([])).items() if value is None}
    open_flags -= {"start", "out"}
    for backbone in ("tiny", "Qwen/Qwen2.5-1.5B"):
        for name in ("sft", "align"):
            args = filled_in(backbone, "--stage", name)
            preset = dict(stage.PRESETS["tiny" if backbone == "tiny" else "hf"])
            if name == "align":
                preset |= stage.PRESETS["align"]
            assert open_flags <= preset.keys() and args.backbone == backbone
            assert {**preset, "tasks": stage.parse_tasks(preset["tasks"])}.items() <= vars(args).items()
            assert set(args.tasks) <= set(stage.TASKS)
    assert (args.epochs, args.lr, args.batch_size, args.weight_decay) == (10, 1e-3, 16, 0)       # STAR, A.4
    assert args.tasks == dict.fromkeys(stage.STAR_ALIGN.split(","), 1.0)
    args = filled_in("tiny", "--lr", "7", "--tasks", "next,sid2title:0.25")
    assert args.tasks == {"next": 1.0, "sid2title": 0.25} and args.lr == 7 and args.weight_decay > 0
    assert filled_in("tiny", "--lora", "2").weight_decay == 0           # it would move the masked rows


@pytest.mark.parametrize("flags", [
    "--no-such-flag", "--precision half", "--epochs 0", "--epochs 1.5", "--batch-size 0", "--stage both",
    "--evals-per-epoch 0", "--log-every 0", "--patience 0", "--micro-tokens 0", "--save-every 0", "--lora -1",
    "--dropout 1", "--lr -1", "--lr nan", "--warmup -3", "--tasks nxt", "--tasks next:0", "--tasks next:-1",
    "--tasks next:x", "--tasks next:inf", "--stage align --lora 2", "--seed -1", f"--seed {2 ** 70}"])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags.split())
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


@pytest.mark.parametrize("tasks", ["next,nonsense", "", "next,"])
def test_unknown_tasks_are_named(tasks, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(["--tasks", tasks])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in line and "is not a task" in line and "title2sid" in line


def test_another_catalogue_is_refused(run, capsys):
    lines = (run / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    before = (run / "sft.pt").read_bytes()
    items[0]["sid"], items[1]["sid"] = items[1]["sid"], items[0]["sid"]
    for other in (items, items[::-1], [json.loads(line) for line in lines[:-1]]):
        write_lines(run / "items.jsonl", other)
        assert_stops(capsys, call, stage, "--run", run, *QUICK, words=("init.pt", "another catalogue"))
    assert (run / "sft.pt").read_bytes() == before


def test_bad_input_is_one_line(run, tmp_path, capsys):
    assert_stops(capsys, call, stage, "--run", tmp_path / "none", words=("items.jsonl", "cannot be read"))
    assert not (tmp_path / "none").exists()
    files = {path.name: path.read_bytes() for path in run.iterdir()}

    def stops(*flags, words: tuple) -> None:
        assert_stops(capsys, call, stage, "--run", run, *QUICK, *flags, words=words)
    for name, content in (("text", b"no checkpoint\n"), ("empty", b""), ("cut", files["init.pt"][:2000])):
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list")
    torch.save({"weights": 1, "sid": 2}, tmp_path / "keys")
    for name in ("none", "text", "empty", "cut", "list", "keys"):
        stops("--from", tmp_path / name, words=(tmp_path / name,))
    stops("--tasks", "next", "--out", tmp_path, words=(tmp_path,))      # a folder
    stops("--tasks", "next", "--out", tmp_path / "text" / "out.pt", words=(tmp_path / "text" / "out.pt",))
    (run / "semantics.jsonl").unlink()
    stops("--tasks", "text2token", words=("semantics.jsonl",))
    good = {"token": "<a_1>", "description": "Rods.", "keywords": ["rod"]}
    for wrong in ({"token": "<a_99>"}, {"token": 3}, {"description": None}, {"token": ["<a_1>"]}):
        write_lines(run / "semantics.jsonl", [good, good | wrong])
        stops("--tasks", "text2token", words=("semantics.jsonl",))
    (run / "valid.jsonl").write_text('{"user_id": "u", "history": [1], "target": 777}\n')
    stops("--tasks", "next", words=("valid.jsonl, line 1", "777"))
    assert (run / "sft.pt").read_bytes() == files["sft.pt"]
    assert {path.name for path in run.iterdir()} == set(files)
