"""The memory: counts by hand, the mixture against item by item, draws from it, the table of kinds."""
import math
import re
from collections import defaultdict

import pytest
import torch

import evaluate
from conftest import call, random_model, write_lines
from evaluate import (Memory, beam_search, build_trie, count_pairs, leaf_of_items, make_memory,
                      recall, search_all, what_training_showed, yardsticks)
from test_evaluate import CPU, K, exhaustive, items_of, random_catalogue, random_prompts, read_lines
from train import user_sequences


def samples_of(sequences: list[list], most: int = 10) -> list[dict]:
    """Every transition of the sequences as a sample."""
    return [{"user_id": str(u), "history": items[max(0, n - most):n], "target": items[n]}
            for u, items in enumerate(sequences) for n in range(1, len(items))]


def slow_counts(sequences: list[list]) -> dict:
    """The definition: each pair within ten steps counts 0.5 ** (distance - 1), the reverse pair half."""
    counts: dict = defaultdict(lambda: defaultdict(float))
    for items in sequences:
        for i in range(len(items)):
            for j in range(i + 1, min(i + 11, len(items))):
                counts[items[i]][items[j]] += 0.5 ** (j - i - 1)
                counts[items[j]][items[i]] += 0.5 * 0.5 ** (j - i - 1)
    return {a: {b: n / (sum(row.values()) + 10) for b, n in row.items()} for a, row in counts.items()}


def random_sequences(count: int, items: int, seed: int = 5) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(items, (int(torch.randint(2, 20, (1,), generator=g)),), generator=g).tolist()
            for _ in range(count)]


def random_memory(trie, count: int, users: int, weight: float) -> tuple[Memory, torch.Tensor]:
    """A memory that knows half of the items for each user, nothing for the last; and its masses (B, N)."""
    g = torch.Generator().manual_seed(4)
    masses = torch.rand(users, count, generator=g) * (torch.rand(users, count, generator=g) < 0.5)
    masses[-1] = 0
    masses *= torch.rand(users, 1, generator=g) / masses.sum(1, keepdim=True).clamp_min(1e-9)
    recalled = [{n: mass for n, mass in enumerate(row.tolist()) if mass} for row in masses]
    return make_memory(recalled, dict(enumerate(leaf_of_items(trie).tolist())), weight, CPU), masses


def mixture(model, codes, sid_ids, prompts, masses, weight) -> torch.Tensor:
    """(1 - lambda m) p_LM + lambda p_memory, item by item; (B, N)."""
    p = torch.stack([exhaustive(model, codes, sid_ids, prompt).exp() for prompt in prompts])
    return (1 - weight * masses.sum(1, keepdim=True)) * p + weight * masses


# ---- counting ----

def test_counts_equal_the_definition():
    sequences = random_sequences(40, 12)
    found, expected = count_pairs(samples_of(sequences)), slow_counts(sequences)
    assert found.keys() == expected.keys()
    for item_id, row in expected.items():
        assert found[item_id] == pytest.approx(row)
        assert sum(row.values()) < 1


def test_recall_by_hand():
    pairs = count_pairs(samples_of([["a", "b", "c"]]))
    assert pairs == {"a": {"b": 1 / 11.5, "c": 0.5 / 11.5}, "b": {"a": 0.5 / 11.5, "c": 1 / 11.5},
                     "c": {"b": 0.5 / 10.75, "a": 0.25 / 10.75}}
    found = recall(["b", "a"], pairs)
    # a is the last item and weighs 1, b weighs 0.5
    mass = {"b": 1 / 11.5, "c": 0.5 / 11.5 + 0.5 / 11.5, "a": 0.5 * 0.5 / 11.5}
    assert found == pytest.approx({item: n / 1.5 for item, n in mass.items()})
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert recall(["z"], pairs) == {} and recall([], pairs) == {}


# ---- the search ----

@pytest.mark.parametrize("num_levels, weight", [(2, 0.3), (3, 0.3), (4, 0.9), (3, 0.99), (3, 0.0)])
def test_all_beams_give_the_mixture(num_levels, weight):
    model, (codes, sid_ids), prompts = random_model("qwen2"), random_catalogue(num_levels, 30), random_prompts()
    trie = build_trie(codes, K, CPU)
    memory, masses = random_memory(trie, len(codes), len(prompts), weight)
    leaves, scores = beam_search(model, trie, sid_ids, prompts, len(codes), memory=memory)
    expected = mixture(model, codes, sid_ids, prompts, masses, weight)
    for row in range(len(prompts)):
        found = items_of(trie, leaves[row])
        assert sorted(found) == list(range(len(codes)))
        torch.testing.assert_close(scores[row].exp(), expected[row, found], atol=1e-6, rtol=1e-4)
    plain = beam_search(model, trie, sid_ids, prompts, len(codes))
    torch.testing.assert_close(scores[-1], plain[1][-1])                # nothing remembered: p_LM alone


def test_every_prefix_has_the_mass_of_its_items():
    codes, _ = random_catalogue(3, 60)
    trie = build_trie(codes, K, CPU)
    memory, masses = random_memory(trie, len(codes), 3, 0.5)
    for depth in (1, 2, 3):
        prefixes = sorted({tuple(row[:depth]) for row in codes.tolist()})
        nodes = torch.arange(len(prefixes)).expand(3, 1, -1)
        expected = torch.stack([0.5 * masses[:, [tuple(row[:depth]) == prefix for row in codes.tolist()]].sum(1)
                                for prefix in prefixes], 1)
        torch.testing.assert_close(evaluate.remembered(trie, depth, nodes, memory)[:, 0], expected)


def test_few_beams_follow_the_mixture():
    """With one beam the search takes the child with the most probability, model and memory together."""
    model, (codes, sid_ids), prompts = random_model("qwen2"), random_catalogue(3, 40), random_prompts()
    trie = build_trie(codes, K, CPU)
    memory, masses = random_memory(trie, len(codes), len(prompts), 0.5)
    expected = mixture(model, codes, sid_ids, prompts, masses, 0.5)
    leaves, _ = beam_search(model, trie, sid_ids, prompts, 1, memory=memory)
    for row in range(len(prompts)):
        rows = list(range(len(codes)))
        for level in range(3):
            mass = defaultdict(float)
            for n in rows:
                mass[int(codes[n, level])] += float(expected[row, n])
            best = max(mass, key=mass.get)
            rows = [n for n in rows if codes[n, level] == best]
        assert items_of(trie, leaves[row]) == rows


def test_skipped_items_stay_away():
    model, (codes, sid_ids), prompts = random_model("qwen2"), random_catalogue(3, 40), random_prompts()
    trie = build_trie(codes, K, CPU)
    recalled = [{0: 0.5, 7: 0.5}] * len(prompts)
    rankings = search_all(model, trie, sid_ids, list(range(len(codes))), prompts, 40, 100,
                          [{0, 3}] * len(prompts), recalled, 0.9)
    for ranking in rankings:
        assert len(ranking.items) == len(codes) - 2 and not {0, 3} & set(ranking.items) and ranking.items[0] == 7


def test_draws_from_the_mixture():
    """Sampling with a memory: distinct items, exact probabilities, first draws in their proportion."""
    model, (codes, sid_ids) = random_model("qwen2", rows=110, seed=3), random_catalogue(3, 20)
    trie, users = build_trie(codes, K, CPU), 4000
    prompts, recalled = [[5, 17]] * users, [{1: 0.75, 2: 0.25}] * users
    memory = make_memory(recalled, dict(enumerate(leaf_of_items(trie).tolist())), 0.4, CPU)
    masses = torch.zeros(1, len(codes))
    masses[0, 1], masses[0, 2] = 0.75, 0.25
    expected = mixture(model, codes, sid_ids, prompts[:1], masses, 0.4)[0]
    leaves, scores = beam_search(model, trie, sid_ids, prompts, 3, memory=memory,
                                 sample=torch.Generator().manual_seed(0))
    items = torch.from_numpy(trie.leaf_items)[leaves]
    assert (items.sort(1).values.diff(dim=1) > 0).all()
    torch.testing.assert_close(scores.exp(), expected[items], atol=1e-5, rtol=1e-4)
    share = torch.bincount(items[:, 0], minlength=len(codes)) / users
    assert ((share - expected) / (expected * (1 - expected) / users).sqrt()).abs().max() < 4


# ---- yardstick, kinds, command line ----

def test_skip_gram_by_hand():
    train = samples_of([list("abc"), list("dc"), list("dc"), list("ab")])
    samples = [{"history": ["b"]}, {"history": ["z"]}]
    recalled = [recall(sample["history"], count_pairs(train)) for sample in samples]
    ranked = yardsticks(train, samples, list("abcd"), [set(), set()], recalled, 4)["skip-gram"]
    # after b: a has 0.5 + 0.5, c has 1, so popularity decides: c is a target three times; then the popular
    assert ranked[0] == ["c", "a", "b", "d"]
    assert ranked[1] == ["c", "b", "a", "d"]                            # nothing is known of z: the popular


def test_kinds_by_hand():
    train = samples_of([list("abcd"), list("ef")])
    history = ["a", "b"]
    for target, kind in zip("acdfx", evaluate.KINDS):
        samples = [{"history": history, "target": target}]
        assert what_training_showed(train, count_pairs(train), samples) == [kind]


def test_hits_by_level_by_hand():
    sid_of = {1: ["<a_0>", "<b_0>"], 2: ["<a_0>", "<b_1>"], 3: ["<a_1>", "<b_0>"]}
    # right; first code right; both wrong, though the second codes agree; nothing found
    ranked = [[1, 2], [2, 1], [3], []]
    assert evaluate.hits_by_level([1, 1, 1, 1], ranked, sid_of) == [0.5, 0.25]


def test_table_metrics_and_shares(run, tmp_path, capsys):
    metrics, predictions = tmp_path / "metrics.jsonl", tmp_path / "predictions.jsonl"
    flags = "--run", run, "--metrics", metrics, "--predictions", predictions
    call(evaluate, *flags, "--memory", 0.6)
    rows = {row["method"]: row for row in read_lines(metrics)}
    assert list(rows) == ["popularity", "bigram", "skip-gram", "sft.pt", "sft.pt + memory 0.6"]
    for row in rows.values():
        assert sum(kind["n"] for kind in row["kinds"].values()) == row["n"]
        hits = sum(kind["n"] * kind["HR@10"] for kind in row["kinds"].values())
        assert hits == pytest.approx(row["n"] * row["HR@10"])
        assert sorted(row["codes"], reverse=True) == row["codes"] and row["codes"][-1] == row["HR@1"]
    out = capsys.readouterr().out
    assert "HR@1 / HR@10 of targets" in out and "code 3 of the best item" in out and all(kind in out for kind in rows["sft.pt"]["kinds"])
    mixed = read_lines(predictions)
    call(evaluate, *flags, "--memory", 0)
    assert [row["method"] for row in read_lines(metrics)[5:]] == list(rows)[:4]
    assert read_lines(predictions) != mixed

    sample = read_lines(run / "test.jsonl")[0]
    history = ",".join(map(str, sample["history"]))
    capsys.readouterr()
    call(evaluate, "--run", run, "--history", history, "--memory", 0.999)
    shares = [int(share) for share in re.findall(r" (\d+)% ", capsys.readouterr().out)]
    assert len(shares) == 10 and max(shares) > 50


def test_purchases_of_yesterday_count_without_training(run, tmp_path):
    """--memory-from counts another file: its pairs are recommended, train.jsonl's are not."""
    sample = read_lines(run / "test.jsonl")[0]
    rows = [{"user_id": "new", "history": [sample["history"][-1]], "target": 59}] * 200
    flags = ["--run", run, "--metrics", tmp_path / "m.jsonl", "--predictions", tmp_path / "p.jsonl"]
    call(evaluate, *flags, "--memory-from", write_lines(tmp_path / "new.jsonl", rows), "--memory", 0.99)
    first = read_lines(tmp_path / "p.jsonl")[0]
    assert first["items"][0] == 59 and first["scores"][0] > math.log(0.45)


def test_samples_count_every_pair_of_a_sequence_once():
    sequences = random_sequences(30, 25)
    samples = samples_of(sequences)
    whole = [row["items"] for row in user_sequences(samples)]
    assert whole == sequences
    assert count_pairs(samples) == count_pairs(samples_of(whole))
