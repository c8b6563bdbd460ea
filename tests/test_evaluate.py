"""Stage 6: search against exhaustive scoring and Hugging Face's beams, trie, metrics, command line."""
import itertools
import json
import math
import re
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import evaluate
import extract_semantics
import init_embeddings
import tokenize_items
from conftest import assert_stops, call, random_model, toy_items, write_lines
from evaluate import (beam_search, build_trie, parse_args, rank_metrics, rank_of, search_all, tree_mask,
                      yardsticks)

CPU = torch.device("cpu")
KINDS = ("qwen2", "qwen3", "llama", "gpt2")
K = 6                                   # codes per level in the random catalogues
TEXT_ROWS = 70                          # prompts use ids below this, SID tokens those above


def random_catalogue(num_levels: int, count: int, k: int = K, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Distinct SIDs in random order, (N, L), and scrambled vocabulary ids of the SID tokens, (L, K)."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.unique(torch.randint(k, (count, num_levels), generator=g), dim=0)
    ids = TEXT_ROWS + torch.randperm(num_levels * k, generator=g).view(num_levels, k)
    return codes[torch.randperm(len(codes), generator=g)], ids


def random_prompts(lengths=(1, 5, 23, 9), seed: int = 2) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, TEXT_ROWS, (n,), generator=g).tolist() for n in lengths]


def children_of(codes: Tensor) -> dict[tuple[int, ...], list[int]]:
    """Which codes may follow each prefix."""
    kids: dict = {}
    for row in codes.tolist():
        for level, code in enumerate(row):
            kids.setdefault(tuple(row[:level]), set()).add(code)
    return {prefix: sorted(codes) for prefix, codes in kids.items()}


@torch.no_grad()
def sid_logits(model, codes: Tensor, sid_ids: Tensor, prompt: list[int]) -> Tensor:
    """Logits of each level's codes, every SID written out behind the prompt; (N, L, K)."""
    levels = range(codes.shape[1])
    sids = torch.stack([sid_ids[level][codes[:, level]] for level in levels], 1)                # (N, L)
    ids = torch.cat([torch.tensor(prompt).expand(len(codes), -1), sids[:, :-1]], 1)
    logits = model(ids, use_cache=False).logits[:, len(prompt) - 1:]                            # (N, L, V)
    return torch.stack([logits[:, level, sid_ids[level]] for level in levels], 1)


def exhaustive(model, codes: Tensor, sid_ids: Tensor, prompt: list[int]) -> Tensor:
    """Exact log-probability of every item's SID among the trie's children, (N,)."""
    kids, logits = children_of(codes), sid_logits(model, codes, sid_ids, prompt)
    scores = torch.zeros(len(codes))
    for n, row in enumerate(codes.tolist()):
        for level, code in enumerate(row):
            legal = kids[tuple(row[:level])]
            scores[n] += logits[n, level, legal].log_softmax(0)[legal.index(code)]
    return scores


def items_of(trie, leaves: Tensor) -> list[int]:
    """Rows of the catalogue for leaves that stand for one item each."""
    assert all(trie.leaf_start[n + 1] - trie.leaf_start[n] == 1 for n in leaves.tolist())
    return [int(trie.leaf_items[trie.leaf_start[n]]) for n in leaves.tolist()]


# ---- the search ----

def assert_search_is_exhaustive(model, codes, sid_ids, prompts) -> None:
    """Search with more beams than items finds all items, best first, with their exact log-probabilities."""
    trie = build_trie(codes, K, CPU)
    leaves, scores = beam_search(model, trie, sid_ids, prompts, len(codes) + 3)
    for row, prompt in enumerate(prompts):
        expected = exhaustive(model, codes, sid_ids, prompt)
        found = items_of(trie, leaves[row][scores[row] > -torch.inf])
        assert sorted(found) == list(range(len(codes)))
        torch.testing.assert_close(scores[row, :len(codes)], expected[found], atol=1e-5, rtol=1e-5)
        assert (expected[found].diff() <= 1e-5).all()                   # near ties in either order
        assert scores[row].double().exp().sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("num_levels, kind, tied", [*itertools.product((2, 3, 4), KINDS, (True, False))])
def test_wide_search_is_exhaustive_ranking(num_levels, kind, tied):
    assert_search_is_exhaustive(random_model(kind, tied), *random_catalogue(num_levels, 30), random_prompts())


@pytest.mark.parametrize("share", (0.1, 0.5, 1.0))
def test_new_items_count_as_their_average_sibling(share):
    """Where n codes follow a prefix, each new one has 1 / n; the others share the rest as the model says."""
    model, (codes, sid_ids), prompts = random_model("qwen2"), random_catalogue(3, 60), random_prompts()
    new = torch.rand(len(codes), generator=torch.Generator().manual_seed(8)) < share
    known = {tuple(row[:level]) for row in codes[~new].tolist() for level in range(4)}
    kids = children_of(codes)

    def probability(logits, prefix, code) -> float:
        legal = kids[prefix]
        old = [c for c in legal if (*prefix, c) in known] or legal      # all new: the model's own
        if code not in old:
            return 1 / len(legal)
        return logits[old].softmax(0)[old.index(code)].item() * len(old) / len(legal)

    trie = build_trie(codes, K, CPU, new)
    leaves, scores = beam_search(model, trie, sid_ids, prompts, len(codes))
    for row, prompt in enumerate(prompts):
        logits = sid_logits(model, codes, sid_ids, prompt)
        expected = torch.zeros(len(codes))
        for n, sid in enumerate(codes.tolist()):
            for level, code in enumerate(sid):
                expected[n] += math.log(probability(logits[n, level], tuple(sid[:level]), code))
        torch.testing.assert_close(scores[row], expected[items_of(trie, leaves[row])], atol=1e-5, rtol=1e-5)
        assert scores[row].double().exp().sum() == pytest.approx(1, abs=1e-5)
    plain = beam_search(model, build_trie(codes, K, CPU), sid_ids, prompts, len(codes))
    assert torch.equal(plain[1], scores) == (share == 1)


class TrieProcessor(LogitsProcessor):
    """The constraint for Hugging Face's beams: mask what the trie does not allow, renormalise the rest."""

    def __init__(self, codes, sid_ids, prompt_length):
        self.kids, self.ids, self.start = children_of(codes), sid_ids, prompt_length
        self.code_of = [{int(i): c for c, i in enumerate(row)} for row in sid_ids]

    def __call__(self, input_ids, scores):
        out, level = torch.full_like(scores, -torch.inf), input_ids.shape[1] - self.start
        for row, ids in enumerate(input_ids[:, self.start:].tolist()):
            if all(i in self.code_of[place] for place, i in enumerate(ids)):    # else a filler beam
                kids = self.kids.get(tuple(self.code_of[place][i] for place, i in enumerate(ids)))
                if kids:
                    legal = self.ids[level][kids]
                    out[row, legal] = scores[row, legal].log_softmax(0)
        return out


def hugging_face_beams(model, codes, sid_ids, prompts, num_beams) -> list[dict[tuple, float]]:
    """SIDs and scores per prompt by model.generate on one left-padded batch."""
    num_levels, width = codes.shape[1], max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=num_beams, num_return_sequences=num_beams,
        do_sample=False, max_new_tokens=num_levels, length_penalty=0.0, early_stopping=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        logits_processor=LogitsProcessorList([TrieProcessor(codes, sid_ids, width)]))
    code_of = [{int(i): c for c, i in enumerate(row)} for row in sid_ids]
    found = [{} for _ in prompts]
    for n, (row, score) in enumerate(zip(out.sequences[:, width:].tolist(), out.sequences_scores.tolist())):
        if score > -1e8:
            found[n // num_beams][tuple(code_of[level][i] for level, i in enumerate(row))] = score
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_same_beams_as_hugging_face(kind):
    model = random_model(kind, tied=kind != "llama", rows=TEXT_ROWS + 36, seed=3)
    codes, sid_ids = random_catalogue(3, 300, k=12)
    trie, prompts = build_trie(codes, 12, CPU), random_prompts((7, 3, 12), seed=4)
    best = [exhaustive(model, codes, sid_ids, prompt).argsort(descending=True).tolist() for prompt in prompts]
    pruned = 0
    for num_beams in (4, 15):
        leaves, scores = beam_search(model, trie, sid_ids, prompts, num_beams)
        batch = hugging_face_beams(model, codes, sid_ids, prompts, num_beams)
        for row, prompt in enumerate(prompts):
            items = items_of(trie, leaves[row])
            ours = {tuple(codes[n].tolist()): s for n, s in zip(items, scores[row].tolist())}
            assert len(ours) == num_beams
            for theirs in (*hugging_face_beams(model, codes, sid_ids, [prompt], num_beams), batch[row]):
                assert list(ours) == list(theirs)
                assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-4)
            pruned += set(items) != set(best[row][:num_beams])
    assert pruned, "these beams prune nothing: the comparison is too easy"


@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_does_not_matter(kind):
    model = random_model(kind, seed=5)
    codes, sid_ids = random_catalogue(3, 60)
    trie, item_ids = build_trie(codes, K, CPU), [f"item {n}" for n in range(len(codes))]
    prompts = random_prompts((4, 31, 1, 12, 4, 9))
    together = search_all(model, trie, sid_ids, item_ids, prompts, 7, 10 ** 6)
    few = search_all(model, trie, sid_ids, item_ids, prompts, 7, 24)    # several ragged batches, some of one
    for row, prompt in enumerate(prompts):
        alone, = search_all(model, trie, sid_ids, item_ids, [prompt], 7, 1)
        assert len(alone.items) == len(set(alone.items)) == len(alone.scores) == 7
        assert alone.items == [item_ids[n] for n in items_of(trie, torch.tensor(alone.leaves))]
        assert alone.scores == sorted(alone.scores, reverse=True) and all(map(math.isfinite, alone.scores))
        for other in (together[row], few[row]):
            assert (alone.items, alone.leaves) == (other.items, other.leaves)
            assert alone.scores == pytest.approx(other.scores, abs=1e-5)


def test_generation_config_has_no_say():
    model = random_model("qwen2")
    codes, sid_ids = random_catalogue(3, 60)
    trie, prompts = build_trie(codes, K, CPU), random_prompts()
    before = beam_search(model, trie, sid_ids, prompts, 5)
    for key, value in {"do_sample": True, "repetition_penalty": 1.3, "temperature": 0.1, "top_k": 1}.items():
        setattr(model.generation_config, key, value)
    assert all(map(torch.equal, before, beam_search(model, trie, sid_ids, prompts, 5)))


def test_tree_mask():
    # two users with prompts of 3 and 1 tokens; at the second depth, beams 0 and 1 of user 0 both descend from
    # slot 1 of the first depth, those of user 1 from slots 0 and 1
    ancestors = [torch.tensor([[1, 1], [0, 1]]), torch.tensor([[0, 1], [0, 1]])]
    mask = tree_mask(torch.tensor([3, 1]), 3, ancestors, [2, 2])
    assert mask.shape == (2, 1, 2, 7)
    assert mask[:, 0].int().tolist() == [[[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 0, 1]],
                                         [[1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0, 1]]]


# ---- the trie ----

def dict_trie(codes: list[list[int]]) -> dict:
    root: dict = {}
    for row in codes:
        node = root
        for code in row:
            node = node.setdefault(code, {})
    return root


def assert_trie(codes: Tensor, codebook_size: int) -> None:
    """The flat trie holds the same prefixes as one of nested dictionaries."""
    trie, num_levels = build_trie(codes, codebook_size, CPU), codes.shape[1]
    frontier = [(0, dict_trie(codes.tolist()), ())]                     # node, the dict's node, prefix
    for level in range(num_levels):
        assert len(trie.first_child[level]) == len(frontier) + 1
        below = []
        for node, expected, prefix in frontier:
            first, last = trie.first_child[level][node:node + 2].tolist()
            kids = trie.codes[level][first:last].tolist()
            assert kids == sorted(expected)
            below += [(first + j, expected[c], prefix + (c,)) for j, c in enumerate(kids)]
        assert [node for node, _, _ in below] == list(range(len(trie.codes[level])))
        assert trie.max_children[level] == max(len(expected) for _, expected, _ in frontier)
        frontier = below
    assert sorted(trie.leaf_items.tolist()) == list(range(len(codes)))
    leaf_of = evaluate.leaf_of_items(trie)
    for leaf, _, prefix in frontier:
        rows = trie.leaf_items[trie.leaf_start[leaf]:trie.leaf_start[leaf + 1]].tolist()
        assert rows == [n for n, row in enumerate(codes.tolist()) if tuple(row) == prefix]  # in order
        assert (leaf_of[rows] == leaf).all()


@pytest.mark.parametrize("num_levels, codebook_size, count", [
    (2, 4, 10), (3, 3, 60), (3, 256, 500), (4, 5, 90), (8, 128, 20), (3, 2, 1)])
def test_trie_equals_a_dictionary(num_levels, codebook_size, count):
    g = torch.Generator().manual_seed(num_levels * count)
    codes = torch.randint(codebook_size, (count, num_levels), generator=g)
    assert_trie(torch.cat([codes, codes[:count // 3]]), codebook_size)  # with duplicates


LOPSIDED = {
    "one item": [[3, 0, 5]],
    "one first code": [[2, b, c] for b in range(3) for c in range(4)],
    "a level with one child": [[a, 5, c] for a in range(4) for c in range(a + 1)],
    "fans of different width": [[0, 0, 0]] + [[1, b, 0] for b in range(6)] + [[2, 2, c] for c in range(6)],
    "two levels": [[a, b] for a in range(5) for b in range(0, 6, a + 1)],
    "four levels": [[a, b, (a * b) % 6, d] for a in range(2) for b in range(3) for d in range(b + 1)],
}


@pytest.mark.parametrize("sids", [*LOPSIDED.values(), [[1, 2, 3]] * 3], ids=[*LOPSIDED, "one SID"])
def test_lopsided_catalogues(sids):
    codes = torch.tensor(sids)
    assert_trie(codes, K)
    trie, distinct = build_trie(codes, K, CPU), len(torch.unique(codes, dim=0))
    model, sid_ids = random_model("llama"), TEXT_ROWS + torch.arange(24).view(4, K)[:codes.shape[1]]
    item_ids, prompts = list(range(len(codes))), random_prompts((2, 6))
    for num_beams in (1, 4, 20):
        for found in search_all(model, trie, sid_ids, item_ids, prompts, num_beams, 99):
            # a narrow beam may descend into prefixes with few items, but never comes back with nothing
            assert len(found.leaves) == len(set(found.leaves)) == min(num_beams, distinct)
            assert all(0 <= leaf < distinct for leaf in found.leaves)
            assert all(-math.inf < score <= 1e-6 for score in found.scores)
            assert len(found.items) == len(found.scores) >= len(found.leaves)


# ---- metrics and yardsticks ----

def test_rank_metrics_by_hand():
    # ranks 1, 3, 7, not found, 11: discounts 1 / log2(rank + 1) = 1, 1/2, 1/3, 0, (beyond 10)
    metrics = rank_metrics([1, 3, 7, None, 11], (1, 3, 10))
    assert metrics == pytest.approx({
        "HR@1": 1 / 5, "HR@3": 2 / 5, "HR@10": 3 / 5,
        "NDCG@1": 1 / 5, "NDCG@3": (1 + 1 / 2) / 5, "NDCG@10": (1 + 1 / 2 + 1 / 3) / 5})
    assert set(rank_metrics([None, None], (1, 5)).values()) == {0.0}
    assert rank_of("b", ["a", "b", "b"]) == 2 and rank_of("c", ["a", "b"]) is None


def test_yardsticks_by_hand():
    # targets: r three times, p and q once each, s and t never: r, then p and q, s and t in catalogue order
    train = [{"history": list(history), "target": target} for history, target in
             [("p", "r"), ("qp", "r"), ("p", "q"), ("st", "p"), ("t", "r")]]
    samples, nothing = [{"history": list(history)} for history in ("qp", "t", "r")], [set()] * 3

    def found(item_ids: str, skip: list[set], depth: int) -> tuple[list[str], list[str]]:
        rankings = yardsticks(train, samples, list(item_ids), skip, [{}] * 3, depth)
        return tuple(["".join(ranked) for ranked in rankings[name]] for name in ("popularity", "bigram"))
    # after p: r twice, q once. After t: r and p once each, r more popular. After r: nothing seen
    for depth in (5, 99):
        assert found("pqrst", nothing, depth) == (["rpqst"] * 3, ["rqpst", "rpqst", "rpqst"])
    assert found("pqrst", nothing, 2) == (["rp"] * 3, ["rq", "rp", "rp"])
    # candidates without r: nothing outside them is recommended
    assert found("pqst", nothing, 3) == (["pqs"] * 3, ["qps", "pqs", "pqs"])
    # and each user's own items to skip
    assert found("pqrst", [{"r", "p"}, set(), {"r"}], 2) == (["qs", "rp", "pq"], ["qs", "rp", "pq"])


# ---- the command line ----

def snapshot(folder) -> dict[str, bytes]:
    """Every file of a folder with its content, to see that a call wrote nothing."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_recount(metrics: dict, ranks: list[int | None], cutoffs: tuple[int, ...]) -> None:
    """HR@K and NDCG@K once more, the long way."""
    for k in cutoffs:
        hits = [r for r in ranks if r is not None and r <= k]
        gains = [math.log(2) / math.log(r + 1) for r in hits]
        assert metrics[f"HR@{k}"] == pytest.approx(len(hits) / len(ranks))
        assert metrics[f"NDCG@{k}"] == pytest.approx(sum(gains) / len(ranks))


def ranks_in(predictions: list[dict]) -> list[int | None]:
    """The rank of each user's target in predictions.jsonl."""
    return [p["items"].index(p["target"]) + 1 if p["target"] in p["items"] else None for p in predictions]


MEMORY = f"memory {parse_args([]).memory:g}"
METHODS = ["popularity", "bigram", "skip-gram", "sft.pt", f"sft.pt + {MEMORY}"]


def test_files_and_table(run, capsys):
    call(evaluate, "--run", run, "--show", 2)
    out = capsys.readouterr().out
    for name in METHODS:
        assert re.search(rf"^{re.escape(name)} +item( +\d\.\d{{4}}){{8}}$", out, re.M), out
    assert out.count("\nrecommendations") == out.count("\ntarget: ") == 2
    assert "nan" not in out.lower()

    samples, items = read_lines(run / "test.jsonl"), read_lines(run / "items.jsonl")
    predictions, metrics = read_lines(run / "predictions.jsonl"), read_lines(run / "metrics.jsonl")
    assert [m["method"] for m in metrics] == METHODS
    for m in metrics:
        assert {"method", "task", "split", "level", "n", "num_beams", "HR@1", "HR@3", "HR@5", "HR@10",
                "NDCG@1", "NDCG@3", "NDCG@5", "NDCG@10", "seconds"} <= set(m)
        assert (m["task"], m["split"], m["level"]) == ("next_brief", "test", "item")
        assert (m["n"], m["num_beams"]) == (len(samples), 20)
    for name in ("user_id", "target"):
        assert [p[name] for p in predictions] == [s[name] for s in samples]
    for p in predictions:
        assert set(p) == {"user_id", "target", "items", "scores"}
        assert len(p["items"]) == len(set(p["items"])) == len(p["scores"]) == 20
        assert set(p["items"]) <= {i["item_id"] for i in items}
        assert p["scores"] == sorted(p["scores"], reverse=True) and all(map(math.isfinite, p["scores"]))
    train = Counter(s["target"] for s in read_lines(run / "train.jsonl"))
    popular = sorted((i["item_id"] for i in items), key=lambda i: (-train[i], i))[:20]
    assert_recount(metrics[-1], ranks_in(predictions), (1, 5, 10, 20))
    assert_recount(metrics[0], ranks_in([{**s, "items": popular} for s in samples]), (1, 5, 10, 20))

    # a second run appends to the metrics, replaces the predictions, and finds the same
    first = (run / "metrics.jsonl").read_text()
    call(evaluate, "--run", run, "--batch-tokens", 100)
    assert (run / "metrics.jsonl").read_text().startswith(first)
    assert len(read_lines(run / "metrics.jsonl")) == 2 * len(METHODS)
    for a, b in zip(predictions, read_lines(run / "predictions.jsonl")):
        assert a["items"][:3] == b["items"][:3] and a["scores"] == pytest.approx(b["scores"], abs=1e-4)


def test_flags_for_files_and_split(run, tmp_path):
    call(evaluate, "--run", run, "--split", "valid", "--limit", 3, "--num-beams", 5,
         "--checkpoint", run / "init.pt", "--metrics", tmp_path / "m.jsonl",
         "--predictions", tmp_path / "new" / "p.jsonl")
    model = read_lines(tmp_path / "m.jsonl")[-1]
    assert (model["method"], model["split"]) == (f"init.pt + {MEMORY}", "valid")
    assert (model["n"], model["num_beams"]) == (3, 5)
    assert len(read_lines(tmp_path / "new" / "p.jsonl")) == 3
    assert not (run / "metrics.jsonl").exists() and not (run / "predictions.jsonl").exists()


@pytest.mark.parametrize("memory, num_beams", [(0, 100), (0.6, 20)])
def test_candidates_are_the_full_ranking_without_the_others(run, tmp_path, memory, num_beams):
    """Also below a prefix whose only candidate is new, or the only one in stock."""
    old = read_lines(run / "items.jsonl")
    call(tokenize_items, "--run", run, "--add", write_lines(tmp_path / "new.jsonl", [
        {**old[0], "item_id": "n1"}]))
    items = tokenize_items.read_catalogue(run / "items.jsonl")
    prefix = items[-1]["sid"][0]
    assert any(item["sid"][0] == prefix for item in items[:-1])
    shown = ["n1"] + [item["item_id"] for item in items[:-1] if item["sid"][0] != prefix][::4]
    assert len(shown) < 20
    some = write_lines(tmp_path / "some.jsonl", [{"item_id": i} for i in shown])
    flags = ["--run", run, "--memory", memory, "--predictions", tmp_path / "p.jsonl", "--num-beams"]
    call(evaluate, *flags, 100)
    every = read_lines(tmp_path / "p.jsonl")
    call(evaluate, *flags, num_beams, "--candidates", some)
    for full, p in zip(every, read_lines(tmp_path / "p.jsonl"), strict=True):
        left = {i: score for i, score in zip(full["items"], full["scores"]) if i in shown}
        assert p["items"] == list(left) and len(left) == len(shown)
        assert p["scores"] == pytest.approx(list(left.values()), abs=1e-4)
    rows = read_lines(run / "metrics.jsonl")
    assert all(row["HR@20"] < 1 for row in rows if row["candidates"])


def test_hidden_items_of_a_shared_sid_and_of_lopsided_tries():
    """Few beams reach exactly as many candidates; the others never come, not even as padding."""
    codes = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 2], [1, 0], [2, 3], [2, 4]])
    model, sid_ids = random_model("qwen2"), TEXT_ROWS + torch.arange(2 * K).view(2, K)
    full, = search_all(model, build_trie(codes, K, CPU), sid_ids, list("abcdefg"), [[1, 2]], 9, 100)
    for shown in ("c", "e", "ag", "bcd", "efg", "abcdefg"):
        rows = torch.tensor(["abcdefg".index(name) for name in shown])
        hidden = torch.tensor([name not in shown for name in "abcdefg"])
        trie = build_trie(codes, K, CPU, hidden=hidden)
        for num_beams in (1, 2, 9):
            found, = search_all(model, trie, sid_ids, list("abcdefg"), [[1, 2]], num_beams, 100,
                                hidden=set("abcdefg") - set(shown))
            assert set(found.items) <= set(shown)
            assert len(found.leaves) == min(num_beams, len(set(map(tuple, codes[rows].tolist()))))
        assert found.items == [item for item in full.items if item in shown]


def test_the_memory_orders_the_items_of_a_sid():
    model, (codes, sid_ids) = random_model("qwen2"), random_catalogue(3, 20)
    codes = codes[:10].repeat_interleave(2, 0)                          # two items on each SID
    trie, names = build_trie(codes, K, CPU), [f"item {n}" for n in range(20)]
    recalled = {"item 7": 0.3, "item 6": 0.1, "item 0": 0.2}
    for weight, order in ((0.5, ["item 7", "item 6"]), (0.0, ["item 6", "item 7"])):
        found, = search_all(model, trie, sid_ids, names, [[1, 2]], 10, 100, None, [recalled], weight)
        assert [name for name in found.items if name in order] == order
        assert [name for name in found.items if name in ("item 0", "item 1")] == ["item 0", "item 1"]


def test_an_item_s_own_fields_do_not_count_as_a_sample(run):
    items = read_lines(run / "items.jsonl")
    write_lines(run / "items.jsonl", [{**item, "target": "men", "history": "2019"} for item in items])
    call(evaluate, "--run", run, "--task", "title2sid", "--limit", 5, "--show", 1, "--exclude-history")
    predictions = read_lines(run / "predictions.jsonl")
    assert [p["target"] for p in predictions] == [i["item_id"] for i in items[:5]]
    assert [p["title"] for p in predictions] == [i["title"] for i in items[:5]]


def test_fewer_than_ten_beams_have_no_hits_at_ten(run, capsys):
    call(evaluate, "--run", run, "--num-beams", 5, "--memory-from", run / "valid.jsonl")
    rows = read_lines(run / "metrics.jsonl")
    assert not any(row["kinds"] for row in rows) and "never seen" not in capsys.readouterr().out
    assert {row["memory_from"] for row in rows} == {str(run / "valid.jsonl")}


def test_shown_prompts_and_keywords_that_are_numbers(run, capsys):
    rows = read_lines(run / "semantics.jsonl")
    write_lines(run / "semantics.jsonl", [{**row, "keywords": [12, *row["keywords"]]} for row in rows])
    samples = read_lines(run / "test.jsonl")
    write_lines(run / "test.jsonl", [{**sample, "user_id": n} for n, sample in enumerate(samples)])
    call(evaluate, "--run", run, "--show", 1, "--limit", 3)
    assert "prompt: The user bought <a_" in capsys.readouterr().out
    assert [p["user_id"] for p in read_lines(run / "predictions.jsonl")] == [0, 1, 2]


def test_history_in_words(run, capsys):
    before, titles = snapshot(run), {i["item_id"]: i["title"] for i in toy_items()}
    call(evaluate, "--run", run, "--history", "12,55, 8")
    history, recommended = capsys.readouterr().out.split("recommendations")
    assert all(titles[i] in history for i in (12, 55, 8))
    found = re.findall(r"^ +(\d+) +(-\d+\.\d+) +\d+% (\d+) (.+)$", recommended, re.M)
    assert [int(rank) for rank, *_ in found] == list(range(1, 11))
    assert all(titles[int(i)] == title for _, _, i, title in found)
    assert len(re.findall(r"<a_\d+> .*<b_\d+> .*<c_\d+> ", recommended)) == 10      # tokens with meanings
    assert snapshot(run) == before


def test_new_items_join_an_old_checkpoint(run, tmp_path, capsys, monkeypatch):
    new = [{"item_id": "n1", "title": "Acme copper wire number 100", "description": "A sturdy copper wire."},
           {"item_id": "n2", "title": "Acme clay pot number 101", "description": "A pot for the garden."}]
    call(tokenize_items, "--run", run, "--add", write_lines(tmp_path / "new.jsonl", new))
    call(evaluate, "--run", run, "--num-beams", 100, "--memory", 0)
    averaged = read_lines(run / "predictions.jsonl")
    sid_of = {i["item_id"]: i["sid"] for i in read_lines(run / "items.jsonl")}
    for p in averaged:
        assert len(p["items"]) == 62 and {"n1", "n2"} < set(p["items"])
        chance = dict(zip(p["items"], map(math.exp, p["scores"])))
        assert sum(chance.values()) == pytest.approx(1, abs=1e-4)
        for name in ("n1", "n2"):                                       # 1 / n of a prefix that n items share
            siblings = [i for i, sid in sid_of.items() if sid[:-1] == sid_of[name][:-1]]
            assert chance[name] == pytest.approx(sum(chance[i] for i in siblings) / len(siblings), rel=1e-3)
    capsys.readouterr()
    call(evaluate, "--run", run, "--history", "n1,3")
    assert new[0]["title"] in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "new_items", lambda *_: set())        # the model's own scores are others
    call(evaluate, "--run", run, "--num-beams", 100, "--memory", 0)
    assert read_lines(run / "predictions.jsonl") != averaged


def test_lists_do_not_depend_on_the_batch(run, tmp_path):
    samples = read_lines(run / "test.jsonl")
    for n, sample in enumerate(samples):
        sample["history"] = (sample["history"] * 9)[:1 + n % 7]         # histories of 1 to 7 items
    write_lines(run / "test.jsonl", samples)
    flags = ("--run", run, "--exclude-history", "--num-beams", 4, "--predictions")
    call(evaluate, *flags, tmp_path / "together.jsonl")
    call(evaluate, *flags, tmp_path / "alone.jsonl", "--batch-tokens", 1)
    together, alone = (read_lines(tmp_path / f"{name}.jsonl") for name in ("together", "alone"))
    assert [p["items"] for p in together] == [p["items"] for p in alone]


def test_shared_sids(toy_data, tmp_path, capsys):
    """Items that share a SID: ranks follow the catalogue's order, the SID-level figure counts all of them."""
    run = tmp_path / "run"
    # 60 items on 20 SIDs: items i, i + 20 and i + 40 share one
    write_lines(tmp_path / "sids.jsonl", [{"item_id": i["item_id"], "sid": [
        f"<a_{n % 20 // 5}>", f"<b_{n % 5}>", "<c_0>"]} for n, i in enumerate(toy_items())])
    for args in ([tokenize_items, "--data", toy_data, "--sids", tmp_path / "sids.jsonl"], [extract_semantics],
                 [init_embeddings, "--width", 32, "--layers", 1, "--vocab-size", 300, "--pretrain-steps", 2],
                 [evaluate, "--checkpoint", run / "init.pt", "--num-beams", 7, "--memory", 0]):
        call(*args, "--run", run)
    assert re.search(r"^init.pt +sid( +\d\.\d{4}){6}$", capsys.readouterr().out, re.M)
    metrics, predictions = read_lines(run / "metrics.jsonl"), read_lines(run / "predictions.jsonl")
    assert [(m["method"], m["level"]) for m in metrics] == [
        ("popularity", "item"), ("bigram", "item"), ("skip-gram", "item"), ("init.pt", "item"), ("init.pt", "sid")]
    for p in predictions:
        assert len(p["items"]) == len(p["scores"]) == 21                # 7 SIDs of three items each
        for a in range(0, 21, 3):
            assert p["items"][a:a + 3] == [p["items"][a] + 20 * j for j in range(3)]
            assert len(set(p["scores"][a:a + 3])) == 1
    sid_ranks = ranks_in([{"target": p["target"] % 20, "items": [i % 20 for i in p["items"][::3]]}
                          for p in predictions])
    assert any(sid_ranks)
    assert_recount(metrics[3], ranks_in(predictions), (1, 3, 5))
    assert_recount(metrics[4], sid_ranks, (1, 3, 5))


def collide(run):
    """Give the last line's item the SID of the first line's."""
    items = read_lines(run / "items.jsonl")
    items[-1]["sid"] = items[0]["sid"]
    write_lines(run / "items.jsonl", items)


def outgrow(run):
    """Append an item whose last code is beyond the checkpoint's 8 codes per level."""
    items = read_lines(run / "items.jsonl")
    items.append({**items[0], "item_id": "new", "sid": ["<a_1>", "<b_2>", "<c_30>"]})
    write_lines(run / "items.jsonl", items)


def change_config(run, **changes):
    """Another configuration in sft.pt."""
    stored = torch.load(run / "sft.pt", weights_only=True)
    stored["config"] = json.dumps({**json.loads(stored["config"]), **changes})
    torch.save(stored, run / "sft.pt")


def narrow(run, window: int = 12):
    """A backbone that attends to so many tokens and no more."""
    change_config(run, use_sliding_window=True, sliding_window=window, max_window_layers=0, layer_types=None)


SAMPLE = {"user_id": "u", "history": [1], "target": 2}
ERRORS = {      # name -> (flags, a change to the run, words of the message)
    "candidates": (["--candidates", "{run}/bad.jsonl"],
                   lambda run: write_lines(run / "bad.jsonl", [{"item_id": 1}, {"item_id": 777}]),
                   ["bad.jsonl", "line 2", "777"]),
    "a list as a candidate": (["--candidates", "{run}/bad.jsonl"],
                              lambda run: write_lines(run / "bad.jsonl", [{"item_id": [1]}]), ["bad.jsonl"]),
    "history": (["--history", "12,777"], None, ["--history", "777"]),
    "an empty history": (["--history", ""], None, ["--history", "''", "commas"]),
    "no comma": (["--history", "1 2"], None, ["--history", "'1 2'", "commas"]),
    "a number as a string": (["--candidates", "{run}/bad.jsonl"],
                             lambda run: write_lines(run / "bad.jsonl", [{"item_id": "1"}]),
                             ["'1'", "not in the catalogue (5 is not '5')"]),
    "no checkpoint": (["--checkpoint", "{run}/none.pt"], None, ["none.pt"]),
    "other SIDs": ([], collide, ["sft.pt", "other SIDs", "stage 1"]),
    "a code the checkpoint lacks": ([], outgrow, ["sft.pt", "other SIDs"]),
    "prompts that are too long": ([], lambda run: change_config(run, max_position_embeddings=12),
                                  ["12", "tokens"]),
    "prompts beyond the window": ([], narrow, ["12", "tokens"]),
    "a broken line": ([], lambda run: (run / "test.jsonl").write_text(json.dumps(SAMPLE) + '\n{"user_id":\n'),
                      ["test.jsonl", "line 2"]),
    "a missing field": ([], lambda run: write_lines(run / "test.jsonl", [{"user_id": "u", "history": [1]}]),
                        ["test.jsonl", "line 1", "target"]),
    "an unknown item": ([], lambda run: write_lines(run / "test.jsonl", [SAMPLE, SAMPLE | {"target": 777}]),
                        ["test.jsonl", "line 2", "777"]),
    "no run": (["--run", "{run}/nowhere"], None, ["nowhere"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(run, capsys, name):
    flags, change, words = ERRORS[name]
    if change:
        change(run)
    before = snapshot(run)
    assert_stops(capsys, call, evaluate, "--run", run, *(flag.format(run=run) for flag in flags), words=words)
    assert snapshot(run) == before


def test_a_window_that_is_wide_enough(run):
    call(evaluate, "--run", run, "--limit", 3, "--metrics", run / "wide.jsonl")
    narrow(run, 500)
    call(evaluate, "--run", run, "--limit", 3, "--metrics", run / "sliding.jsonl")
    wide, sliding = ({**read_lines(run / f"{name}.jsonl")[-1], "seconds": 0} for name in ("wide", "sliding"))
    assert wide == sliding


def test_flags(capsys):
    args = parse_args([])
    assert (args.run, args.num_beams, args.split, args.task) == ("runs/demo", None, "test", None)
    for wrong in (["--num-beams", "0"], ["--batch-tokens", "0"], ["--limit", "-1"], ["--split", "train"],
                  ["--show", "-1"], ["--task", "text2token"], ["--beams", "3"]):
        with pytest.raises(SystemExit) as stopped:
            parse_args(wrong)
        assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err.splitlines()[-1]
