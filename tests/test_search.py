"""The search: draws without replacement against exact probabilities, filters, edges, windows, texts."""
import math
import sys
from decimal import Decimal, getcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import evaluate
from conftest import ROOT, call, random_model, write_lines
from evaluate import beam_search, search_all
from init_embeddings import build_trie, length_batches
from test_evaluate import (CPU, KINDS, LOPSIDED, TEXT_ROWS, K, assert_search_is_exhaustive, exhaustive,
                           items_of, random_catalogue, random_prompts, read_lines)

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import sid2title  # noqa: E402

N = 30                                      # items of the catalogue that is sampled from
DRAWS = 12000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(policy, count: int, users: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample for many users with one prompt; -> items, their log-probabilities, both (users, G)."""
    model, codes, sid_ids, prompt, _ = policy
    trie = build_trie(codes, K, CPU)
    leaves, scores = beam_search(model, trie, sid_ids, [prompt] * users, count, sample=generator(seed))
    return torch.from_numpy(trie.leaf_items)[leaves], scores


@pytest.fixture(scope="module")
def policy():
    """A model, 30 items, a prompt and the exact policy: the commonest item has a third of the mass."""
    model = random_model("qwen2", rows=110, seed=3)
    codes, sid_ids = random_catalogue(3, 34)
    codes, prompt = codes[:N], [5, 17]
    exact = exhaustive(model, codes, sid_ids, prompt).double().exp()
    assert len(codes) == N and abs(exact.sum() - 1) < 1e-5 and exact.max() < 0.5 and exact.min() < 2e-3
    return model, codes, sid_ids, prompt, exact


@pytest.fixture(scope="module")
def four(policy):
    """G = 4 items for each of 12,000 users: items, scores."""
    return draw(policy, 4, DRAWS)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic as a standard normal (Wilson and Hilferty); cells under 5 are merged into one."""
    small = expected < 5
    if small.any():
        counts, expected = (torch.cat([x[~small], x[small].sum()[None]]) for x in (counts, expected))
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def sequential(exact: torch.Tensor, count: int) -> torch.Tensor:
    """Probability of every ordered draw of `count` distinct items; (N,) -> (N, ..., N)."""
    size, joint, left = len(exact), torch.ones(()).double(), torch.ones(()).double()
    for step in range(count):
        joint = joint[..., None] * exact / left[..., None]
        for before in range(step):                                      # no item twice
            joint.diagonal(dim1=before, dim2=step).zero_()
        left = (left[..., None] - exact).clamp_min(1e-9)
    assert joint.shape == (size,) * count and abs(joint.sum() - 1) < 1e-6
    return joint


# ---- sampling ----

def test_first_draw_follows_the_policy(policy, four):
    exact, first = policy[-1], torch.bincount(four[0][:, 0], minlength=N).double()
    assert chi_square(first, DRAWS * exact) < 3.5
    tilted = exact ** 0.9                                               # the test would see a small error
    assert chi_square(first, DRAWS * tilted / tilted.sum()) > 5


def test_pairs_and_inclusion_follow_sequential_sampling(policy, four):
    exact, items = policy[-1], four[0]
    joint = sequential(exact, 4)
    pairs = torch.bincount(items[:, 0] * N + items[:, 1], minlength=N * N).view(N, N).double()
    expected = DRAWS * joint.sum((2, 3))
    off = ~torch.eye(N, dtype=torch.bool)
    assert chi_square(pairs[off], expected[off]) < 3.5
    included = torch.bincount(items.flatten(), minlength=N) / DRAWS
    inclusion = sum(joint.sum([d for d in range(4) if d != place]) for place in range(4))
    assert abs(inclusion.sum() - 4) < 1e-5
    z = (included - inclusion) / (inclusion * (1 - inclusion) / DRAWS).sqrt()
    assert z.abs().max() < 4 and z.square().mean() < 2
    with_replacement = 1 - (1 - exact) ** 4                             # what independent draws would include
    assert (included - with_replacement).abs().max() > 0.05


def test_no_item_twice_and_exact_log_probs(policy, four):
    items, scores = four
    assert (items.sort(1).values.diff(dim=1) > 0).all()
    torch.testing.assert_close(scores.double(), policy[-1].log()[items], atol=2e-5, rtol=0)


@pytest.mark.parametrize("count", (N, N + 7))
def test_the_whole_catalogue(policy, count):
    items, scores = draw(policy, count, 300)
    assert items.shape == scores.shape == (300, N)                      # N rows, however many are asked for
    assert (items.sort(1).values == torch.arange(N)).all()
    torch.testing.assert_close(scores.double(), policy[-1].log()[items], atol=2e-5, rtol=0)


def test_the_seed_decides(policy):
    state = torch.get_rng_state()
    first, again, other = (draw(policy, 5, 9, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    assert torch.equal(state, torch.get_rng_state())                    # the global generator is left alone


def test_conditioned_maximum_is_stable(monkeypatch):
    """Against 60 decimal digits, from children that are near ties to children 80 nats apart."""
    getcontext().prec = 60
    free = torch.tensor([[[1.0, 1.0 - 6e-8, -3.0, -80.0, -torch.inf], [-60.0, -60.5, -90.0, -61.0, -70.0],
                          [12.0, 11.999, 3.0, -2.0, 0.0], [-torch.inf] * 5]])
    parent = torch.tensor([[-2.0, 7.0, -75.0, -torch.inf]])
    monkeypatch.setattr(evaluate, "add_gumbel", lambda scores, _: free)
    found = evaluate.perturb(free, parent, None)
    assert found[0, 3].eq(-torch.inf).all() and found[0, 0, 4] == -torch.inf
    for beam in range(3):
        assert found[0, beam].max() == parent[0, beam]
        top, largest = Decimal(parent[0, beam].item()), Decimal(free[0, beam].max().item())
        for value, ours in zip(free[0, beam].tolist(), found[0, beam].tolist()):
            if value > -math.inf:
                exact = -((-top).exp() - (-largest).exp() + (-Decimal(value)).exp()).ln()
                assert ours == pytest.approx(float(exact), rel=1e-5, abs=1e-5)


# ---- items to leave out ----

@pytest.mark.parametrize("num_levels", (2, 3, 4))
def test_skipped_items_leave_the_others_in_their_order(num_levels):
    """With beams for all, the ranking is the exhaustive one without the skipped items."""
    model, prompts = random_model("qwen2"), random_prompts((3, 9, 1, 14, 5))
    codes, sid_ids = random_catalogue(num_levels, 33)
    trie, items = build_trie(codes, K, CPU), list(range(33))
    skip = [set(), set(items[::2]), set(items[3:]), set(items[1:]), set(items)]
    found = search_all(model, trie, sid_ids, items, prompts, 33, 20, skip)
    for prompt, skipped, ranking in zip(prompts, skip, found):
        exact = exhaustive(model, codes, sid_ids, prompt)
        wanted = [i for i in exact.argsort(descending=True).tolist() if i not in skipped]
        assert ranking.items == wanted
        torch.testing.assert_close(torch.tensor(ranking.scores), exact[wanted], atol=1e-5, rtol=1e-5)
    few = search_all(model, trie, sid_ids, items, prompts, 4, 20, skip)
    assert [len(ranking.items) for ranking in few] == [4, 4, 3, 1, 0]
    for skipped, ranking in zip(skip, few):
        assert not skipped & set(ranking.items)


def test_skipped_items_and_shared_sids():
    codes = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0], [0, 2], [0, 1]])      # leaves (0 1), (0 2), (3 0)
    trie, item_ids = build_trie(codes, K, CPU), list("uvwxyz")
    model, sid_ids = random_model("qwen2"), TEXT_ROWS + torch.arange(2 * K).view(2, K)
    skip = [set("uwz"), set(), set("zvyuw"), set("vu")]
    found = search_all(model, trie, sid_ids, item_ids, random_prompts((4, 2, 7, 3)), 9, 10, skip)
    assert [sorted(user.leaves) for user in found] == [[1, 2], [0, 1, 2], [2], [0, 1, 2]]
    assert ["".join(sorted(user.items)) for user in found] == ["vxy", "uvwxyz", "x", "wxyz"]
    assert [len(user.scores) for user in found] == [3, 6, 1, 4]


def test_exclude_history_from_the_command_line(run, tmp_path):
    some = write_lines(tmp_path / "some.jsonl", [{"item_id": i} for i in range(12)])
    samples = read_lines(run / "test.jsonl")
    for flags, size in (([], 60), (["--candidates", some], 12)):
        call(evaluate, "--run", run, "--exclude-history", "--num-beams", 100, *flags)
        for sample, p in zip(samples, read_lines(run / "predictions.jsonl"), strict=True):
            history = set(sample["history"]) & set(range(size))
            assert not history & set(p["items"]) and len(p["items"]) == size - len(history)
            assert sum(map(math.exp, p["scores"])) <= 1.0001
    assert all(row["exclude_history"] for row in read_lines(run / "metrics.jsonl"))


# ---- edges ----

@pytest.mark.parametrize("name", LOPSIDED)
def test_lopsided_tries_and_draws(name):
    codes = torch.tensor(LOPSIDED[name])[torch.randperm(len(LOPSIDED[name]), generator=generator(7))]
    trie, model = build_trie(codes, K, CPU), random_model("llama")
    sid_ids = TEXT_ROWS + torch.randperm(27, generator=generator(2))[:24].view(4, 6)[:codes.shape[1]]
    prompts = random_prompts((1, 40, 2, 1, 97))
    exact = torch.stack([exhaustive(model, codes, sid_ids, prompt) for prompt in prompts])
    for extra in (0, 5):
        for noise in (None, generator(1)):
            leaves, scores = beam_search(model, trie, sid_ids, prompts, len(codes) + extra, noise)
            assert leaves.shape == scores.shape == (len(prompts), len(codes))
            for user in range(len(prompts)):
                items = items_of(trie, leaves[user])
                assert sorted(items) == list(range(len(codes)))
                torch.testing.assert_close(scores[user], exact[user][items], atol=1e-5, rtol=1e-5)


WINDOWS = {     # backbones with a sliding window of 16 tokens
    "mistral": {"kind": "mistral", "sliding_window": 16},
    "all layers of qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "one layer of qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_inside_a_sliding_window(name):
    """Search is exact as long as all that is read fits the window."""
    model, (codes, sid_ids) = random_model(**WINDOWS[name]), random_catalogue(3, 30)
    assert_search_is_exhaustive(model, codes, sid_ids, random_prompts((14, 3, 9)))      # 14 + L - 1 = 16
    with pytest.raises(AssertionError):                                 # the window is real
        assert_search_is_exhaustive(model, codes, sid_ids, random_prompts((24,)))
    prompts = random_prompts((11, 3, 8))                                # 11 + 6 - 1 = 16
    found = sid2title.decode_texts(model, prompts, 4, 6, eos=-1)        # no token ends a text
    assert found == [slow_beams(model, prompt, 4, 6, -1) for prompt in prompts]


# ---- decoding texts: tests/studies/sid2title.py ----

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
            logits = model(torch.tensor([prompt + text]), use_cache=False).logits[0, -1]
            gains = logits.log_softmax(0).tolist()
            grown += [(text + [token], score + gain) for token, gain in enumerate(gains)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
    return [text[:text.index(eos)] if eos in text else text for text, _ in beams]


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("num_beams", [1, 5])
def test_decoded_texts_equal_a_slow_beam_search(kind, tied, num_beams):
    model = random_model(kind, tied, rows=23)
    prompts = [[3], [5, 1, 9, 12, 4, 4, 8], [7, 2, 2]]
    eos = slow_beams(model, prompts[0], num_beams, 3, -1)[0][1]         # a token that ends some beams early
    found = sid2title.decode_texts(model, prompts, num_beams, 6, eos)
    assert found == [slow_beams(model, prompt, num_beams, 6, eos) for prompt in prompts]
    assert any(len(text) < 6 for beams in found for text in beams)


@pytest.mark.parametrize("kind, extra, limit", [("gpt2", {}, 256), ("mistral", {"sliding_window": 60}, 60)])
def test_texts_end_where_the_backbone_ends(kind, extra, limit):
    """A title may be longer than the positions, or the window, leave room for."""
    model, prompts = random_model(kind, **extra), random_prompts((limit - 5, 3))
    tokenizer = SimpleNamespace(eos_token_id=-1, batch_decode=list)     # no token ends a text
    long, short = sid2title.decode_all(model, tokenizer, prompts, 3, 400, 10 ** 5)
    assert {len(text) for text in (*long, *short)} == {6}               # the last token need not be read
    assert long == slow_beams(model, prompts[0], 3, 6, -1)
    together = sid2title.decode_all(model, tokenizer, prompts, 3, 4, 10 ** 5)
    assert {len(text) for texts in together for text in texts} == {4}


def test_text_metrics_by_hand():
    wanted = ["Steel  Rod 2 in", "wool blanket", "clay pot"]
    found = [["steel rod 2 IN"], ["blanket", "Wool blanket"], ["", "pot"]]
    assert sid2title.text_metrics(wanted, found) == pytest.approx(
        {"accuracy": 1 / 3, "accuracy_any": 2 / 3, "token_f1": (1 + 2 / 3 + 0) / 3})


# ---- what a GPU needs ----

@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind, monkeypatch):
    """The search runs on tensors without values: no .item(), .tolist() or `if tensor` anywhere."""
    model = random_model(kind).to(torch.bfloat16)
    codes, sid_ids = random_catalogue(3, 60)
    trie, prompts = build_trie(codes, K, CPU), random_prompts()
    # a fake tensor takes no generator
    monkeypatch.setattr(evaluate, "add_gumbel", lambda x, _: x + torch.rand_like(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain = beam_search(model, trie, sid_ids, prompts, 5)
        drawn = beam_search(model, trie, sid_ids, prompts, 5, generator())
        assert [x.shape for x in (*plain, *drawn)] == [(4, 5)] * 4
        with pytest.raises(DataDependentOutputException):
            plain[0].tolist()


def test_bfloat16_weights_float32_scores():
    model, prompts = random_model("qwen2"), random_prompts()
    codes, sid_ids = random_catalogue(3, 60)
    trie = build_trie(codes, K, CPU)
    exact = beam_search(model, trie, sid_ids, prompts, 60)
    for p in model.parameters():                                        # as evaluate.py does on a GPU
        p.data = p.data.to(torch.bfloat16)
    leaves, scores = beam_search(model, trie, sid_ids, prompts, 60)
    assert scores.dtype == torch.float32 and len(scores.unique()) > 0.9 * scores.numel()
    assert abs(scores.double().exp().sum(1) - 1).max() < 1e-5           # normalised in float32
    order = leaves.argsort(1), exact[0].argsort(1)
    assert (scores.gather(1, order[0]) - exact[1].gather(1, order[1])).abs().mean() < 0.2


def test_padding_of_length_buckets():
    # as many prompts, as long, as Industrial's test set
    lengths = torch.randint(28, 74, (4533,), generator=generator()).tolist()
    for budget, most in ((2048, 0.02), (16384, 0.1)):
        batches = length_batches(lengths, budget)
        read = sum(len(rows) * max(lengths[r] for r in rows) for rows in batches)
        assert 1 - sum(lengths) / read < most
