"""Stage 6: the search against exhaustive scoring and against Hugging Face's beams, the trie, the metrics, the CLI."""
import ast
import itertools
import json
import math
import re
from collections import Counter

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import evaluate
import extract_semantics
import init_embeddings
import tokenize_items
from conftest import (ROOT, assert_one_line_error, assert_stops, call, random_model, run_script, toy_items,
                      write_lines)
from evaluate import (beam_search, bigram_rankings, build_trie, length_batches, parse_args, popularity_ranking,
                      rank_metrics, rank_of, search_all, tree_mask)

CPU = torch.device("cpu")
KINDS = ("qwen2", "qwen3", "llama", "gpt2")
K = 6                                   # codes per level in the random catalogues
TEXT_ROWS = 70                          # prompts use ids below this, SID tokens those above


def random_catalogue(num_levels: int, count: int, k: int = K, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct SIDs in random order, (N, L), and vocabulary ids of the SID tokens in a scrambled order, (L, K)."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.unique(torch.randint(k, (count, num_levels), generator=g), dim=0)
    ids = TEXT_ROWS + torch.randperm(num_levels * k, generator=g).view(num_levels, k)
    return codes[torch.randperm(len(codes), generator=g)], ids


def random_prompts(lengths=(1, 5, 23, 9), seed: int = 2) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, TEXT_ROWS, (n,), generator=g).tolist() for n in lengths]


def children_of(codes: torch.Tensor) -> dict[tuple[int, ...], list[int]]:
    """Which codes may follow each prefix."""
    kids: dict = {}
    for row in codes.tolist():
        for l, code in enumerate(row):
            kids.setdefault(tuple(row[:l]), set()).add(code)
    return {prefix: sorted(codes) for prefix, codes in kids.items()}


def legal_log_probs(logits: torch.Tensor, kids: list[int], normalize: str) -> torch.Tensor:
    """Log-probabilities of a level's K codes, -inf where the trie has no child; (K,) -> (K,)."""
    masked = torch.full_like(logits, -torch.inf)
    if normalize == "trie":
        masked[kids] = logits[kids].log_softmax(0)
    else:
        masked[kids] = logits.log_softmax(0)[kids]
    return masked


@torch.no_grad()
def exhaustive(read, codes: torch.Tensor, sid_ids: torch.Tensor, prompt: list[int], normalize: str) -> list[float]:
    """Log-probability of every item's SID, each written out behind the prompt and read on its own.

    `read` turns ids (N, T + L - 1) into logits (N, T + L - 1, V).
    """
    num_levels = codes.shape[1]
    sids = torch.stack([sid_ids[l][codes[:, l]] for l in range(num_levels)], 1)                 # (N, L)
    ids = torch.cat([torch.tensor(prompt).expand(len(codes), -1), sids[:, :-1]], 1)
    logits = read(ids)[:, len(prompt) - 1:]                                                     # (N, L, V)
    kids = children_of(codes)
    return [sum(legal_log_probs(logits[n, l, sid_ids[l]], kids[tuple(row[:l])], normalize)[row[l]].item()
                for l in range(num_levels)) for n, row in enumerate(codes.tolist())]


def items_of(trie, leaves: torch.Tensor) -> list[int]:
    """Rows of the catalogue for leaves that stand for one item each."""
    assert all(trie.leaf_start[n + 1] - trie.leaf_start[n] == 1 for n in leaves.tolist())
    return [int(trie.leaf_items[trie.leaf_start[n]]) for n in leaves.tolist()]


# ---- the search ----

@pytest.mark.parametrize("num_levels, kind, tied", [*itertools.product((2, 3, 4), KINDS, (True, False))])
def test_wide_search_is_exhaustive_ranking(num_levels, kind, tied):
    model = random_model(kind, tied)
    codes, sid_ids = random_catalogue(num_levels, 30)
    trie, prompts = build_trie(codes, K, CPU), random_prompts()
    for normalize in ("trie", "level"):
        leaves, scores = beam_search(model, trie, sid_ids, prompts, len(codes) + 3, normalize)
        for row, prompt in enumerate(prompts):
            expected = torch.tensor(exhaustive(lambda ids: model(ids).logits, codes, sid_ids, prompt, normalize))
            found = items_of(trie, leaves[row][scores[row] > -torch.inf])
            assert sorted(found) == list(range(len(codes)))
            torch.testing.assert_close(scores[row, :len(codes)], expected[found], atol=1e-5, rtol=1e-5)
            assert (expected[found].diff() <= 1e-5).all()               # best first, near ties either way
            total = expected.double().exp().sum()
            assert abs(scores[row].double().exp().sum() - total) < 1e-5
            assert abs(total - 1) < 1e-5 if normalize == "trie" else total <= 1 + 1e-5


@pytest.mark.parametrize("normalize, share", [*itertools.product(("trie", "level"), (0.1, 0.5, 1.0))])
@torch.no_grad()
def test_new_items_count_as_their_average_sibling(normalize, share):
    """Where n codes follow a prefix, o of them known: each new one has 1/n, or the mean of the o; the known share what
    is left as the model says."""
    model, (codes, sid_ids), prompts = random_model("qwen2"), random_catalogue(3, 60), random_prompts()
    new = torch.rand(len(codes), generator=torch.Generator().manual_seed(8)) < share
    known = {tuple(row[:l]) for row in codes[~new].tolist() for l in range(4)}
    kids = children_of(codes)

    def conditional(logits, prefix):
        p, old = torch.zeros(K), [c for c in kids[prefix] if (*prefix, c) in known]
        if normalize == "trie":
            few = old or kids[prefix]
            p[few] = logits[few].softmax(0) * len(few) / len(kids[prefix])
            p[[c for c in kids[prefix] if c not in few]] = 1 / len(kids[prefix])
        else:
            p = logits.softmax(0)
            p[[c for c in kids[prefix] if old and c not in old]] = p[old].mean()
        return p.log()

    trie = build_trie(codes, K, CPU, new)
    leaves, scores = beam_search(model, trie, sid_ids, prompts, len(codes), normalize)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + [int(sid_ids[l, c]) for l, c in enumerate(sid[:-1])] for sid in codes.tolist()])
        logits = model(ids).logits[:, len(prompt) - 1:]
        expected = torch.stack([sum(conditional(logits[n, l, sid_ids[l]], tuple(sid[:l]))[c] for l, c in enumerate(sid))
                                for n, sid in enumerate(codes.tolist())])
        torch.testing.assert_close(scores[row], expected[items_of(trie, leaves[row])], atol=1e-5, rtol=1e-5)
        assert normalize == "level" or scores[row].double().exp().sum() == pytest.approx(1, abs=1e-5)
    if share == 1:                                                      # nothing to compare with: the model's own
        plain = beam_search(model, build_trie(codes, K, CPU), sid_ids, prompts, len(codes), normalize)
        assert all(map(torch.equal, plain, (leaves, scores)))


class TrieProcessor(LogitsProcessor):
    """The constraint for Hugging Face's beams: mask what the trie does not allow, renormalise what it does."""

    def __init__(self, codes, sid_ids, prompt_length, normalize):
        self.kids, self.ids, self.start, self.normalize = children_of(codes), sid_ids, prompt_length, normalize
        self.code_of = [{int(i): c for c, i in enumerate(row)} for row in sid_ids]

    def __call__(self, input_ids, scores):
        out, level = torch.full_like(scores, -torch.inf), input_ids.shape[1] - self.start
        for row, ids in enumerate(input_ids[:, self.start:].tolist()):
            if all(i in self.code_of[l] for l, i in enumerate(ids)):    # else a filler beam of score -inf
                kids = self.kids.get(tuple(self.code_of[l][i] for l, i in enumerate(ids)))
                if kids:
                    out[row, self.ids[level]] = legal_log_probs(scores[row, self.ids[level]], kids, self.normalize)
        return out


def hugging_face_beams(model, codes, sid_ids, prompts, num_beams, normalize) -> list[dict[tuple, float]]:
    """SIDs and scores per prompt by model.generate on one left-padded batch."""
    num_levels, width = codes.shape[1], max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=num_beams, num_return_sequences=num_beams, do_sample=False,
        max_new_tokens=num_levels, min_new_tokens=None, length_penalty=0.0, early_stopping=False, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        logits_processor=LogitsProcessorList([TrieProcessor(codes, sid_ids, width, normalize)]))
    code_of = [{int(i): c for c, i in enumerate(row)} for row in sid_ids]
    found = [{} for _ in prompts]
    for n, (row, score) in enumerate(zip(out.sequences[:, width:].tolist(), out.sequences_scores.tolist())):
        if score > -1e8:
            found[n // num_beams][tuple(code_of[l][i] for l, i in enumerate(row))] = score
    return found


@pytest.mark.parametrize("kind, normalize", [*itertools.product(KINDS, ("trie", "level"))])
def test_same_beams_as_hugging_face(kind, normalize):
    model = random_model(kind, tied=kind != "llama", rows=TEXT_ROWS + 36, seed=3)
    codes, sid_ids = random_catalogue(3, 300, k=12)
    trie, prompts = build_trie(codes, 12, CPU), random_prompts((7, 3, 12), seed=4)
    pruned = 0
    for num_beams in (4, 15):
        leaves, scores = beam_search(model, trie, sid_ids, prompts, num_beams, normalize)
        batch = hugging_face_beams(model, codes, sid_ids, prompts, num_beams, normalize)
        for row, prompt in enumerate(prompts):
            ours = {tuple(codes[n].tolist()): s
                    for n, s in zip(items_of(trie, leaves[row]), scores[row].tolist())}
            assert len(ours) == num_beams
            for theirs in (*hugging_face_beams(model, codes, sid_ids, [prompt], num_beams, normalize), batch[row]):
                assert list(ours) == list(theirs)
                assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-4)
            best = torch.tensor(exhaustive(lambda ids: model(ids).logits, codes, sid_ids, prompt, normalize)).topk(
                num_beams).indices
            pruned += set(ours) != {tuple(codes[n].tolist()) for n in best}
    assert pruned, "these beams prune nothing: the comparison is too easy"


@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_does_not_matter(kind):
    model = random_model(kind, seed=5)
    codes, sid_ids = random_catalogue(3, 60)
    trie, prompts = build_trie(codes, K, CPU), random_prompts((4, 31, 1, 12, 4, 9))
    together = search_all(model, trie, sid_ids, prompts, 7, "trie", 10 ** 6)
    few = search_all(model, trie, sid_ids, prompts, 7, "trie", 24)      # several ragged batches, some of one
    for row, prompt in enumerate(prompts):
        alone, = search_all(model, trie, sid_ids, [prompt], 7, "trie", 1)
        assert len(alone) == len({n for n, _ in alone}) == 7
        assert all(0 <= n < len(codes) and math.isfinite(s) for n, s in alone)
        assert [s for _, s in alone] == sorted((s for _, s in alone), reverse=True)
        for other in (together[row], few[row]):
            assert [n for n, _ in alone] == [n for n, _ in other]
            assert [s for _, s in alone] == pytest.approx([s for _, s in other], abs=1e-5)


def test_generation_config_has_no_say():
    model = random_model("qwen2")
    codes, sid_ids = random_catalogue(3, 60)
    trie, prompts = build_trie(codes, K, CPU), random_prompts()
    before = beam_search(model, trie, sid_ids, prompts, 5)
    for key, value in {"do_sample": True, "repetition_penalty": 1.3, "temperature": 0.1, "top_k": 1}.items():
        setattr(model.generation_config, key, value)
    for a, b in zip(before, beam_search(model, trie, sid_ids, prompts, 5)):
        assert torch.equal(a, b)


def test_no_call_of_generate():
    for node in ast.walk(ast.parse((ROOT / "evaluate.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "attr", getattr(node.func, "id", "")) != "generate", node.lineno
        assert getattr(node, "attr", "") != "generate"


def test_tree_mask():
    # two users with prompts of 3 and 1 tokens; at the second depth, beams 0 and 1 of user 0 both descend from
    # slot 1 of the first depth, those of user 1 from slots 0 and 1
    mask = tree_mask(torch.tensor([3, 1]), 3, [torch.tensor([[1, 1], [0, 1]]), torch.tensor([[0, 1], [0, 1]])], [2, 2])
    assert mask.shape == (2, 1, 2, 7)
    assert mask[:, 0].int().tolist() == [[[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 0, 1]],
                                         [[1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0, 1]]]


def test_length_batches():
    g = torch.Generator().manual_seed(0)
    prompts = [[0] * int(n) for n in torch.randint(1, 50, (200,), generator=g)]
    for budget in (1, 49, 50, 333, 10 ** 9):
        batches = length_batches(prompts, budget)
        assert sorted(r for b in batches for r in b) == list(range(200))
        for rows in batches:                                            # one prompt that is too long goes alone
            assert rows and (len(rows) == 1 or len(rows) * max(len(prompts[r]) for r in rows) <= budget)
    assert len(batches) == 1


# ---- the trie ----

def dict_trie(codes: list[list[int]]) -> dict:
    root: dict = {}
    for row in codes:
        node = root
        for code in row:
            node = node.setdefault(code, {})
    return root


def assert_trie(codes: torch.Tensor, codebook_size: int) -> None:
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
    for leaf, _, prefix in frontier:
        rows = trie.leaf_items[trie.leaf_start[leaf]:trie.leaf_start[leaf + 1]].tolist()
        assert rows == [n for n, row in enumerate(codes.tolist()) if tuple(row) == prefix]      # catalogue order


@pytest.mark.parametrize("num_levels, codebook_size, count", [
    (2, 4, 10), (3, 3, 60), (3, 256, 500), (4, 5, 90), (8, 128, 20), (3, 2, 1)])
def test_trie_equals_a_dictionary(num_levels, codebook_size, count):
    g = torch.Generator().manual_seed(num_levels * count)
    codes = torch.randint(codebook_size, (count, num_levels), generator=g)
    assert_trie(torch.cat([codes, codes[:count // 3]]), codebook_size)  # with duplicates


LOPSIDED = {
    "one item": [[3, 0, 5]],
    "one SID, three items": [[1, 2, 3]] * 3,
    "one first code": [[2, b, c] for b in range(3) for c in range(4)],
    "a level with one child": [[a, 5, c] for a in range(4) for c in range(a + 1)],
    "fans of different width": [[0, 0, 0]] + [[1, b, 0] for b in range(6)] + [[2, 2, c] for c in range(6)],
}


@pytest.mark.parametrize("name", LOPSIDED)
def test_lopsided_catalogues(name):
    codes = torch.tensor(LOPSIDED[name])
    assert_trie(codes, K)
    trie, distinct = build_trie(codes, K, CPU), len(torch.unique(codes, dim=0))
    model, sid_ids = random_model("llama"), TEXT_ROWS + torch.arange(3 * K).view(3, K)
    for num_beams in (1, 4, 20):
        for found in search_all(model, trie, sid_ids, random_prompts((2, 6)), num_beams, "trie", 1000):
            # a narrow beam may descend into prefixes with few items, but never comes back with nothing
            assert 1 <= len(found) <= min(num_beams, distinct)
            assert len(found) == distinct or num_beams < distinct
            assert len({n for n, _ in found}) == len(found)
            assert all(0 <= n < distinct and -math.inf < s <= 1e-6 for n, s in found)


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
    items = [{"item_id": i} for i in "pqrst"]
    # targets: r three times, p and q once each, s and t never: r, then p and q, s and t in catalogue order
    train = [{"history": list(history), "target": target} for history, target in
             [("p", "r"), ("qp", "r"), ("p", "q"), ("st", "p"), ("t", "r")]]
    popular = popularity_ranking(train, items)
    assert popular == list("rpqst")
    samples = [{"history": list(h)} for h in ("qp", "t", "r")]
    # after p: r twice, q once. After t: r and p once each, r more popular. After r: nothing seen
    assert bigram_rankings(train, samples, popular, 5) == [list("rqpst"), list("rpqst"), list("rpqst")]
    assert bigram_rankings(train, samples, popular, 2) == [list("rq"), list("rp"), list("rp")]
    assert bigram_rankings(train, samples, popular, 99) == [list("rqpst"), list("rpqst"), list("rpqst")]
    # candidates without r: nothing outside them is recommended
    assert popularity_ranking(train, items[:2] + items[3:]) == list("pqst")
    assert bigram_rankings(train, samples, list("pqst"), 3) == [list("qps"), list("pqs"), list("pqs")]


# ---- the command line ----

def snapshot(folder) -> dict[str, bytes]:
    """Every file of a folder with its content, to see that a call wrote nothing."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recount(ranks: list[int | None], k: int) -> tuple[float, float]:
    """HR@K and NDCG@K once more, the long way."""
    hits = [r for r in ranks if r is not None and r <= k]
    return len(hits) / len(ranks), sum(math.log(2) / math.log(r + 1) for r in hits) / len(ranks)


def test_files_and_table(run):
    done = run_script("evaluate.py", "--run", run, "--show", 2)
    assert done.returncode == 0, done.stderr
    for name in ("popularity", "bigram", "sft.pt"):
        assert re.search(rf"^{re.escape(name)} +item( +\d\.\d{{4}}){{8}}$", done.stdout, re.M), done.stdout
    assert done.stdout.count("\nrecommendations") == done.stdout.count("\ntarget: ") == 2
    assert "nan" not in done.stdout.lower()

    samples, items = read_lines(run / "test.jsonl"), read_lines(run / "items.jsonl")
    ids, predictions, metrics = {i["item_id"] for i in items}, *map(read_lines, (run / "predictions.jsonl",
                                                                                 run / "metrics.jsonl"))
    assert [m["method"] for m in metrics] == ["popularity", "bigram", "sft.pt"]
    for m in metrics:
        assert {"method", "task", "split", "level", "n", "num_beams", "HR@1", "HR@3", "HR@5", "HR@10", "NDCG@1",
                "NDCG@3", "NDCG@5", "NDCG@10", "seconds"} <= set(m)
        assert (m["task"], m["split"], m["level"]) == ("next_brief", "test", "item")
        assert (m["n"], m["num_beams"]) == (len(samples), 20)
    assert [(p["user_id"], p["target"]) for p in predictions] == [(s["user_id"], s["target"]) for s in samples]
    for p in predictions:
        assert set(p) == {"user_id", "target", "items", "scores"}
        assert len(p["items"]) == len(set(p["items"])) == len(p["scores"]) == 20 and set(p["items"]) <= ids
        assert p["scores"] == sorted(p["scores"], reverse=True) and all(map(math.isfinite, p["scores"]))
    ranks = [p["items"].index(p["target"]) + 1 if p["target"] in p["items"] else None for p in predictions]
    train = Counter(s["target"] for s in read_lines(run / "train.jsonl"))
    popular = sorted((i["item_id"] for i in items), key=lambda i: (-train[i], i))[:20]
    popular_ranks = [popular.index(s["target"]) + 1 if s["target"] in popular else None for s in samples]
    for k in (1, 5, 10, 20):
        assert (metrics[2][f"HR@{k}"], metrics[2][f"NDCG@{k}"]) == pytest.approx(recount(ranks, k))
        assert (metrics[0][f"HR@{k}"], metrics[0][f"NDCG@{k}"]) == pytest.approx(recount(popular_ranks, k))

    # a second run appends to the metrics, replaces the predictions, and finds the same
    before = (run / "predictions.jsonl").read_text()
    first = (run / "metrics.jsonl").read_text()
    call(evaluate, "--run", run, "--batch-tokens", 100)
    assert (run / "metrics.jsonl").read_text().startswith(first) and len(read_lines(run / "metrics.jsonl")) == 6
    for a, b in zip(map(json.loads, before.splitlines()), read_lines(run / "predictions.jsonl")):
        assert a["items"] == b["items"] and a["scores"] == pytest.approx(b["scores"], abs=1e-4)


def test_flags_for_files_and_split(run, tmp_path):
    call(evaluate, "--run", run, "--split", "valid", "--limit", 3, "--num-beams", 5, "--checkpoint", run / "init.pt",
         "--normalize", "level", "--metrics", tmp_path / "new" / "m.jsonl", "--predictions", tmp_path / "p.jsonl")
    model = read_lines(tmp_path / "new" / "m.jsonl")[-1]
    assert (model["method"], model["split"], model["n"], model["num_beams"]) == ("init.pt", "valid", 3, 5)
    assert len(read_lines(tmp_path / "p.jsonl")) == 3
    assert not (run / "metrics.jsonl").exists() and not (run / "predictions.jsonl").exists()


def test_candidates(run, tmp_path):
    allowed = [3, 17, 18, 40, 59]
    write_lines(tmp_path / "some.jsonl", [{"item_id": i} for i in allowed])
    call(evaluate, "--run", run, "--candidates", tmp_path / "some.jsonl")
    for p in read_lines(run / "predictions.jsonl"):
        assert sorted(p["items"]) == allowed                            # all five, fewer than the 20 beams
        assert sum(map(math.exp, p["scores"])) == pytest.approx(1, abs=1e-4)
    assert all(m["HR@20"] < 1 for m in read_lines(run / "metrics.jsonl"))


def test_history_in_words(run, capsys):
    before, titles = snapshot(run), {i["item_id"]: i["title"] for i in toy_items()}
    call(evaluate, "--run", run, "--history", "12,55, 8")
    history, recommended = capsys.readouterr().out.split("recommendations")
    assert [titles[i] in history for i in (12, 55, 8)] == [True] * 3
    found = re.findall(r"^ +(\d+) +(-\d+\.\d+) (\d+) (.+)$", recommended, re.M)
    assert [int(rank) for rank, *_ in found] == list(range(1, 11))
    assert all(titles[int(i)] == title for _, _, i, title in found)
    assert len(re.findall(r"<a_\d+> .*<b_\d+> .*<c_\d+> ", recommended)) == 10      # each token with its meaning
    assert snapshot(run) == before


def collide(run):
    """Give the last line's item the SID of the first line's."""
    items = read_lines(run / "items.jsonl")
    items[-1]["sid"] = items[0]["sid"]
    write_lines(run / "items.jsonl", items)


def outgrow(run):
    """Append an item whose last code is beyond the checkpoint's 8 codes per level."""
    items = read_lines(run / "items.jsonl")
    write_lines(run / "items.jsonl", items + [{**items[0], "item_id": "new", "sid": ["<a_1>", "<b_2>", "<c_30>"]}])


def shorten(run):
    """A backbone that reads 40 tokens and no more."""
    stored = torch.load(run / "sft.pt", weights_only=True)
    stored["config"] = json.dumps({**json.loads(stored["config"]), "max_position_embeddings": 40})
    torch.save(stored, run / "sft.pt")


ERRORS = {      # name -> (flags, a change to the run, words of the message)
    "candidates": (["--candidates", "{run}/bad.jsonl"],
                   lambda run: write_lines(run / "bad.jsonl", [{"item_id": 1}, {"item_id": 777}]),
                   ["bad.jsonl", "777"]),
    "history": (["--history", "12,777"], None, ["--history", "777"]),
    "no checkpoint": (["--checkpoint", "{run}/none.pt"], None, ["none.pt", "no such file"]),
    "another catalogue": ([], collide, ["sft.pt", "another catalogue"]),
    "a code the checkpoint lacks": ([], outgrow, ["<c_30>"]),
    "a list as a candidate": (["--candidates", "{run}/bad.jsonl"],
                              lambda run: write_lines(run / "bad.jsonl", [{"item_id": [1]}]), ["bad.jsonl"]),
    "prompts that are too long": ([], shorten, ["40", "tokens"]),
    "a broken line": ([], lambda run: (run / "test.jsonl").write_text(
        (run / "test.jsonl").read_text().splitlines()[0] + "\n{\"user_id\": 1,\n"), ["test.jsonl", "line 2"]),
    "a missing field": ([], lambda run: write_lines(run / "test.jsonl", [{"user_id": "u", "history": [1]}]),
                        ["test.jsonl", "line 1", "target"]),
    "an unknown item": ([], lambda run: write_lines(run / "test.jsonl", [
        {"user_id": "u", "history": [1], "target": 2}, {"user_id": "v", "history": [777], "target": 2}]),
        ["test.jsonl", "line 2", "777"]),
    "a folder for the figures": (["--metrics", "{run}"], None, ["is a folder"]),
    "a place that is none": (["--metrics", "{run}/items.jsonl/m.jsonl"], None, ["items.jsonl/m.jsonl", "cannot be written"]),
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


def test_unknown_flag(run):
    before = snapshot(run)
    assert_one_line_error(run_script("evaluate.py", "--run", run, "--beams", 3), "--beams")
    assert snapshot(run) == before


def test_new_items_join_an_old_checkpoint(run, tmp_path, capsys):
    new = [{"item_id": "n1", "title": "Acme copper wire number 100", "description": "A sturdy copper wire."},
           {"item_id": "n2", "title": "Acme clay pot number 101", "description": "A clay pot for the garden."}]
    write_lines(tmp_path / "new.jsonl", new)
    call(tokenize_items, "--run", run, "--codebook", run / "codebook.pt", "--items", tmp_path / "new.jsonl")
    found = {}
    for how in ("average", "learned"):
        call(evaluate, "--run", run, "--num-beams", 100, "--new-items", how)
        found[how] = read_lines(run / "predictions.jsonl")
        for p in found[how]:
            assert len(p["items"]) == 62 and {"n1", "n2"} < set(p["items"])
            assert sum(map(math.exp, p["scores"])) == pytest.approx(1, abs=1e-4)
    items = {i["item_id"]: i["sid"] for i in read_lines(run / "items.jsonl")}
    for name in ("n1", "n2"):                                           # 1/n of a prefix that n items share
        siblings = {i for i, sid in items.items() if sid[:-1] == items[name][:-1]}
        for p in found["average"]:
            scores = dict(zip(p["items"], map(math.exp, p["scores"])))
            total = sum(scores[i] for i in siblings)
            assert scores[name] == pytest.approx(total / len(siblings), rel=1e-3)
    assert found["average"] != found["learned"]
    capsys.readouterr()
    call(evaluate, "--run", run, "--history", "n1,3")
    assert new[0]["title"] in capsys.readouterr().out


def test_shared_sids(toy_data, tmp_path, capsys):
    """Items that share a SID: ranks follow the catalogue's order, the SID-level figure counts all of them."""
    run, items = tmp_path / "run", toy_items()
    # 60 items on 20 SIDs: items i, i + 20 and i + 40 share one
    write_lines(tmp_path / "sids.jsonl", [{"item_id": i["item_id"], "sid": [
        f"<a_{n % 20 // 5}>", f"<b_{n % 5}>", "<c_0>"]} for n, i in enumerate(items)])
    for args in ([tokenize_items, "--data", toy_data, "--sids", tmp_path / "sids.jsonl"], [extract_semantics],
                 [init_embeddings, "--width", 32, "--layers", 1, "--vocab-size", 300, "--pretrain-steps", 2],
                 [evaluate, "--checkpoint", run / "init.pt", "--num-beams", 7]):
        call(*args, "--run", run)
    assert re.search(r"^init.pt +sid( +\d\.\d{4}){6}$", capsys.readouterr().out, re.M)
    metrics, predictions = read_lines(run / "metrics.jsonl"), read_lines(run / "predictions.jsonl")
    assert [(m["method"], m["level"]) for m in metrics] == [
        ("popularity", "item"), ("bigram", "item"), ("init.pt", "item"), ("init.pt", "sid")]
    item_ranks, sid_ranks = [], []
    for p in predictions:
        assert len(p["items"]) == len(p["scores"]) == 21                # 7 SIDs of three items each
        for a in range(0, 21, 3):
            assert p["items"][a:a + 3] == [p["items"][a] + 20 * j for j in range(3)]
            assert len(set(p["scores"][a:a + 3])) == 1
        item_ranks.append(p["items"].index(p["target"]) + 1 if p["target"] in p["items"] else None)
        sids = [i % 20 for i in p["items"][::3]]
        sid_ranks.append(sids.index(p["target"] % 20) + 1 if p["target"] % 20 in sids else None)
    assert any(sid_ranks)
    for k in (1, 3, 5):
        assert (metrics[2][f"HR@{k}"], metrics[2][f"NDCG@{k}"]) == pytest.approx(recount(item_ranks, k))
        assert (metrics[3][f"HR@{k}"], metrics[3][f"NDCG@{k}"]) == pytest.approx(recount(sid_ranks, k))


def test_flags(capsys):
    args = parse_args([])
    assert (args.run, args.num_beams, args.normalize, args.split) == ("runs/demo", None, "trie", "test")
    for wrong in (["--num-beams", "0"], ["--batch-tokens", "0"], ["--limit", "-1"], ["--split", "train"],
                  ["--show", "-1"], ["--history", "1,2", "--task", "next_title"]):
        with pytest.raises(SystemExit) as stopped:
            parse_args(wrong)
        assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err.splitlines()[-1]
