"""Stage 4: prompts, label mask, both losses against naive ones, batches, schedule, the loop, errors."""
import collections
import json
import math
import random
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import evaluate
import tokenize_items
import train as stage
from conftest import assert_stops, call, random_model, toy_interactions, write_lines
from init_embeddings import (build_trie, check_lengths, load_model, load_tokenizer, sid_digest,
                             sid_token_ids)
from test_evaluate import children_of, random_catalogue
from tokenize_items import codes_of

CPU = torch.device("cpu")
CODES, SID_IDS = random_catalogue(3, 30)
ITEMS = [
    {"item_id": 1, "title": "Steel rod", "description": "A long rod", "sid": ["<a_0>", "<b_1>", "<c_0>"]},
    {"item_id": "x", "title": "Blue wire", "description": "Copper", "sid": ["<a_1>", "<b_0>", "<c_1>"]}]
DATA = {
    "items": ITEMS,
    "samples": [{"user_id": "u", "history": ["x", 1], "target": 1}],
    "users": [{"user_id": "u", "items": [1, "x", 1]}],
    "pairs": [{"items": ["x", 1]}],
    "tokens": [{"token": "<a_1>", "description": "Wires of copper"}],
    "queries": [{"item_id": 1, "query": "a rod of steel", "split": "train"}]}
SID, TITLE, TEXT = "<a_0> <b_1> <c_0>", "Steel rod <eos>", "A long rod <eos>"
TWO = "<a_1><b_0><c_1>, <a_0><b_1><c_0>"
# Every template of every task, rendered with the first example, without its end, and the supervised tokens.
TABLE = {
    "next": {f"The user has interacted with items {TWO} in chronological order. Can you predict the next "
             "possible item that the user may expect?": SID},
    "next_brief": {"The user bought <a_1><b_0><c_1><a_0><b_1><c_0>": SID},
    "sequence": {"The user bought <a_0><b_1><c_0>": f"<a_1> <b_0> <c_1> {SID}"},
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
    "similar": {"The user bought <a_1><b_0><c_1>": SID},
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


def sids_and_texts(count: int = 8, codes: torch.Tensor = CODES,
                   sid_ids: torch.Tensor = SID_IDS) -> list[stage.Example]:
    """In turn, texts as in `ragged` and one to four SIDs behind the same prompt; no two weights are equal."""
    rng, out, leaves = random.Random(1), [], sorted(codes.tolist())
    for text in ragged(count):
        sids = [rng.choice(leaves) for _ in range(rng.randrange(1, 5))]
        ids = [int(row[code]) for sid in sids for row, code in zip(sid_ids, sid)]
        sequence = text._replace(task="sequence", ids=text.ids[:text.start] + ids)
        out += [text, sequence._replace(leaves=[leaves.index(sid) for sid in sids])]
    return [e._replace(weight=n + 0.5) for n, e in enumerate(out)]


def loss_of(model, codes: torch.Tensor = CODES, sid_ids: torch.Tensor = SID_IDS) -> Callable:
    """The losses of a batch as a function of the batch."""
    trie = build_trie(codes, sid_ids.shape[1], CPU)
    return partial(stage.response_losses, model, trie, sid_ids)


def naive_losses(model, examples: list[stage.Example]) -> torch.Tensor:
    """Each supervised token's loss from the full (B, T, V) logits under an attention mask."""
    length = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [5] * (length - len(e.ids)) for e in examples])         # any padding will do
    mask = torch.tensor([[1] * len(e.ids) + [0] * (length - len(e.ids)) for e in examples])
    log_probs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    return torch.stack([-log_probs[row, t - 1, e.ids[t]] for row, e in enumerate(examples)
                        for t in range(e.start, len(e.ids))])


def texts_first(examples: list[stage.Example]) -> list[stage.Example]:
    """In the order of the losses."""
    return sorted(examples, key=lambda e: bool(e.leaves))


def slow_losses(model, examples: list[stage.Example], codes: torch.Tensor = CODES,
                sid_ids: torch.Tensor = SID_IDS) -> torch.Tensor:
    """Texts by `naive_losses`; each code of a SID among those that follow its prefix, in a dictionary."""
    kids, texts = children_of(codes), [e for e in examples if not e.leaves]
    losses = [naive_losses(model, texts)] if texts else []
    for e in [e for e in examples if e.leaves]:
        logits = model(input_ids=torch.tensor([e.ids])).logits[0]
        for t in range(e.start, len(e.ids)):
            level = (t - e.start) % len(sid_ids)
            sid = [sid_ids[n].tolist().index(e.ids[t - level + n]) for n in range(level + 1)]
            legal = kids[tuple(sid[:-1])]
            log_probs = logits[t - 1, sid_ids[level, legal]].log_softmax(0)
            losses.append(-log_probs[legal.index(sid[-1])][None])
    return torch.cat(losses)


def sids_of(items: list[dict], tokenizer) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Of a toy run: codes (N, L), ids of the SID tokens (L, 8), the leaf of every SID."""
    codes = torch.from_numpy(codes_of(items))
    leaves = sorted(set(map(tuple, codes.tolist())))
    leaf_of = {"".join(item["sid"]): leaves.index(tuple(row)) for item, row in zip(items, codes.tolist())}
    return codes, sid_token_ids(tokenizer, 3, 8), leaf_of


def checkpoint(path) -> dict:
    return torch.load(path, weights_only=True)


def parse_tasks(text: str) -> dict[str, float]:
    return stage.parse_args(["--tasks", text]).tasks


def log_of(path) -> list[dict]:
    return [json.loads(line) for line in path.with_name(f"{path.stem}_log.jsonl").read_text().splitlines()]


# ---- Prompts, responses and the label mask -------------------------------------------------------

def texts_of(name: str, data: dict = DATA, seed: str = "") -> list[tuple[str, str]]:
    """Instructions without their ends, and responses."""
    end, pairs = stage.TASKS[name].end, stage.make_pairs(name, data, seed)
    return [(pair.instruction.removesuffix(end), pair.response) for pair in pairs]


def first_example(tokenizer, name: str, max_response: int) -> stage.Example:
    return stage.make_examples(tokenizer, name, DATA, max_response)[0]


def judged(batch: stage.Batch) -> torch.Tensor:
    """The position that each loss judges, in the order of the losses."""
    sids = batch.sid_places[:, None] + torch.arange(3)
    return torch.cat([batch.places, sids.flatten()])


@pytest.mark.parametrize("pad, loss", [("<pad>", "vocab"), ("<eos>", "vocab"), ("<pad>", "trie")])
def test_label_mask_token_by_token(pad, loss):
    tokenizer = word_tokenizer(pad)
    leaf_of = {"<a_0><b_1><c_0>": 0, "<a_1><b_0><c_1>": 1} if loss == "trie" else {}
    assert set(TABLE) == set(stage.TASKS)                               # a new task needs a row above
    examples, expected, leaves = [], [], []
    for name, table in TABLE.items():
        drawn = {texts_of(name, DATA, str(seed))[0][0]: str(seed) for seed in range(40)}
        assert drawn.keys() == table.keys()                             # all of its templates
        for instruction, seed in drawn.items():
            example, = stage.make_examples(tokenizer, name, DATA, 99, seed, leaf_of)[:1]
            examples.append(example._replace(weight=len(name)))
            response = words_of(table[instruction])
            prompt = words_of(instruction + stage.TASKS[name].end)
            expected.append(prompt + [f"[{token}]" for token in response])
            if leaf_of and response[0][0] == "<" and len(response) > 1:         # whole SIDs
                leaves += [int(token == "<a_1>") for token in response[::3]]

    batch = stage.collate(examples, CPU)                                # all in one, so most are padded
    assert batch.ids.shape[1] % 8 == 0 and batch.leaves.tolist() == leaves
    counted = torch.zeros(batch.ids.shape, dtype=torch.bool)
    counted.view(-1)[judged(batch) + 1] = True                          # position t is judged on token t + 1
    for row, example in enumerate(examples):
        tokens = tokenizer.convert_ids_to_tokens(batch.ids[row, :len(example.ids)].tolist())
        shown = [f"[{token}]" if counted[row, t] else token for t, token in enumerate(tokens)]
        assert shown == expected[row]
        assert not counted[row, len(example.ids):].any()                # and never on padding
        assert "<unk>" not in tokens
    supervised = [e.task for e in texts_first(examples) for _ in e.ids[e.start:]]
    assert [list(stage.TASKS)[n] for n in batch.tasks.tolist()] == supervised
    assert batch.weights.tolist() == [len(name) for name in supervised]


def test_collate_equals_a_naive_loop():
    examples = sids_and_texts()
    batch, losses, labels = stage.collate(examples, CPU), [], []
    for row, example in enumerate(examples):
        padding = [0] * (batch.ids.shape[1] - len(example.ids))
        assert batch.ids[row].tolist() == example.ids + padding
    for example in texts_first(examples):
        for t in range(example.start, len(example.ids)):
            losses.append((examples.index(example), t - 1, example.weight, example.task))
            labels += [example.ids[t]] if not example.leaves else []
    rows, positions = judged(batch) // batch.ids.shape[1], judged(batch) % batch.ids.shape[1]
    tasks = [list(stage.TASKS)[n] for n in batch.tasks]
    assert list(zip(rows.tolist(), positions.tolist(), batch.weights.tolist(), tasks)) == losses
    assert batch.labels.tolist() == labels
    assert batch.leaves.tolist() == [leaf for example in examples for leaf in example.leaves]


def test_a_model_recommends_by_the_first_task_it_was_trained_on_that_does():
    alone = {name for name in stage.TASKS if filled_in("tiny", "--tasks", name).recommends == name}
    assert alone == {"next", "next_brief"}
    assert filled_in("tiny").recommends == "next_brief"
    assert filled_in("Qwen/Qwen2.5-1.5B").recommends == "next"
    for tasks, expected in (("title2sid,next_brief,next", "next_brief"), ("next_title,search", "next"),
                            ("text2token,sequence", "next_brief"), ("sequence,next", "next")):
        assert filled_in("tiny", "--tasks", tasks).recommends == expected
    text = {name for name, task in stage.TASKS.items() if re.search("{title}|{description}", task.response)}
    assert text == {"sid2title", "next_title", "next_description", "token2text", "name_item", "describe_item",
                    "sid2text"}


def test_similar_items_share_all_codes_but_the_last():
    sids = ["<a_0><b_0><c_0>", "<a_0><b_0><c_1>", "<a_0><b_0><c_2>", "<a_0><b_1><c_0>", "<a_1><b_1><c_0>"]
    items = [{"item_id": n, "sid": re.findall("<.*?>", sid)} for n, sid in enumerate(sids)]
    pairs = stage.similar_items(items)
    assert len(pairs) == 3 * stage.PAIRS_PER_ITEM and pairs == stage.similar_items(items)
    drawn = {tuple(pair["items"]) for pair in pairs}
    assert len(drawn) > 3 and drawn <= {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}


def test_templates_are_drawn_by_the_seed():
    data = {**DATA, "queries": DATA["queries"] * 300}
    one, again, other = (texts_of("search", data, seed) for seed in ("1", "1", "2"))
    assert one == again != other
    counts = collections.Counter(instruction for instruction, _ in one)
    assert set(counts) == set(TABLE["search"]) and min(counts.values()) > 60
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
    data = {**DATA, "items": items, "users": [*DATA["users"], {"user_id": "v", "items": [1]}]}
    assert [name for name in TABLE if not texts_of(name, data)] == ["next_title", "next_description"]
    assert len(texts_of("sequence", data)) == 1                         # one item has no transition
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
def test_every_transition_of_a_user_is_there_once_and_none_is_invented(length, max_history):
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
            found = [pair for piece in own for pair in zip(piece, piece[1:])]
            end = last[u["user_id"]] + 1                                # its last training target
            assert found == list(zip(whole[:end], whole[1:end]))
            assert max(map(len, own)) <= stage.MAX_SEQUENCE and (length > 50 or own == [whole[:end]])


def test_the_toy_users_are_whole(finished_run):
    items = tokenize_items.read_catalogue(finished_run / "items.jsonl")
    data = stage.read_data(finished_run, items, {"sequence": 1.0})
    expected = [{"user_id": user["user_id"], "items": user["items"][:-2]} for user in toy_interactions()]
    assert data["users"] == expected                                    # the last two: validation and test


@pytest.fixture(scope="module")
def toy(finished_run) -> SimpleNamespace:
    """The run's data, tokenizer and untrained model, and the leaf of every SID."""
    items = tokenize_items.read_catalogue(finished_run / "items.jsonl")
    model, tokenizer, _ = load_model(finished_run / "init.pt", CPU, items)
    codes, sid_ids, leaf_of = sids_of(items, tokenizer)
    return SimpleNamespace(items=items, model=model, tokenizer=tokenizer, leaf_of=leaf_of, codes=codes,
                           sid_ids=sid_ids, data=stage.read_data(finished_run, items, {"sequence": 1.0}))


@pytest.mark.parametrize("max_history", [10, 2])
def test_a_users_sequence_holds_the_prompts_of_evaluation_id_for_id(toy, max_history):
    samples = [{**sample, "history": sample["history"][-max_history:]} for sample in toy.data["samples"]]
    cut = any(len(sample["history"]) < len(whole["history"])
              for sample, whole in zip(samples, toy.data["samples"]))
    assert cut == (max_history == 2)
    sequences = stage.make_examples(toy.tokenizer, "sequence", toy.data, 0)
    singles = iter(stage.make_examples(toy.tokenizer, "next_brief", {**toy.data, "samples": samples}, 0))
    rows = iter(samples)
    for user, whole in zip(toy.data["users"], sequences, strict=True):
        words = whole.start - 3                                         # "The user bought", then the SIDs
        assert len(whole.ids) == words + 3 * len(user["items"])
        for place in range(1, len(user["items"])):
            single, row = next(singles), next(rows)
            assert (row["user_id"], row["target"]) == (user["user_id"], user["items"][place])
            end = words + 3 * place                                     # of the history
            assert single.start == words + 3 * min(place, max_history)
            assert single.ids == whole.ids[:words] + whole.ids[end - single.start + words:end + 3]
    assert next(singles, None) is None and next(rows, None) is None


@pytest.mark.parametrize("loss", ["vocab", "trie"])
def test_a_users_sequence_has_the_losses_of_its_samples(toy, loss):
    """Where no history is cut, a transition costs the same in the sequence and on its own."""
    leaf_of, found = toy.leaf_of if loss == "trie" else {}, []
    for name in ("sequence", "next_brief"):
        batch = stage.collate(stage.make_examples(toy.tokenizer, name, toy.data, 0, "", leaf_of), CPU)
        assert len(batch.labels) == 0 or loss == "vocab"
        with torch.no_grad():
            found.append(loss_of(toy.model, toy.codes, toy.sid_ids)(batch))
    assert len(found[0]) == 3 * len(toy.data["samples"])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_samples_that_do_not_continue_start_a_new_sequence():
    parts = [([1, 2], 3), ([2, 3], 4), ([7, 8], 9), ([9], 1), ([4, 9], 5)]
    samples = [{"user_id": "u", "history": history, "target": target} for history, target in parts]
    assert [row["items"] for row in stage.user_sequences(samples)] == [[1, 2, 3, 4], [7, 8, 9, 1], [4, 9, 5]]


def test_align_holds_out_every_20th_example_of_each_task(finished_run, tmp_path, monkeypatch):
    trained, validated, batches_of = [], [], stage.epoch_batches
    monkeypatch.setattr(stage, "epoch_batches", lambda rows, *_: trained.append(rows) or batches_of(rows, *_))
    monkeypatch.setattr(stage, "validation_loss", lambda *args: validated.extend(args[3]) or 1.0)
    call(stage, "--run", finished_run, "--stage", "align", "--tasks", "title2sid,name_item", "--epochs", 1,
         "--batch-size", 1000, "--out", tmp_path / "align.pt")
    items = tokenize_items.read_catalogue(finished_run / "items.jsonl")
    _, tokenizer, _ = load_model(finished_run / "init.pt", CPU, items)
    examples = {name: stage.make_examples(tokenizer, name, {"items": items}, 128)
                for name in ("title2sid", "name_item")}
    assert validated == [e for rows in examples.values() for e in rows[::20]]
    rest = {name: [e for n, e in enumerate(rows) if n % 20] for name, rows in examples.items()}
    assert trained == [stage.weigh(rest, dict.fromkeys(rest, 1.0))[0]]


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
    losses = loss_of(model)(batch)
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


@pytest.mark.parametrize("kind, tied, num_levels, bits", [
    ("qwen2", True, 3, 32), ("llama", False, 2, 32), ("gpt2", True, 4, 64)])
def test_trie_loss_equals_a_dictionary_of_prefixes(kind, tied, num_levels, bits, monkeypatch):
    model, (codes, sid_ids) = random_model(kind, tied), random_catalogue(num_levels, 40)
    examples, close = sids_and_texts(8, codes, sid_ids), {"atol": 1e-5, "rtol": 1e-5}
    if bits == 64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        model, close = model.double(), {"atol": 1e-12, "rtol": 1e-10}
    batch = stage.collate(examples, CPU)
    losses = loss_of(model, codes, sid_ids)(batch)
    (losses * batch.weights).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = slow_losses(model, examples, codes, sid_ids)
    weights = [e.weight for e in texts_first(examples) for _ in e.ids[e.start:]]
    (expected * torch.tensor(weights)).mean().backward()
    assert len(set(map(len, children_of(codes).values()))) > 3          # from single children to many
    torch.testing.assert_close(losses, expected, **close)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, **close)


def test_an_example_costs_the_same_in_any_batch():
    model = loss_of(random_model())
    examples = [*sids_and_texts(), stage.Example("next", [1] * 200, 199)]       # pads all others
    alone = [model(stage.collate([e], CPU)) for e in examples]
    for batch in (examples[:-1], examples, examples[::-1], examples[3:-1:2]):
        expected = torch.cat([alone[examples.index(e)] for e in texts_first(batch)])
        torch.testing.assert_close(model(stage.collate(batch, CPU)), expected, atol=1e-5, rtol=1e-5)


def test_gradient_equals_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)     # the loss, too, in float64
    model, batch = random_model("gpt2").double(), stage.collate(sids_and_texts(2), CPU)
    loss = loss_of(model)
    loss(batch).mean().backward()
    with torch.no_grad():
        for p in random.Random(0).sample(list(model.parameters()), 6):
            weight, gradient = p.view(-1), p.grad.view(-1)
            i = int(gradient.abs().argmax())
            values = []
            for shift in (1e-5, -2e-5):
                weight[i] += shift
                values.append(float(loss(batch).mean()))
            weight[i] += 1e-5
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[i]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss, micro_tokens, max_norm", [
    ("vocab", 10 ** 9, 1e9), ("vocab", 400, 1e9), ("trie", 400, 1e9), ("trie", 10 ** 9, 0.01)])
def test_an_update_by_hand(loss, micro_tokens, max_norm, finished_run, tmp_path, monkeypatch):
    """The loss is the mean of the tasks' mean losses, weighed by their shares, whatever the micro-batches.

    SGD shows the size of the gradient, which the first step of Adam does not.
    """
    shares = {"title2sid": 1.0, "sid2title": 1.0, "text2token": 0.5}    # an epoch has all of their examples
    items = tokenize_items.read_catalogue(finished_run / "items.jsonl")
    model, tokenizer, _ = load_model(finished_run / "init.pt", CPU, items)
    data, total, means = stage.read_data(finished_run, items, shares), 0, {}
    codes, sid_ids, leaf_of = sids_of(items, tokenizer)
    for name, share in shares.items():
        examples = stage.make_examples(tokenizer, name, data, 128, "", leaf_of if loss == "trie" else {})
        losses = slow_losses(model, examples, codes, sid_ids)
        means[f"loss/{name}"] = pytest.approx(losses.mean().item(), abs=1e-5)
        total += share / sum(shares.values()) * losses.mean()
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()

    monkeypatch.setattr(stage, "make_optimizer", lambda model, *_: torch.optim.SGD(model.parameters()))
    monkeypatch.setattr(stage, "MAX_GRAD_NORM", max_norm)
    call(stage, "--run", finished_run, "--tasks", "title2sid,sid2title,text2token:0.5", "--epochs", 1,
         "--batch-size", 1000, "--lr", 0.5, "--dropout", 0, "--precision", "float32", "--log-every", 1,
         "--loss", loss, "--micro-tokens", micro_tokens, "--out", tmp_path / "out.pt")
    row, = log_of(tmp_path / "out.pt")
    assert row["loss"] == pytest.approx(total.item(), abs=1e-5) and row["lr"] == 0.5
    assert {name: value for name, value in row.items() if name.startswith("loss/")} == means
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.1
    after = checkpoint(tmp_path / "out.pt")["weights"]
    for name, p in model.named_parameters():
        expected = p.detach() - 0.5 * min(1, max_norm / norm) * p.grad
        assert torch.allclose(after[name], expected, atol=1e-6), name


def test_task_losses_by_hand():
    nll, counts = torch.zeros(len(stage.TASKS)), torch.zeros(len(stage.TASKS))
    for name, value, count in (("next", 6.0, 3.0), ("search", 10.0, 2.0)):      # both weighed already
        nll[list(stage.TASKS).index(name)] = value
        counts[list(stage.TASKS).index(name)] = count
    before = nll.clone()
    assert stage.task_losses(nll, counts) == {
        "loss": (6 + 10) / (3 + 2), "loss/next": 2.0, "loss/search": 5.0}
    assert torch.equal(nll, before)


def test_shares_of_the_loss_by_hand():
    lengths = {"next": (3, 3, 3, 3), "sid2title": (1, 7, 4, 4, 4, 4), "text2token": (4,)}
    examples = {name: [stage.Example(name, [1] * (2 + n), 2) for n in of_task]
                for name, of_task in lengths.items()}
    weighed, sizes = stage.weigh(examples, {"next": 1.0, "sid2title": 0.5, "text2token": 0.5, "search": 9.0})
    assert sizes == {"next": 4, "sid2title": 2, "text2token": 1}        # with half the share half as many
    # 12 + 2 x 4 + 4 = 24 tokens an epoch; next is to count for 12 of them, the others for 6 each
    for name, weight in (("next", 12 / 12), ("sid2title", 6 / 8), ("text2token", 6 / 4)):
        assert weighed[name] == [e._replace(weight=weight) for e in examples[name]]
    assert weighed.keys() == examples.keys()


def test_validation_loss_is_the_mean_over_weighted_tokens(monkeypatch):
    model, examples = random_model(), sids_and_texts()
    trie = build_trie(CODES, SID_IDS.shape[1], CPU)
    weights = torch.tensor([e.weight for e in texts_first(examples) for _ in e.ids[e.start:]])
    expected = ((slow_losses(model, examples) * weights).sum() / weights.sum()).item()
    for micro_tokens in (10 ** 9, 40):
        value = stage.validation_loss(model, trie, SID_IDS, examples, micro_tokens, "float32", 0, 1)
        assert value == pytest.approx(expected, abs=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())

    sums = []                                                           # of more processes than examples
    monkeypatch.setattr(stage, "sum_over_processes", lambda value: sums.append(value.item()) or value)
    for rank in range(20):
        stage.validation_loss(model, trie, SID_IDS, examples, 40, "float32", rank, 20)
    assert sum(sums[::2]) / sum(sums[1::2]) == pytest.approx(expected, abs=1e-5)


def test_weight_decay_is_for_matrices_only():
    model = random_model("qwen2", tied=False)
    optimizer = stage.make_optimizer(model, 0.1, 0.95, 0.3)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in model.parameters()}


def test_gradient_checkpointing_changes_memory_alone():
    plain, model, batch = random_model(), random_model(), stage.collate(sids_and_texts(), CPU)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (plain, model.train()):
        loss_of(m)(batch).mean().backward()
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
    """Together the whole batch exactly once, in pieces of alike size."""
    for examples in (ragged(50), ragged(5), ragged(1), ragged(20) + [stage.Example("next", [1] * 200, 190)]):
        for limit in (1, 64, 10 ** 6):
            shares = [stage.micro_batches(examples, limit, rank, world) for rank in range(world)]
            pieces = [piece for share in shares for piece in share]
            assert sorted(e for piece in pieces for e in piece) == sorted(examples)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            for piece in pieces:
                assert len(piece) == 1 or len(piece) * max(len(e.ids) for e in piece) <= limit
    alike = [stage.Example("next", [n] * 9, 6) for n in range(3 * world)]
    shares = [stage.micro_batches(alike, 10 ** 6, rank, world) for rank in range(world)]
    assert [[len(piece) for piece in share] for share in shares] == [[3]] * world       # nobody idles


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_an_epoch_has_so_many_examples_of_each_task_by_seed(batch_size):
    examples = {"next": ragged(100), "sid2title": [e._replace(task="sid2title") for e in ragged(50, 1)]}

    def epoch(seed: str) -> list[list[stage.Example]]:
        return stage.epoch_batches(examples, {"next": 100, "sid2title": 20}, batch_size, seed)
    batches = epoch("42 0")
    order = [e for batch in batches for e in batch]
    all_of, some_of = ([e for e in order if e.task == name] for name in examples)
    assert sorted(all_of) == sorted(examples["next"]) and all_of != examples["next"]
    places = [examples["sid2title"].index(e) for e in some_of]
    assert len(set(places)) == len(places) == 20 and order[:100] != all_of      # no example twice; mixed
    other = [e for batch in epoch("42 1") for e in batch if e.task == "sid2title"]
    assert sorted(other) != sorted(some_of)                             # others in another epoch
    assert len(batches) == math.ceil(120 / batch_size) and max(map(len, batches)) <= batch_size
    assert batches == epoch("42 0") != epoch("42 1")


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


def test_without_patience_it_trains_to_the_end_and_keeps_the_last_weights(monkeypatch, run):
    losses = [3, 4, 2, 5, 6, 7, 8, 9]
    for flags in (("--patience", 0), ()):                               # the tiny backbone's preset
        found = scripted(monkeypatch, run, losses, "--epochs", 8, *flags)
        assert found.best == list(zip(range(4, 33, 4), losses)) and found.steps == 32 and found.code == 0


def test_validates_and_logs_as_often_as_told_and_after_the_last_update(monkeypatch, run):
    found = scripted(monkeypatch, run, [3, 2, 1, 0], "--epochs", 2, "--evals-per-epoch", 2,
                     "--batch-size", 5, "--log-every", 3, "--lr", 1e-2, "--warmup", 100, "--save-every", 4)
    assert found.validated == [3, 6, 9, 10] == [step for step, _ in found.best]         # 5 updates an epoch
    assert [state["step"] for state in found.resumes] == [4, 8]
    rows = [row for row in found.log if "lr" in row]
    assert [row["step"] for row in rows] == [3, 6, 9] and found.unused == 0
    assert [row["lr"] for row in rows] == [stage.learning_rate(step, 10, 1e-2, 100) for step in (2, 5, 8)]
    keys = {"step", "epoch", "loss", "loss/text2token", "lr", "grad_norm", "tokens_per_second", "valid_loss"}
    assert all(row.keys() == keys for row in rows) and [row["epoch"] for row in rows] == [0.6, 1.2, 1.8]


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


@pytest.mark.parametrize("loss, end, beginning", [("vocab", 1.5, 3), ("trie", 0.5, 1.3)])
def test_learns_by_heart(loss, end, beginning, finished_run, tmp_path):
    call(stage, "--run", finished_run, "--tasks", "title2sid", "--epochs", 40, "--batch-size", 20,
         "--lr", 1e-2, "--dropout", 0, "--log-every", 5, "--loss", loss, "--out", tmp_path / "out.pt")
    losses = [row["loss"] for row in log_of(tmp_path / "out.pt") if "loss" in row]
    assert losses[-1] < end < beginning < losses[0]


def test_same_seed_same_weights_bit_for_bit(run, capsys):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        call(stage, "--run", run, "--tasks", "next", *QUICK, "--seed", seed, "--out", run / f"{name}.pt")
    start, one, two, other = (checkpoint(run / f"{name}.pt") for name in ("init", "one", "two", "other"))
    assert all(torch.equal(weight, two["weights"][name]) for name, weight in one["weights"].items())
    assert not all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
    assert one["weights"].keys() == start["weights"].keys() and one["config"] == start["config"]
    assert one["sid"] == start["sid"] and one["tokenizer"] == start["tokenizer"]
    assert all(not torch.equal(weight, start["weights"][name]) for name, weight in one["weights"].items())

    names = ("loss", "lr", "dropout", "warmup", "weight_decay", "beta2", "patience")
    preset = {name: stage.PRESETS["tiny"][name] for name in names}
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
    codes, sid_ids, leaf_of = sids_of(items, tokenizer)
    valid = stage.make_examples(tokenizer, "next", {"items": items, "samples": samples}, 99, "", leaf_of)
    with torch.no_grad():
        loss = slow_losses(model, valid, codes, sid_ids).mean().item()
    assert loss == pytest.approx(rows[-1]["valid_loss"], rel=1e-4)


def test_sft_of_the_pipeline(finished_run):
    sft, tasks = checkpoint(finished_run / "sft.pt"), parse_tasks(stage.PRESETS["tiny"]["tasks"])
    assert sft["stage"] == "sft" and sft["args"]["tasks"] == tasks
    losses = [row["valid_loss"] for row in log_of(finished_run / "sft.pt") if "valid_loss" in row]
    assert losses[-1] == sft["metrics"]["valid_loss"] and len(losses) == 2      # without patience: the last
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
            assert {**preset, "tasks": parse_tasks(preset["tasks"])}.items() <= vars(args).items()
            assert set(args.tasks) <= set(stage.TASKS)
    assert (args.epochs, args.lr, args.batch_size, args.weight_decay) == (10, 1e-3, 16, 0)       # STAR, A.4
    losses = {name: preset["loss"] for name, preset in stage.PRESETS.items()}
    assert losses == {"hf": "vocab", "tiny": "trie", "align": "vocab"}  # the papers' is over the vocabulary
    assert args.tasks == dict.fromkeys(stage.STAR_ALIGN.split(","), 1.0)
    args = filled_in("tiny", "--lr", "7", "--tasks", "next,sid2title:0.25")
    assert args.tasks == {"next": 1.0, "sid2title": 0.25} and args.lr == 7 and args.weight_decay > 0
    assert filled_in("tiny", "--lora", "2").weight_decay == 0           # it would move the masked rows


@pytest.mark.parametrize("flags", [
    "--no-such-flag", "--precision half", "--epochs 0", "--epochs 1.5", "--batch-size 0", "--stage both",
    "--loss sids", "--evals-per-epoch 0", "--log-every 0", "--patience -1", "--micro-tokens 0",
    "--save-every 0", "--lora -1", "--dropout 1", "--lr -1", "--lr nan", "--warmup -3", "--tasks nxt",
    "--tasks next:0", "--tasks next:-1", "--tasks next:x", "--tasks next:inf", "--stage align --lora 2",
    "--seed -1", f"--seed {2 ** 70}"])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags.split())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in line and "<lambda>" not in line


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
        assert_stops(capsys, call, stage, "--run", run, *QUICK, words=("init.pt", "other SIDs"))
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
