"""Sampling without replacement against exact probabilities, filters against a rebuilt trie, every lopsided edge."""
import itertools
import json
import math
from decimal import Decimal, getcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import evaluate
import extract_semantics
import init_embeddings
import tokenize_items
from conftest import call, random_model, write_lines
from evaluate import beam_search, build_trie, leaf_filter, length_batches, search_all, yardsticks
from test_evaluate import CPU, KINDS, TEXT_ROWS, K, exhaustive, items_of, random_catalogue, random_prompts

N = 30                                      # items of the catalogue that is sampled from
DRAWS = 12000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_policy(model, codes, sid_ids, prompt, temperature: float = 1.0) -> torch.Tensor:
    """Exact log-probability of every item, (N,), float64."""
    found = exhaustive(lambda ids: model(ids).logits / temperature, codes, sid_ids, prompt, "trie")
    return torch.tensor(found).double()


def draw(model, codes, sid_ids, prompt, count: int, users: int, seed: int = 0, temperature: float = 1.0):
    """Sample for many users with one prompt -> items, their log-probabilities, perturbed scores; all (users, G)"""
    trie = build_trie(codes, K, CPU)
    leaves, scores, perturbed = beam_search(model, trie, sid_ids, [prompt] * users, count, sample=generator(seed),
                                            temperature=temperature)
    return torch.from_numpy(trie.leaf_items)[leaves], scores, perturbed


@pytest.fixture(scope="module")
def shop():
    """A model, 30 items, a prompt and the policy: the commonest item has a third of the mass, the rarest 1e-4."""
    model = random_model("qwen2", rows=110, seed=3)
    codes, sid_ids = random_catalogue(3, 34)
    codes, prompt = codes[:N], [5, 17]
    policy = log_policy(model, codes, sid_ids, prompt).exp()
    assert len(codes) == N and abs(policy.sum() - 1) < 1e-5 and policy.max() < 0.5 and policy.min() < 2e-3
    return model, codes, sid_ids, prompt, policy


@pytest.fixture(scope="module")
def four(shop):
    """G = 4 items for each of 12,000 users: drawn, scores, perturbed."""
    model, codes, sid_ids, prompt, _ = shop
    return draw(model, codes, sid_ids, prompt, 4, DRAWS)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic as a standard normal (Wilson and Hilferty); cells under 5 are merged into one."""
    small = expected < 5
    if small.any():
        counts, expected = (torch.cat([x[~small], x[small].sum()[None]]) for x in (counts, expected))
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def sequential(policy: torch.Tensor, count: int) -> torch.Tensor:
    """Probability of every ordered draw of `count` distinct items, renormalised after each; (N,) -> (N, ..., N)."""
    size, joint, left = len(policy), torch.ones(()).double(), torch.ones(()).double()
    for step in range(count):
        joint = joint[..., None] * policy / left[..., None]
        for before in range(step):                                      # no item twice
            joint.diagonal(dim1=before, dim2=step).zero_()
        left = (left[..., None] - policy).clamp_min(1e-9)
    assert joint.shape == (size,) * count and abs(joint.sum() - 1) < 1e-6
    return joint


# ---- sampling ----

def test_first_draw_follows_the_policy(shop, four):
    policy, first = shop[-1], torch.bincount(four[0][:, 0], minlength=N).double()
    assert chi_square(first, DRAWS * policy) < 3.5
    tilted = policy ** 0.9                                              # the test would see a small error
    assert chi_square(first, DRAWS * tilted / tilted.sum()) > 5


def test_pairs_and_inclusion_follow_sequential_sampling(shop, four):
    policy, items = shop[-1], four[0]
    joint = sequential(policy, 4)
    pairs = torch.zeros(N, N).double().index_put_((items[:, 0], items[:, 1]), torch.ones(DRAWS).double(), True)
    expected = DRAWS * joint.sum((2, 3))
    off = ~torch.eye(N, dtype=torch.bool)
    assert chi_square(pairs[off], expected[off]) < 3.5
    included = torch.bincount(items.flatten(), minlength=N) / DRAWS
    inclusion = sum(joint.sum([d for d in range(4) if d != place]) for place in range(4))
    assert abs(inclusion.sum() - 4) < 1e-5
    z = (included - inclusion) / (inclusion * (1 - inclusion) / DRAWS).sqrt()
    assert z.abs().max() < 4 and z.square().mean() < 2
    with_replacement = 1 - (1 - policy) ** 4                            # what independent draws would include
    assert (included - with_replacement).abs().max() > 0.05


def test_no_item_twice_and_exact_log_probs(shop, four):
    items, scores, perturbed = four
    assert (items.sort(1).values.diff(dim=1) > 0).all()
    torch.testing.assert_close(scores.double(), shop[-1].log()[items], atol=2e-5, rtol=0)
    assert (perturbed.diff(dim=1) <= 0).all() and perturbed.isfinite().all()


@pytest.mark.parametrize("count", (N, N + 7))
def test_the_whole_catalogue(shop, count):
    model, codes, sid_ids, prompt, policy = shop
    items, scores, perturbed = draw(model, codes, sid_ids, prompt, count, 300)
    assert items.shape == scores.shape == perturbed.shape == (300, N)   # N rows, however many are asked for
    assert (items.sort(1).values == torch.arange(N)).all()
    torch.testing.assert_close(scores.double(), policy.log()[items], atol=2e-5, rtol=0)
    # (perturbed - score) is standard Gumbel noise: mean 0.5772, variance pi^2 / 6
    noise = torch.zeros(300, N).scatter_(1, items, perturbed - scores).double()
    assert abs(noise.mean() - 0.5772) < 4 * 1.2825 / math.sqrt(noise.numel())
    assert abs(noise.var() - math.pi ** 2 / 6) < 0.15
    assert (torch.corrcoef(noise.T) - torch.eye(N)).abs().max() < 0.27  # and independent between items


@pytest.mark.parametrize("temperature", (0.5, 2.0))
def test_temperature(shop, temperature):
    model, codes, sid_ids, prompt, _ = shop
    log_probs = log_policy(model, codes, sid_ids, prompt, temperature)
    items, scores, _ = draw(model, codes, sid_ids, prompt, 2, 4000, temperature=temperature)
    torch.testing.assert_close(scores.double(), log_probs[items], atol=5e-5, rtol=0)
    assert chi_square(torch.bincount(items[:, 0], minlength=N).double(), 4000 * log_probs.exp()) < 3.5


def test_importance_weights_are_unbiased(shop, four):
    _, scores, perturbed = four
    items, threshold = four[0][:, :3], perturbed[:, 3:]                 # three draws, the fourth is the threshold
    weights = scores[:, :3].exp() / -torch.expm1(-torch.exp(scores[:, :3] - threshold))
    values = torch.randn(N, generator=generator(1)).double()
    for value in (torch.ones(N).double(), values):
        estimates = (weights * value[items]).sum(1)
        wanted = float((shop[-1] * value).sum())
        assert abs(estimates.mean() - wanted) < 4 * estimates.std() / math.sqrt(DRAWS)


def test_the_seed_decides(shop):
    model, codes, sid_ids, prompt, _ = shop
    first, again, other = (draw(model, codes, sid_ids, prompt, 5, 9, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    state = torch.get_rng_state()
    draw(model, codes, sid_ids, prompt, 5, 9)
    assert torch.equal(state, torch.get_rng_state())                    # the global generator is left alone
    with pytest.raises(ValueError, match="trie"):
        beam_search(model, build_trie(codes, K, CPU), sid_ids, [prompt], 3, "level", sample=generator())


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


# ---- filters ----

def some_filters(count: int) -> torch.Tensor:
    """Per user which of N items are allowed: all, half, three, one, none."""
    mixed = torch.rand(count, generator=generator(4)) < 0.5
    few = torch.zeros(3, count, dtype=torch.bool)
    few[0, [1, 4, count - 1]] = True
    few[1, 2] = True
    return torch.stack([torch.ones(count, dtype=torch.bool), mixed, *few])


@pytest.mark.parametrize("num_levels, normalize", [*itertools.product((2, 3, 4), ("trie", "level"))])
def test_filter_equals_a_trie_of_what_is_left(num_levels, normalize):
    model, prompts = random_model("qwen2"), random_prompts((3, 9, 1, 14, 5))
    codes, sid_ids = random_catalogue(num_levels, 33)
    trie, keep = build_trie(codes, K, CPU), some_filters(len(codes))
    allowed = keep[:, torch.from_numpy(trie.leaf_items)]                # one item per leaf
    for num_beams in (1, 4, len(codes) + 2):
        leaves, scores = beam_search(model, trie, sid_ids, prompts, num_beams, normalize, allowed)
        assert not scores.isnan().any()
        for user, prompt in enumerate(prompts):
            found, kept = scores[user] > -torch.inf, keep[user].nonzero().squeeze(1)
            assert (found.int().diff() <= 0).all()                      # results first, then what is none
            if not len(kept):
                assert not found.any()
                continue
            small = build_trie(codes[kept], K, CPU)
            theirs, wanted = beam_search(model, small, sid_ids, [prompt], num_beams, normalize)
            real = wanted[0] > -torch.inf
            assert items_of(trie, leaves[user][found]) == kept[items_of(small, theirs[0][real])].tolist()
            torch.testing.assert_close(scores[user][found], wanted[0][real], atol=1e-5, rtol=1e-5)
            if num_beams >= len(kept):
                assert found.sum() == len(kept)
            if normalize == "trie" and num_beams > len(kept):
                assert abs(scores[user].exp().sum() - 1) < 1e-5
    shared = beam_search(model, trie, sid_ids, prompts, 4, normalize, allowed[1:2])     # one row for all users
    same = beam_search(model, trie, sid_ids, prompts, 4, normalize, allowed[1:2].repeat(5, 1))
    assert torch.equal(shared[0], same[0]) and torch.equal(shared[1], same[1])


def test_sampling_under_a_filter():
    model, prompts = random_model("qwen2"), random_prompts((3, 9, 1, 14, 5))
    codes, sid_ids = random_catalogue(3, 33)
    trie, keep = build_trie(codes, K, CPU), some_filters(len(codes))
    allowed = keep[:, torch.from_numpy(trie.leaf_items)]
    for seed in range(20):
        leaves, scores, perturbed = beam_search(model, trie, sid_ids, prompts, 6, allowed=allowed,
                                                sample=generator(seed))
        for user, prompt in enumerate(prompts):
            found, kept = scores[user] > -torch.inf, keep[user].nonzero().squeeze(1)
            assert found.equal(perturbed[user] > -torch.inf) and found.sum() == min(6, len(kept))
            items = items_of(trie, leaves[user][found])
            assert len(set(items)) == len(items) and keep[user][items].all()
            if len(items):
                exact = torch.full((len(codes),), -torch.inf).double()
                exact[kept] = log_policy(model, codes[kept], sid_ids, prompt)
                torch.testing.assert_close(scores[user][found].double(), exact[items], atol=1e-5, rtol=1e-5)


def test_excluded_rows_and_shared_sids():
    codes = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0], [0, 2], [0, 1]])      # leaves (0 1), (0 2), (3 0)
    trie = build_trie(codes, K, CPU)
    left = leaf_filter(trie, [[], [0, 2], [0, 2, 5], [5, 1, 4, 0, 2], [3, 3]])
    # a SID goes when the user has all of its items
    assert left.int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 0]]
    model, sid_ids = random_model("qwen2"), TEXT_ROWS + torch.arange(2 * K).view(2, K)
    has = [[0, 2, 5], [], [5, 1, 4, 0, 2]]
    found = search_all(model, trie, sid_ids, random_prompts((4, 2, 7)), 9, "trie", 10, has)
    assert [sorted(leaf for leaf, _ in user) for user in found] == [[1, 2], [0, 1, 2], [2]]


def test_exclude_history_from_the_command_line(toy_data, tmp_path):
    run, some = tmp_path / "run", write_lines(tmp_path / "some.jsonl", [{"item_id": i} for i in range(12)])
    for args in ([tokenize_items, "--data", toy_data, "--codebook-size", 8], [extract_semantics],
                 [init_embeddings, "--width", 32, "--layers", 1, "--vocab-size", 300, "--pretrain-steps", 2]):
        call(*args, "--run", run)
    samples = [json.loads(line) for line in (run / "test.jsonl").read_text().splitlines()]
    for flags, size in (([], 60), (["--candidates", some], 12)):
        call(evaluate, "--run", run, "--checkpoint", run / "init.pt", "--exclude-history",
             "--num-beams", 100, *flags)
        predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        for sample, p in zip(samples, predictions):
            history = set(sample["history"]) & set(range(size))
            assert not history & set(p["items"]) and len(p["items"]) == size - len(history)
            assert sum(map(math.exp, p["scores"])) == pytest.approx(1, abs=1e-4)
    assert all(json.loads(line)["exclude_history"] for line in (run / "metrics.jsonl").read_text().splitlines())


def test_yardsticks_without_the_history():
    train, shop = [{"history": ["a", "b"], "target": "c"}] * 2, [{"item_id": i} for i in "abcd"]
    rankings = yardsticks(train, train, shop, [{"a", "c"}, set()], 2)
    assert rankings == {"popularity": [["b", "d"], ["c", "a"]], "bigram": [["b", "d"], ["c", "a"]]}


# ---- edges ----

EDGES = {       # name -> SIDs; the first three are issue 3's, for L = 3
    "one item": [[3, 0, 5]],
    "a level with one child": [[a, 5, c] for a in range(4) for c in range(a + 1)],
    "one first code": [[2, b, c] for b in range(3) for c in range(4)],
    "two levels": [[a, b] for a in range(5) for b in range(0, 6, a + 1)],
    "four levels": [[a, b, (a * b) % 6, d] for a in range(2) for b in range(3) for d in range(b + 1)],
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    codes = torch.tensor(EDGES[name])[torch.randperm(len(EDGES[name]), generator=generator(7))]
    trie, model = build_trie(codes, K, CPU), random_model("llama")
    sid_ids = TEXT_ROWS + torch.randperm(27, generator=generator(2))[:24].view(4, 6)[:codes.shape[1]]
    prompts = random_prompts((1, 40, 2, 1, 97))                         # very different lengths, also of one token
    exact = torch.stack([log_policy(model, codes, sid_ids, prompt) for prompt in prompts])
    allowed = torch.ones(len(prompts), len(codes), dtype=torch.bool)
    allowed[3] = torch.arange(len(codes)) == len(codes) - 1             # candidates that leave a user a single item
    for extra, given in ((0, None), (5, None), (5, allowed)):
        for noise in (None, generator(1)):
            count = len(codes) + extra
            leaves, scores, *_ = beam_search(model, trie, sid_ids, prompts, count, "trie", given, noise)
            assert leaves.shape == scores.shape == (len(prompts), len(codes))
            for user in range(len(prompts)):
                if given is not None and user == 3:
                    assert scores[user].isfinite().sum() == 1 and abs(scores[user, 0]) < 1e-6
                    assert leaves[user, 0] == len(codes) - 1
                else:
                    items = items_of(trie, leaves[user])
                    assert sorted(items) == list(range(len(codes)))
                    torch.testing.assert_close(scores[user].double(), exact[user][items], atol=1e-5, rtol=1e-5)


# ---- what a GPU needs ----

@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind, monkeypatch):
    """The search runs on tensors without values: no .item(), .tolist(), nonzero or `if tensor` anywhere in it."""
    model = random_model(kind).to(torch.bfloat16)
    codes, sid_ids = random_catalogue(3, 60)
    trie, prompts = build_trie(codes, K, CPU), random_prompts()
    allowed = torch.ones(1, len(codes), dtype=torch.bool)
    # a fake tensor takes no generator
    monkeypatch.setattr(evaluate, "add_gumbel", lambda x, _: x + torch.rand_like(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain = beam_search(model, trie, sid_ids, prompts, 5, allowed=allowed)
        drawn = beam_search(model, trie, sid_ids, prompts, 5, allowed=allowed, sample=generator())
        assert [x.shape for x in (*plain, *drawn)] == [(4, 5)] * 5
        with pytest.raises(DataDependentOutputException):
            plain[0].tolist()


def test_bfloat16_weights_float32_scores():
    model, prompts = random_model("qwen2"), random_prompts()
    codes, sid_ids = random_catalogue(3, 60)
    trie = build_trie(codes, K, CPU)
    exact = beam_search(model, trie, sid_ids, prompts, 60)
    init_embeddings.to_bfloat16(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}        # the rotary frequencies
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    leaves, scores = beam_search(model, trie, sid_ids, prompts, 60)
    assert scores.dtype == torch.float32 and len(scores.unique()) > 0.9 * scores.numel()
    assert abs(scores.double().exp().sum(1) - 1).max() < 1e-5           # normalised in float32
    order = leaves.argsort(1), exact[0].argsort(1)
    assert (scores.gather(1, order[0]) - exact[1].gather(1, order[1])).abs().mean() < 0.2


def test_padding_of_length_buckets():
    # as many prompts, as long, as Industrial's test set; `tests/benchmark.py --run` measures the real ones: 3.3 %
    lengths = torch.randint(28, 74, (4533,), generator=generator()).tolist()
    for budget, most in ((2048, 0.02), (16384, 0.1)):
        batches = length_batches([[0] * n for n in lengths], budget)
        read = sum(len(rows) * max(lengths[r] for r in rows) for rows in batches)
        assert 1 - sum(lengths) / read < most
