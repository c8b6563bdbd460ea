"""Stage 1: K-means and residuals against loops, collisions, encoders, splits, new items, errors."""
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenize_items as stage
import torch
from conftest import (assert_one_line_error, assert_stops, call, run_script, toy_interactions, toy_items,
                      write_lines)

SAMPLES = ("train", "valid", "test")


def points(count: int = 60, width: int = 5, seed: int = 0) -> torch.Tensor:
    """Points in six loose clumps."""
    generator = torch.Generator().manual_seed(seed)
    middles = 3 * torch.randn(6, width, generator=generator)
    return middles[torch.arange(count) % 6] + torch.randn(count, width, generator=generator)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_assign(x, centroids) -> tuple[list[int], list[float]]:
    """Nearest centroid and squared distance, one pair at a time, in float64."""
    distances = [[sum((float(a) - float(b)) ** 2 for a, b in zip(row, c)) for c in centroids] for row in x]
    return [d.index(min(d)) for d in distances], [min(d) for d in distances]


def objective(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return sum(slow_assign(x, centroids)[1])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------
# RQ-KMeans
# ---------------------------------------------------------------------------------------------------------

def test_assign_equals_a_loop_and_ignores_the_block_size(monkeypatch):
    x, centroids = points(), points(7, seed=1)
    codes, distance = stage.assign(x, centroids)
    slow_codes, slow_distance = slow_assign(x, centroids)
    assert codes.tolist() == slow_codes
    assert distance.tolist() == pytest.approx(slow_distance, abs=1e-4)
    for rows in (1, 7, 59):
        monkeypatch.setattr(stage, "DISTANCE_BYTES", 4 * len(centroids) * rows)
        assert torch.equal(stage.assign(x, centroids)[0], codes)
        assert torch.allclose(stage.assign(x, centroids)[1], distance, atol=1e-5)
    monkeypatch.setattr(stage, "DISTANCE_BYTES", 1)                     # less than one row
    assert torch.equal(stage.assign(x, centroids)[0], codes)


def test_one_lloyd_update_by_hand():
    x = points()
    seeds = stage.seed_centroids(x, 4, generator())
    codes, _ = slow_assign(x, seeds)
    by_hand = [np.mean([x[n].numpy() for n in range(len(x)) if codes[n] == c], axis=0) for c in range(4)]
    assert np.allclose(stage.kmeans(x, 4, 1, generator()).numpy(), by_hand, atol=1e-5)


def test_lloyd_never_rises_and_ends_at_the_means_of_the_members():
    x = points()
    values = [objective(x, stage.kmeans(x, 8, n, generator())) for n in range(8)]
    assert all(later <= earlier + 1e-4 for earlier, later in zip(values, values[1:])) and values[-1] < values[0]
    centroids = stage.kmeans(x, 8, 100, generator())
    codes = torch.tensor(slow_assign(x, centroids)[0])
    for c in range(8):
        assert torch.allclose(centroids[c], x[codes == c].mean(0), atol=1e-5)
    assert torch.equal(stage.kmeans(x, 8, 1000, generator()), centroids)        # converged, and reproducible


def test_empty_clusters_restart_at_the_farthest_points(monkeypatch):
    x = points()
    far_away = torch.full((2, x.shape[1]), 1e3)
    start = torch.cat([x[:1], far_away, x[1:2]])
    monkeypatch.setattr(stage, "seed_centroids", lambda *_: start.clone())
    distance = torch.tensor(slow_assign(x, start)[1])
    once = stage.kmeans(x, 4, 1, generator())
    assert {tuple(row) for row in once[1:3].tolist()} == {tuple(x[n].tolist()) for n in distance.topk(2).indices}
    codes = slow_assign(x, stage.kmeans(x, 4, 100, generator()))[0]
    assert set(codes) == {0, 1, 2, 3}


def test_seeds_are_distinct_points_and_stop_at_the_number_of_distinct_points(capsys):
    distinct = points(6)
    x = distinct.repeat(5, 1)
    for seed in range(10):
        seeds = stage.seed_centroids(x, 6, generator(seed))
        assert sorted(seeds.tolist()) == sorted(distinct.tolist())
    assert_stops(capsys, stage.seed_centroids, x, 7, generator(),
                 words=("codebook size 7", "distinct embeddings (6)", "--codebook-size"))


def test_seeds_are_drawn_by_squared_distance():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    pairs = Counter()
    for seed in range(3000):
        pairs[tuple(stage.seed_centroids(x, 2, generator(seed)).flatten().tolist())] += 1
    for first, second, expected in ((0, 3, 0.9), (1, 3, 0.8), (3, 0, 9 / 13)):
        share = pairs[first, second] / sum(n for (a, _), n in pairs.items() if a == first)
        assert share == pytest.approx(expected, abs=0.05)               # 1,000 draws: 3 sigma = 0.044


def test_residuals_are_eq_3(capsys):
    x = points(80)
    books = stage.fit_codebook(x, 3, 4, 100, seed=5)
    codes, last = stage.quantize(x, books)
    rest = x.clone()
    for level in range(3):
        assert codes[:, level].tolist() == slow_assign(rest, books[level])[0]
        before, rest = rest, rest - books[level][codes[:, level]]
    assert torch.allclose(last, before, atol=1e-6)                      # the last level's input, not its residual
    total = sum(books[level][codes[:, level]] for level in range(3))
    assert torch.allclose(total + rest, x, atol=1e-5)
    printed = [float(line.split("mse ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == sorted(printed, reverse=True)
    assert printed[-1] == pytest.approx(float((rest ** 2).sum(1).mean()), abs=1e-4)
    assert torch.equal(stage.fit_codebook(x, 3, 4, 100, seed=5), books)


# ---------------------------------------------------------------------------------------------------------
# Collisions
# ---------------------------------------------------------------------------------------------------------

def crowd(count: int = 90, k: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, 3) of twelve prefixes, most of them with collisions, residuals and the last level's centroids."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(3, size=count), rng.integers(4, size=count), rng.integers(5, size=count)], 1)
    return codes, rng.normal(size=(count, 4)).astype(np.float32), rng.normal(size=(k, 4)).astype(np.float32)


def slow_resolve(codes, residuals, book, first_new: int = 0) -> list[list[int]]:
    """The greedy rule once more, in plain Python: per prefix, who stays first, then the others nearest first."""
    out = [list(map(int, row)) for row in codes]
    square = [[sum((float(a) - float(b)) ** 2 for a, b in zip(r, c)) for c in book] for r in residuals]
    for prefix in {tuple(row[:-1]) for row in out}:
        rows = [n for n, row in enumerate(codes) if tuple(row[:-1]) == prefix]
        shared = {c: [n for n in rows if codes[n][-1] == c] for c in {int(codes[n][-1]) for n in rows}}
        movers = []
        for code, group in shared.items():
            old = [n for n in group if n < first_new]
            stays = old or [min(group, key=lambda n: square[n][code])]
            movers += [n for n in group if n not in stays]
        free = [c for c in range(len(book)) if c not in shared]
        for n in sorted(movers, key=lambda n: square[n][codes[n][-1]]):
            out[n][-1] = min(free, key=lambda c: square[n][c])
            free.remove(out[n][-1])
    return out


@pytest.mark.parametrize("policy", ["nearest", "random"])
def test_collisions_move_as_few_as_they_must(policy):
    codes, residuals, book = crowd()
    before = codes.copy()
    after = stage.resolve_collisions(codes, residuals, book, policy, seed=3)
    assert np.array_equal(codes, before)                                # the input is not changed
    assert stage.colliding(codes) > 20 and stage.colliding(after) == 0
    assert np.array_equal(after[:, :-1], codes[:, :-1]) and after.max() < len(book)
    for row in np.unique(codes, axis=0):
        group = np.flatnonzero((codes == row).all(1))
        stayed = [n for n in group if (after[n] == row).all()]
        distance = ((residuals[group] - book[row[-1]]) ** 2).sum(1)
        assert stayed == [group[distance.argmin()]]                     # the nearest, and only it


def test_nearest_equals_a_slow_greedy_loop():
    for seed in range(5):
        codes, residuals, book = crowd(seed=seed)
        assert stage.resolve_collisions(codes, residuals, book, "nearest", 0).tolist() == slow_resolve(
            codes, residuals, book)


def test_random_is_reproducible_by_seed():
    codes, residuals, book = crowd(k=40)
    first, again, other = (stage.resolve_collisions(codes, residuals, book, "random", s) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    nearest = [stage.resolve_collisions(codes, residuals, book, "nearest", s) for s in (1, 2)]
    assert np.array_equal(*nearest)


@pytest.mark.parametrize("policy", ["nearest", "random"])
def test_old_rows_never_move_not_even_those_that_share_a_sid(policy):
    codes, residuals, book = crowd(k=20)
    codes[1] = codes[0]                                                 # an official index may hold collisions
    residuals[:50] = 0                                                  # as append_items passes them
    after = stage.resolve_collisions(codes, residuals, book, policy, 0, first_new=50)
    assert np.array_equal(after[:50], codes[:50])
    old, new = {tuple(r) for r in after[:50]}, [tuple(r) for r in after[50:]]
    assert len(set(new)) == 40 and old.isdisjoint(new)
    if policy == "nearest":
        assert after.tolist() == slow_resolve(codes, residuals, book, first_new=50)


def test_a_full_prefix_names_itself_and_the_remedy(capsys):
    codes = np.array([[0, 1, 2]] + [[2, 1, 0]] * 4)
    residuals, book = np.zeros((5, 2), np.float32), np.eye(3, 2, dtype=np.float32)
    assert_stops(capsys, stage.resolve_collisions, codes, residuals, book, "nearest", 0,
                 words=("<a_2><b_1>", "4 items", "3 last codes", "choose", "--codebook-size", "--num-levels"))
    assert_stops(capsys, stage.resolve_collisions, codes, residuals, book, "nearest", 0, 1,
                 words=("<a_2><b_1>", "make a new run", "--codebook-size"))


@pytest.mark.parametrize("count, size", [(12, 4), (24, 8), (50, 8), (60, 8), (150, 16), (200, 16)])
def test_small_catalogues_have_a_codebook_that_fits(tmp_path, capsys, count, size):
    items = write_lines(tmp_path / "items.jsonl", toy_items(count))
    users = write_lines(tmp_path / "users.jsonl", toy_interactions(count))
    call(stage, "--run", tmp_path, "--items", items, "--interactions", users)
    assert len({tuple(item["sid"]) for item in read(tmp_path / "items.jsonl")}) == count
    assert torch.load(tmp_path / "codebook.pt", weights_only=True)["centroids"].shape[1] == size
    assert ("once more with 16" in capsys.readouterr().out) == (count == 150)       # 150 / 12: first 8


# ---------------------------------------------------------------------------------------------------------
# Encoders
# ---------------------------------------------------------------------------------------------------------

def test_terms_and_item_text():
    assert stage.terms_of("Steel rod, 12-mm") == ["steel", "rod", "12", "mm", "steel rod", "rod 12", "12 mm"]
    assert stage.terms_of("_ --") == []
    assert stage.item_text({"title": " Rod ", "description": "Long"}) == "Rod. Long"
    assert stage.item_text({"title": "", "description": "Long"}) == "Long"


def test_tfidf_by_hand():
    column, idf = {"a": 0, "b": 1, "c": 2}, torch.tensor([1.0, 2.0, 3.0])
    matrix = stage.tfidf(["a b", "a a c unknown", "nothing known"], column, idf).to_dense()
    log2 = float(np.log(2))
    expected = np.array([[1, 2, 0], [1 + log2, 0, 3], [0, 0, 0]])
    expected[:2] /= np.linalg.norm(expected[:2], axis=1, keepdims=True)
    assert np.allclose(matrix.numpy(), expected, atol=1e-6)


def test_lsa_keeps_inner_products_where_it_has_the_width():
    texts = [stage.item_text(item) for item in toy_items()]             # 60 texts: at most 60 dimensions
    torch.manual_seed(0)
    encoder = stage.fit_lsa(texts)
    df = Counter(t for text in texts for t in set(stage.terms_of(text)))
    assert set(encoder["terms"]) == {t for t, n in df.items() if n > 1}
    assert encoder["idf"].tolist() == pytest.approx([np.log(60 / df[t]) + 1 for t in encoder["terms"]])
    x = stage.encode_lsa(texts, encoder)
    assert torch.allclose(x.norm(dim=1), torch.ones(60), atol=1e-5)
    dense = stage.tfidf(texts, {t: j for j, t in enumerate(encoder["terms"])}, encoder["idf"]).to_dense()
    assert torch.allclose(x @ x.T, dense @ dense.T, atol=1e-4)
    assert torch.allclose(stage.encode_lsa(texts[7:9], encoder), x[7:9], atol=1e-6)    # a text is encoded alone


def test_pca_reconstructs_the_sorted_variances():
    x = points(80, 6)
    pca = stage.fit_pca(x, 6)
    z = (x - pca["pca_mean"]) @ pca["pca_components"]
    variances = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False) ** 2
    assert (z ** 2).sum(0).tolist() == pytest.approx(variances.tolist(), rel=1e-4)
    assert torch.allclose(z @ pca["pca_components"].T + pca["pca_mean"], x, atol=1e-4)
    narrow = stage.fit_pca(x, 2)["pca_components"]
    assert torch.equal(narrow, pca["pca_components"][:, :2])


@pytest.fixture(scope="module")
def hf_encoder(tmp_path_factory) -> Path:
    """A random BERT with a small fast tokenizer, saved as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    words = sorted({w for item in toy_items() for w in stage.item_text(item).replace(".", " .").split()})
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words) + 2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, initializer_range=0.5)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_hf_encoder_equals_an_unbatched_loop(hf_encoder, pooling):
    from transformers import AutoModel, AutoTokenizer
    texts = [" ".join(stage.item_text(item).split()[:n]) for n, item in zip((9, 2, 14, 1, 5, 30, 3), toy_items())]
    encoder = {"name": str(hf_encoder), "pooling": pooling, "max_length": 10}
    x = stage.encode(texts, encoder, 3, torch.device("cpu"))
    model, tokenizer = AutoModel.from_pretrained(hf_encoder).eval(), AutoTokenizer.from_pretrained(hf_encoder)
    for text, row in zip(texts, x):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :10]
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert torch.allclose(row, pooled / pooled.norm(), atol=1e-5)
    assert torch.allclose(x.norm(dim=1), torch.ones(7), atol=1e-5)
    long, cut = (stage.encode([" ".join(["steel"] * n)], {**encoder, "max_length": 999}, 1, torch.device("cpu"))
                 for n in (600, 512))                                   # the model has 512 positions
    assert torch.equal(long, cut)
    small = stage.fit_pca(x, 3)
    assert torch.allclose(stage.encode(texts[:2], encoder | small, 3, torch.device("cpu")),
                          (x[:2] - small["pca_mean"]) @ small["pca_components"], atol=1e-5)


def test_hf_encoder_from_the_command_line(hf_encoder, toy_data, tmp_path, capsys):
    call(stage, "--data", toy_data, "--run", tmp_path, "--encoder", hf_encoder, "--codebook-size", 8, "--dim", 4,
         "--collision", "random")
    book = torch.load(tmp_path / "codebook.pt", weights_only=True)
    assert book["centroids"].shape == (3, 8, 4)
    texts = [stage.item_text(item) for item in toy_items()]
    x = stage.encode(texts, book["encoder"], 32, torch.device("cpu"))
    codes = stage.quantize(x, book["centroids"])[0]
    assert [stage.sid_token(0, c) + stage.sid_token(1, d) for c, d, _ in codes.tolist()] == [
        "".join(item["sid"][:2]) for item in read(tmp_path / "items.jsonl")]
    assert_stops(capsys, call, stage, "--data", toy_data, "--run", tmp_path, "--encoder", tmp_path / "none",
                 words=("--encoder", "cannot be loaded"))


# ---------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------

def users_of(*lengths: int) -> list[dict]:
    """Users with items 100u, 100u + 1, ... bought at times that interleave."""
    return [{"user_id": f"u{u}", "items": [100 * u + t for t in range(n)],
             "timestamps": [10 * t + u for t in range(n)]} for u, n in enumerate(lengths)]


def test_leave_one_out_by_hand():
    split = stage.split_samples(users_of(4, 3, 2, 1), "leave-one-out")
    assert [(s["user_id"], s["history"], s["target"]) for name in SAMPLES for s in split[name]] == [
        ("u0", [0], 1),
        ("u0", [0, 1], 2), ("u1", [100], 101),
        ("u0", [0, 1, 2], 3), ("u1", [100, 101], 102), ("u2", [200], 201)]
    assert [len(split[name]) for name in SAMPLES] == [1, 2, 3]


def test_chronological_is_sorted_by_time_and_cut_8_1_1():
    users = users_of(12, 5, 9, 6)
    split = stage.split_samples(users, "chronological")
    assert [len(split[name]) for name in SAMPLES] == [22, 3, 3]         # 28 samples
    time = {i: t for u in users for i, t in zip(u["items"], u["timestamps"])}
    times = [time[s["target"]] for name in SAMPLES for s in split[name]]
    assert times == sorted(times)
    for sample in (s for name in SAMPLES for s in split[name]):
        own = next(u["items"] for u in users if u["user_id"] == sample["user_id"])
        assert sample["history"] == own[:own.index(sample["target"])] != []


def test_k_core_equals_a_naive_loop():
    rng = random.Random(1)
    users = [{"user_id": u, "items": [min(rng.randrange(30), rng.randrange(30)) for _ in range(rng.randrange(2, 12))]}
             for u in range(30)]
    for user in users:
        user["timestamps"] = list(range(len(user["items"])))
    pairs = {(u["user_id"], t): i for u in users for t, i in enumerate(u["items"])}
    while True:                                                         # drop one interaction at a time
        by_user, by_item = Counter(u for u, _ in pairs), Counter(pairs.values())
        weak = [p for p, i in pairs.items() if by_user[p[0]] < 4 or by_item[i] < 4]
        if not weak:
            break
        del pairs[weak[0]]
    kept = {(u["user_id"], t): i for u in stage.k_core(users, 4) for t, i in zip(u["timestamps"], u["items"])}
    assert kept == pairs and 0 < len(pairs) < sum(len(u["items"]) for u in users)
    assert stage.k_core(users, 1000) == []


def test_toy_run_leaks_nothing_and_caps_histories(toy_data, tmp_path):
    call(stage, "--data", toy_data, "--run", tmp_path, "--codebook-size", 8, "--max-history", 3)
    items = {user["user_id"]: user["items"] for user in toy_interactions()}
    seen = Counter()
    for name, reserve in (("train", 2), ("valid", 1), ("test", 0)):     # last purchases that must not show
        for sample in read(tmp_path / f"{name}.jsonl"):
            user = sample["user_id"]
            seen[user] += 1
            t = seen[user]                                              # a user's samples come in order
            assert t < len(items[user]) - reserve
            assert sample == {"user_id": user, "history": items[user][max(0, t - 3):t], "target": items[user][t]}
    assert seen == {user: len(own) - 1 for user, own in items.items()}


def test_an_official_split_is_used_as_it_is(toy_data, tmp_path, capsys):
    data, splits = tmp_path / "data", {}
    write_lines(data / "items.jsonl", toy_items())
    for n, name in enumerate(SAMPLES):
        splits[name] = [{"user_id": f"{name}{u}", "history": list(range(12 + n)), "target": 40 + u} for u in range(3)]
        write_lines(data / f"{name}.jsonl", splits[name])
    call(stage, "--data", data, "--run", tmp_path / "run", "--codebook-size", 8, "--max-history", 20)
    assert "split official" in capsys.readouterr().out
    assert {name: read(tmp_path / "run" / f"{name}.jsonl") for name in SAMPLES} == splits
    assert_stops(capsys, call, stage, "--data", data, "--run", tmp_path / "other", "--min-count", 5,
                 words=("--min-count", "official"))
    bad = write_lines(tmp_path / "bad.jsonl", [{**splits["test"][0], "user_id": None}])
    assert_stops(capsys, stage.read_samples, bad, set(range(60)), words=("bad.jsonl, line 1", "user_id"))
    assert stage.parse_args(["--data", str(data)]).split == "official"
    assert stage.parse_args(["--data", str(data), "--interactions", "x"]).split == "leave-one-out"
    assert stage.parse_args(["--data", str(toy_data)]).split == "leave-one-out"


def test_min_count_filters_the_catalogue_too(toy_data, tmp_path):
    call(stage, "--data", toy_data, "--run", tmp_path, "--codebook-size", 4, "--min-count", 5)
    kept = [item["item_id"] for item in read(tmp_path / "items.jsonl")]
    used = {i for name in SAMPLES for s in read(tmp_path / f"{name}.jsonl") for i in [*s["history"], s["target"]]}
    assert set(kept) == used and kept == sorted(kept) and len(kept) < 60


# ---------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------

def test_same_seed_same_files(toy_data, tmp_path, capsys):
    flags = ("--data", toy_data, "--codebook-size", 8, "--collision", "random")
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        call(stage, *flags, "--run", tmp_path / name, "--seed", seed)
    for file in ("items.jsonl", *(f"{name}.jsonl" for name in SAMPLES)):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    one, two, other = (torch.load(tmp_path / n / "codebook.pt", weights_only=True) for n in ("one", "two", "other"))
    assert torch.equal(one["centroids"], two["centroids"]) and not torch.equal(one["centroids"], other["centroids"])
    assert torch.equal(one["encoder"]["components"], two["encoder"]["components"])
    assert one["encoder"]["terms"] == two["encoder"]["terms"]
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        "items.jsonl", "codebook.pt", *(f"{name}.jsonl" for name in SAMPLES)}
    out = capsys.readouterr().out
    assert "perplexity" in out and "codes in use" in out and " 0 after" in out and "wrote" in out


def test_the_stored_codebook_gives_every_item_its_own_prefix(finished_run):
    items = read(finished_run / "items.jsonl")
    book = torch.load(finished_run / "codebook.pt", weights_only=True)
    x = stage.encode([stage.item_text(item) for item in items], book["encoder"], 32, torch.device("cpu"))
    raw, residuals = stage.quantize(x, book["centroids"])
    codes = stage.resolve_collisions(raw.numpy(), residuals.numpy(), book["centroids"][-1].numpy(), "nearest", 42)
    assert [[stage.sid_token(l, c) for l, c in enumerate(row)] for row in codes.tolist()] == [
        item["sid"] for item in items]
    assert len({tuple(item["sid"]) for item in items}) == len(items)
    assert [{k: v for k, v in item.items() if k != "sid"} for item in items] == toy_items()


def test_given_sids_keep_their_collisions(toy_data, tmp_path, capsys):
    given = [{"item_id": i, "sid": [f"<a_{i % 3}>", f"<b_{i % 5}>", "<c_9>"]} for i in range(60)]
    sids = write_lines(tmp_path / "index.jsonl", given[::-1])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "codebook.pt").write_text("of an earlier run")
    (tmp_path / "run" / "items.jsonl").mkdir()                          # cannot be replaced: the earlier run stays
    assert_stops(capsys, call, stage, "--data", toy_data, "--run", tmp_path / "run", "--sids", sids, words=("folder",))
    assert (tmp_path / "run" / "codebook.pt").exists()
    (tmp_path / "run" / "items.jsonl").rmdir()
    call(stage, "--data", toy_data, "--run", tmp_path / "run", "--sids", sids)
    assert [{"item_id": i["item_id"], "sid": i["sid"]} for i in read(tmp_path / "run" / "items.jsonl")] == given
    assert not (tmp_path / "run" / "codebook.pt").exists()
    assert "collisions 45" in capsys.readouterr().out                   # 60 items on 15 SIDs


@pytest.mark.parametrize("mangle, words", [
    (lambda rows: rows[:-1], ("no valid SID (None)", "59")),
    (lambda rows: [{**r, "sid": ["<a_1>", "<q_1>"]} for r in rows], ("'<q_1>'",)),
    (lambda rows: [{**r, "sid": r["sid"][:2] if r["item_id"] else r["sid"]} for r in rows], ("1",)),
    (lambda rows: [{**r, "sid": r["sid"][::-1]} for r in rows], ("0",)),
    (lambda rows: [{**r, "sid": 7} for r in rows], ("0",)),
    (lambda rows: [{**r, "sid": []} for r in rows], ("0",)),
    (lambda rows: [{**r, "sid": r["sid"][:1]} for r in rows], ("0", "2 to 8 levels")),
    (lambda rows: [{**r, "sid": ["<a_0>", "<b_0>", "<c_9999999>"]} for r in rows], ("64-bit",)),
], ids=["missing", "spelling", "ragged", "order", "number", "empty", "one level", "huge"])
def test_bad_given_sids(toy_data, tmp_path, capsys, mangle, words):
    rows = mangle([{"item_id": i, "sid": [f"<a_{i % 3}>", f"<b_{i % 5}>", "<c_9>"]} for i in range(60)])
    sids = write_lines(tmp_path / "index.jsonl", rows)
    assert_stops(capsys, call, stage, "--data", toy_data, "--run", tmp_path / "run", "--sids", sids, words=words)
    assert not (tmp_path / "run").exists()


def test_new_items_get_sids_and_nothing_moves(run, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    new = [{**item, "item_id": f"new{n}", "title": item["title"].replace("Acme", "Ajax")}
           for n, item in enumerate(toy_items(12))]
    new += [{"item_id": 999, "title": "Something unheard of"}]
    call(stage, "--run", run, "--codebook", run / "codebook.pt", "--items", write_lines(tmp_path / "new.jsonl", new))
    after = (run / "items.jsonl").read_bytes()
    assert after.startswith(before["items.jsonl"])
    assert all((run / name).read_bytes() == data for name, data in before.items() if name != "items.jsonl")
    assert sorted(p.name for p in run.iterdir()) == sorted(before)
    items = stage.read_catalogue(run / "items.jsonl")
    assert [i["item_id"] for i in items[60:]] == [i["item_id"] for i in new]
    assert len({tuple(i["sid"]) for i in items}) == 73
    book = torch.load(run / "codebook.pt", weights_only=True)
    x = stage.encode([stage.item_text(i) for i in items[60:]], book["encoder"], 32, torch.device("cpu"))
    codes = stage.quantize(x, book["centroids"])[0]
    assert [[stage.parse_sid_token(t)[1] for t in i["sid"][:2]] for i in items[60:]] == codes[:, :2].tolist()
    again = write_lines(tmp_path / "again.jsonl", [new[3]])
    assert_stops(capsys, call, stage, "--run", run, "--codebook", run / "codebook.pt", "--items", again,
                 words=("'new3'", "already"))
    assert (run / "items.jsonl").read_bytes() == after


def test_bad_codebooks(run, tmp_path, capsys):
    new = write_lines(tmp_path / "new.jsonl", [{"item_id": 999, "title": "Acme steel rod"}])
    before, flags = (run / "items.jsonl").read_bytes(), ("--run", run, "--items", new, "--codebook")
    book = torch.load(run / "codebook.pt", weights_only=True)
    cases = {"text": b"not a checkpoint\n", "empty": b"", "cut": (run / "codebook.pt").read_bytes()[:500]}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    torch.save([1, 2], tmp_path / "list")
    torch.save({**book, "centroids": book["centroids"][:2]}, tmp_path / "levels")
    torch.save({**book, "centroids": book["centroids"][:, :2]}, tmp_path / "codes")
    torch.save({**book, "centroids": book["centroids"][0]}, tmp_path / "flat")
    torch.save({**book, "centroids": book["centroids"].long()}, tmp_path / "whole")
    torch.save({**book, "encoder": {"name": "lsa"}}, tmp_path / "encoder")
    (tmp_path / "a folder").mkdir()
    for name in ("none", *cases, "list", "levels", "codes", "flat", "whole", "encoder", "a folder"):
        assert_stops(capsys, call, stage, *flags, tmp_path / name, words=(tmp_path / name,))
    assert (run / "items.jsonl").read_bytes() == before


def test_item_ids_are_numbers_or_strings(tmp_path):
    names = [f"B00{i:03d}é" for i in range(60)]
    data = tmp_path / "data"
    write_lines(data / "items.jsonl", [{**item, "item_id": names[item["item_id"]]} for item in toy_items()])
    write_lines(data / "interactions.jsonl",
                [{**user, "items": [names[i] for i in user["items"]]} for user in toy_interactions()])
    call(stage, "--data", data, "--run", tmp_path / "run", "--codebook-size", 8)
    assert [item["item_id"] for item in read(tmp_path / "run" / "items.jsonl")] == names
    assert all(s["target"] in names for s in read(tmp_path / "run" / "test.jsonl"))
    assert "é" in (tmp_path / "run" / "items.jsonl").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------

def items_with(change) -> str:
    """The toy catalogue as JSONL after `change(rows)`, whose result may hold raw lines."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in change(toy_items()))


def users_with(**fields) -> str:
    """The toy interactions as JSONL, the second user with other fields (None: without)."""
    rows = toy_interactions()
    rows[1] = {k: v for k, v in {**rows[1], **fields}.items() if v is not None}
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(rows: list, place: int, row) -> list:
    return rows[:place] + [row] + rows[place + 1:]


BAD = {     # what is wrong: (file, content, flags, words of the message)
    "malformed": ("items", items_with(lambda r: put(r, 4, '{"item_id": 4,')), (), ("items.jsonl", "line 5", "JSON")),
    "too deep": ("interactions", "[" * 100_000, (), ("interactions.jsonl", "line 1", "JSON")),
    "half an emoji": ("items", items_with(lambda r: put(r, 4, '{"item_id": 4, "title": "rod \\ud83d"}')), (),
                      ("items.jsonl", "line 5", "surrogates")),
    "after blank lines": ("items", "\ufeff\n \n" + items_with(lambda r: put(r, 4, {**r[4], "title": 7})), (),
                          ("items.jsonl, line 7", "title")),
    "no object": ("items", items_with(lambda r: put(r, 2, [1, 2])), (), ("items.jsonl", "line 3")),
    "no title": ("items", items_with(lambda r: put(r, 2, {"item_id": 2})), (), ("line 3", "'title'")),
    "nothing": ("items", "", (), ("items.jsonl", "no lines")),
    "twice": ("items", items_with(lambda r: r + [r[7]]), (), ("line 61", "item_id 7", "line 8")),
    "no text": ("items", items_with(lambda r: put(r, 3, {"item_id": 3, "title": " ", "description": None})), (),
                ("line 4", "item_id 3", "text")),
    "list as id": ("items", items_with(lambda r: put(r, 3, {**r[3], "item_id": [3]})), (), ("line 4", "[3]")),
    "number as title": ("items", items_with(lambda r: put(r, 3, {**r[3], "title": 7})), (), ("line 4", "string")),
    "unknown item": ("interactions", users_with(items=[1, 777, 2], timestamps=[1, 2, 3]), (),
                     ("interactions.jsonl", "line 2", "777")),
    "id of another type": ("interactions", users_with(items=["1", "2", "3"], timestamps=[1, 2, 3]), (),
                           ("line 2", "'1'")),
    "user twice": ("interactions", users_with(user_id="u0"), (), ("line 2", "'u0'", "line 1")),
    "list as user": ("interactions", users_with(user_id=["u1"]), (), ("line 2", "user_id", "['u1']")),
    "items no list": ("interactions", users_with(items=5), (), ("interactions.jsonl", "line 2")),
    "no times": ("interactions", users_with(timestamps=None), ("--split", "chronological"),
                 ("line 2", "'timestamps'")),
    "times fall": ("interactions", users_with(items=[1, 2, 3], timestamps=[1, 3, 2]), (), ("line 2", "ascending")),
    "times missing": ("interactions", users_with(items=[1, 2, 3], timestamps=[1, 2]), (), ("line 2", "as many")),
    "times no list": ("interactions", users_with(items=[1, 2, 3], timestamps=5), (), ("line 2", "timestamps")),
    "times mixed": ("interactions", users_with(items=[1, 2, 3], timestamps=[1, "2", 3]), (), ("line 2", "timestamps")),
    "empty split": ("interactions", json.dumps({"user_id": "u", "items": [1, 2, 3]}) + "\n", (), ("train", "empty")),
    "core too high": ("", "", ("--min-count", 99), ("empty", "--min-count")),
    "K too large": ("", "", ("--codebook-size", 61), ("codebook size 61", "60", "--codebook-size")),
    "full prefix": ("", "", ("--codebook-size", 2, "--num-levels", 2), ("prefix <a_", "--codebook-size")),
    "dim too large": ("", "", ("--dim", 61), ("--dim 61",)),
    "no official split": ("", "", ("--split", "official"), ("train.jsonl", "cannot be read")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, toy_data, tmp_path, capsys):
    file, content, flags, words = BAD[case]
    data = tmp_path / "data"
    for name in ("items", "interactions"):
        (data / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        text = content if name == file else (toy_data / f"{name}.jsonl").read_text(encoding="utf-8")
        (data / f"{name}.jsonl").write_text(text, encoding="utf-8")
    assert_stops(capsys, call, stage, "--data", data, "--run", tmp_path / "run", *flags, words=words)
    assert not (tmp_path / "run").exists()


def test_a_bom_and_blank_lines_are_passed_over(tmp_path):
    text = items_with(lambda rows: [*rows, '{"item_id": "e", "title": "\\ud83d\\ude00"}'])
    (tmp_path / "items.jsonl").write_text("\ufeff\n" + text.replace("\n", "\r\n \n"), encoding="utf-8")
    *items, emoji = stage.read_items(tmp_path / "items.jsonl")
    assert items == toy_items() and emoji["title"] == "\U0001f600"


def test_as_a_user_sees_it(toy_data, tmp_path):
    done = run_script("tokenize_items.py", "--run", tmp_path / "run", "--data", tmp_path)
    assert_one_line_error(done, str(tmp_path / "items.jsonl"), "cannot be read")
    assert done.stderr.count("\n") == 1 and done.stdout == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    ["--no-such-flag"], ["--num-levels", "1"], ["--num-levels", "9"], ["--max-history", "0"],
    ["--codebook-size", "-1"], ["--codebook", "x"], ["--codebook", "x", "--items", "y", "--sids", "z"],
    ["--collision", "never"], ["--split", "half"], ["--batch-size", "0"], ["--dim", "-1"], ["--max-length", "0"],
    ["--seed", "-1"], ["--seed", str(2 ** 70)], ["--seed", "x"], ["--num-levels", "8", "--codebook-size", "256"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_sid_tokens_there_and_back(capsys):
    assert stage.sid_token(0, 12) == "<a_12>" and stage.parse_sid_token("<c_3>") == (2, 3)
    for level in range(8):
        assert stage.parse_sid_token(stage.sid_token(level, 255)) == (level, 255)
    for wrong in ("<a_>", "<a_03>", "<a_٣>", f"<a_{10 ** 7}>", "a_1", "<i_1>", "<a_1><b_2>", " <a_1>", 5, None):
        assert_stops(capsys, stage.parse_sid_token, wrong, words=("not a SID token",))


def test_a_catalogue_without_valid_sids_is_refused(tmp_path, capsys):
    good = [{"item_id": i, "title": "t", "sid": [f"<a_{i}>", "<b_0>"]} for i in range(3)]
    assert len(stage.read_catalogue(write_lines(tmp_path / "good.jsonl", good))) == 3
    for sid in (None, [], ["<a_1>"], ["<b_0>", "<a_1>"], ["<a_1>", "<b_0>", "<c_0>"], "<a_1><b_0>"):
        path = write_lines(tmp_path / "bad.jsonl", put(good, 1, {**good[1], "sid": sid}))
        assert_stops(capsys, stage.read_catalogue, path)


@pytest.mark.parametrize("error, raised", [(ValueError, ValueError), (KeyboardInterrupt, KeyboardInterrupt),
                                            (RuntimeError, SystemExit)])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error, raised):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(raised), stage.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with stage.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with pytest.raises(TypeError):
        stage.write_jsonl(path, [{"a": 1}, {"b": object()}])
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_what_cannot_be_written_is_one_line(toy_data, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    assert_stops(capsys, stage.write_jsonl, tmp_path / "folder", [{}], words=("folder", "cannot be written"))
    (tmp_path / "file").write_text("not a folder")
    assert_stops(capsys, stage.write_jsonl, tmp_path / "file" / "x.jsonl", [{}], words=("cannot be written",))
    assert_stops(capsys, call, stage, "--data", toy_data, "--run", tmp_path / "file", "--codebook-size", 8,
                 words=("cannot be written",))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_killed_run_leaves_the_old_catalogue(toy_data, tmp_path, monkeypatch):
    flags = ("--data", toy_data, "--run", tmp_path, "--codebook-size")
    call(stage, *flags, 8)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(stage.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        call(stage, *flags, 6)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
