"""Stage 1: K-means and residuals against loops, collisions, encoders, splits, new items, errors."""
import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenize_items as stage
import torch
from conftest import (assert_one_line_error, assert_stops, call, run_script, toy_interactions, toy_items,
                      write_lines)

SAMPLES = ("train", "valid", "test")
CPU = torch.device("cpu")


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


@pytest.fixture(scope="module")
def tokenized(toy_data, tmp_path_factory) -> Path:
    """The run of this stage on the toy shop, 8 codes per level; read only (`run` is a copy)."""
    folder = tmp_path_factory.mktemp("tokenized")
    call(stage, "--data", toy_data, "--run", folder, "--codebook-size", 8)
    return folder


@pytest.fixture
def run(tokenized, tmp_path) -> Path:
    return Path(shutil.copytree(tokenized, tmp_path / "run"))


def put(rows: list, place: int, row) -> list:
    return rows[:place] + [row] + rows[place + 1:]


# ---- RQ-KMeans -----------------------------------------------------------------------------------

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
    assert all(later <= earlier + 1e-4 for earlier, later in zip(values, values[1:]))
    assert values[-1] < values[0]
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
    farthest = {tuple(x[n].tolist()) for n in distance.topk(2).indices}
    assert {tuple(row) for row in once[1:3].tolist()} == farthest
    codes = slow_assign(x, stage.kmeans(x, 4, 100, generator()))[0]
    assert set(codes) == {0, 1, 2, 3}


def test_seeds_are_distinct_points_as_far_as_there_are(capsys):
    distinct = points(6)
    x = distinct.repeat(5, 1)
    for seed in range(10):
        seeds = stage.seed_centroids(x, 6, generator(seed))
        assert sorted(seeds.tolist()) == sorted(distinct.tolist())
    seeds = stage.seed_centroids(x, 9, generator())
    assert len(seeds) == 9 and set(map(tuple, seeds.tolist())) == set(map(tuple, distinct.tolist()))
    assert stage.assign(distinct, stage.kmeans(x, 9, 5, generator()))[1].max() < 1e-4
    assert_stops(capsys, stage.seed_centroids, x, 31, generator(),
                 words=("codebook size 31", "30 items", "--codebook-size"))


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
    books = stage.fit_codebooks(x, 3, 4, seed=5)
    codes, last = stage.quantize(x, books)
    rest = x.clone()
    for level in range(3):
        assert codes[:, level].tolist() == slow_assign(rest, books[level])[0]
        before, rest = rest, rest - books[level][codes[:, level]]
    assert torch.allclose(last, before, atol=1e-6)                      # what the last level gets
    total = sum(books[level][codes[:, level]] for level in range(3))
    assert torch.allclose(total + rest, x, atol=1e-5)
    stage.print_levels(x, x, books, lambda z: z)
    printed = [float(line.split("mse ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == sorted(printed, reverse=True)
    assert printed[-1] == pytest.approx(float((rest ** 2).sum(1).mean()), abs=1e-4)
    assert torch.equal(stage.fit_codebooks(x, 3, 4, seed=5), books)


# ---- RQ-VAE --------------------------------------------------------------------------------------

def random_layers(*widths: int) -> list:
    """Layers (weight, bias) in float64 that ask for a gradient."""
    return [[torch.randn(shape, generator=generator(shape[0]), dtype=torch.float64).requires_grad_()
             for shape in ((after, width), (after,))] for width, after in zip(widths, widths[1:])]


def test_mlp_equals_torch():
    layers = random_layers(3, 7, 4, 2)
    modules = []
    for weight, bias in layers:
        linear = torch.nn.Linear(*weight.shape[::-1], dtype=torch.float64)
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [linear, torch.nn.ReLU()]
    x = points(20, 3).double()
    assert torch.allclose(stage.mlp(x, layers), torch.nn.Sequential(*modules[:-1])(x))


def test_the_loss_of_the_rqvae_and_its_gradients_by_hand():
    """One linear layer on either side, so that every derivative is a line of algebra."""
    x, books = points(12, 3).double(), points(2 * 5, 2, seed=4).double().reshape(2, 5, 2).requires_grad_()
    (encoder,), (decoder,) = random_layers(3, 2), random_layers(2, 3)
    loss = stage.rqvae_loss(x, [encoder], books, [decoder])
    loss.backward()

    n, beta, expected = len(x), stage.RQVAE_BETA, 0
    wanted = {name: torch.zeros_like(part) for name, part in zip(
        ("W", "b", "V", "d", "books"), (*encoder, *decoder, books))}
    with torch.no_grad():
        for row in x:
            z = encoder[0] @ row + encoder[1]
            rest, chosen, from_commitment = z, [], 0
            for level in range(2):
                code = min(range(5), key=lambda k: float(((rest - books[level][k]) ** 2).sum()))
                gap = rest - books[level][code]
                expected += (1 + beta) * float((gap ** 2).sum()) / n
                wanted["books"][level][code] -= 2 * gap / n             # a code is pulled by its own level only
                from_commitment += 2 * beta * gap / n                   # sg: the residuals above count as fixed
                chosen.append(books[level][code])
                rest = gap
            z_hat = sum(chosen)
            error = decoder[0] @ z_hat + decoder[1] - row
            expected += float((error ** 2).sum()) / n
            wanted["V"] += 2 * torch.outer(error, z_hat) / n
            wanted["d"] += 2 * error / n
            to_z = 2 * decoder[0].T @ error / n + from_commitment       # straight through: dz'/dz = 1
            wanted["W"] += torch.outer(to_z, row)
            wanted["b"] += to_z
    assert loss.item() == pytest.approx(expected)
    for part, gradient in zip((*encoder, *decoder, books), wanted.values()):
        assert torch.allclose(part.grad, gradient)


@pytest.mark.parametrize("width, sizes", [(128, [512, 256, 128, 32]), (1024, [1024, 512, 256, 32])])
def test_the_sizes_of_tiger_and_star(width, sizes, monkeypatch):
    monkeypatch.setattr(stage, "RQVAE_UPDATES", 0)
    books, layers = stage.fit_rqvae(points(40, width), 4, 8, seed=0)
    assert books.shape == (4, 8, 32)
    assert [tuple(weight.shape) for weight, _ in layers] == list(zip(sizes, [width, *sizes]))
    assert all(bias.shape == weight.shape[:1] for weight, bias in layers)


def errors(printed: str) -> list[float]:
    """The mse of each printed line, the first before any code."""
    return [float(line.split("mse ")[1].split()[0]) for line in printed.splitlines() if "mse" in line]


def test_a_trained_rqvae_beats_the_mean_and_uses_its_codes(monkeypatch, capsys):
    x = points(200, 8)
    variance = float(((x - x.mean(0)) ** 2).sum(1).mean())
    torch.manual_seed(0)
    monkeypatch.setattr(stage, "RQVAE_UPDATES", 0)
    stage.fit_rqvae(x, 3, 16, seed=0)
    untrained = errors(capsys.readouterr().out)
    monkeypatch.setattr(stage, "RQVAE_UPDATES", 200)
    monkeypatch.setattr(stage, "RQVAE_RESTART", 20)
    books, layers = stage.fit_rqvae(x, 3, 16, seed=0)
    printed = capsys.readouterr().out
    length, *levels = errors(printed)
    assert length == pytest.approx(float((x ** 2).sum(1).mean()), abs=1e-4)
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] < 0.5 * variance < untrained[-1]
    codes, _ = stage.quantize(stage.mlp(x, layers), books)
    for column, line in zip(codes.T, printed.splitlines()[1:]):
        counts = Counter(column.tolist())
        perplexity = np.exp(-sum(n / 200 * np.log(n / 200) for n in counts.values()))
        assert f"codes in use {len(counts)}/16 | perplexity {perplexity:.1f}" in line and len(counts) > 10
        assert line.endswith(f"largest cluster {max(counts.values())}")


def test_dead_codes_restart(monkeypatch, capsys):
    x, fit = points(100, 4), stage.fit_codebooks

    def half_dead(*args):
        books = fit(*args)
        books[:, 4:] = 1e4
        return books
    monkeypatch.setattr(stage, "fit_codebooks", half_dead)
    monkeypatch.setattr(stage, "RQVAE_UPDATES", 0)
    stage.fit_rqvae(x, 2, 8, seed=0)
    assert capsys.readouterr().out.count("codes in use 4/8") == 2
    monkeypatch.setattr(stage, "RQVAE_UPDATES", 30)
    monkeypatch.setattr(stage, "RQVAE_RESTART", 10)
    books, _ = stage.fit_rqvae(x, 2, 8, seed=0)
    assert capsys.readouterr().out.count("codes in use 8/8") == 2 and float(books.abs().max()) < 100


# ---- Collisions ----------------------------------------------------------------------------------

def crowd(count: int = 90, k: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, 3) on twelve prefixes with many collisions, residuals, centroids of the last level."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(codes_used, size=count) for codes_used in (3, 4, 5)], 1)
    residuals = rng.normal(size=(count, 4)).astype(np.float32)
    return codes, residuals, rng.normal(size=(k, 4)).astype(np.float32)


def slow_resolve(codes, residuals, book, num_fixed: int = 0) -> list[list[int]]:
    """The greedy rule in plain Python: per prefix, first those who stay, then the others, nearest first."""
    out = [list(map(int, row)) for row in codes]
    square = [[sum((float(a) - float(b)) ** 2 for a, b in zip(r, c)) for c in book] for r in residuals]
    for prefix in {tuple(row[:-1]) for row in out}:
        rows = [n for n, row in enumerate(codes) if tuple(row[:-1]) == prefix]
        shared = {c: [n for n in rows if codes[n][-1] == c] for c in {int(codes[n][-1]) for n in rows}}
        movers = []
        for code, group in shared.items():
            old = [n for n in group if n < num_fixed]
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
    assert stage.count_collisions(codes) > 20 and stage.count_collisions(after) == 0
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


@pytest.mark.parametrize("count, k", [(3, 16), (16, 16), (40, 7)])
def test_the_transport_plan_is_even_on_both_sides(count, k, monkeypatch):
    x, centroids = points(count, seed=2).numpy(), points(k, seed=3).numpy()
    plan = stage.transport_plan(x, centroids)
    assert plan.shape == (count, k) and (plan >= 0).all()
    assert plan.sum(1) == pytest.approx(np.full(count, 1 / count))
    monkeypatch.setattr(stage, "SINKHORN_EPSILON", 0.05)
    monkeypatch.setattr(stage, "SINKHORN_STEPS", 2000)
    plan = stage.transport_plan(x, centroids)
    assert plan.sum(1) == pytest.approx(np.full(count, 1 / count))
    assert plan.sum(0) == pytest.approx(np.full(k, 1 / k), rel=1e-3)
    assert stage.transport_plan(0 * x, centroids) == pytest.approx(np.full((count, k), 1 / count / k))


def test_the_transport_plan_is_the_cheapest_assignment(monkeypatch):
    """As many items as codes: of the 720 ways to give each its own, the one of least squared distance."""
    monkeypatch.setattr(stage, "SINKHORN_EPSILON", 0.01)
    monkeypatch.setattr(stage, "SINKHORN_STEPS", 5000)
    for seed in range(5):
        x, centroids = points(6, seed=seed).numpy(), points(6, seed=seed + 10).numpy()
        square = ((x[:, None] - centroids) ** 2).sum(2)
        best = min(itertools.permutations(range(6)), key=lambda way: square[range(6), way].sum())
        assert stage.transport_plan(x, centroids).argmax(1).tolist() == list(best)


def test_sinkhorn_touches_no_prefix_without_collisions():
    codes, residuals, book = crowd()
    codes[:5] = [[9, 9, n] for n in range(5)]
    before = codes.copy()
    after = stage.resolve_collisions(codes, residuals, book, "sinkhorn", 0)
    assert np.array_equal(codes, before)
    assert stage.count_collisions(after) == 0 and np.array_equal(after[:, :-1], codes[:, :-1])
    assert np.array_equal(after[:5], codes[:5])
    nearest = stage.resolve_collisions(codes, residuals, book, "nearest", 0)
    moved, moved_by_nearest = ((sids[:, -1] != codes[:, -1]).sum() for sids in (after, nearest))
    assert moved > moved_by_nearest == stage.count_collisions(codes)    # nobody keeps a shared SID
    assert np.array_equal(after, stage.resolve_collisions(codes, residuals, book, "sinkhorn", 1))


def test_one_round_of_sinkhorn_is_the_plan_of_those_that_share(monkeypatch):
    codes, residuals, book = crowd(count=5, k=16)
    codes[:] = [[0, 0, 2], [0, 0, 2], [0, 0, 3], [0, 0, 2], [0, 1, 2]]
    after = stage.resolve_collisions(codes, residuals, book, "sinkhorn", 0)
    plan = stage.transport_plan(residuals[[0, 1, 3]], book)
    assert after[[0, 1, 3], -1].tolist() == plan.argmax(1).tolist() and 3 not in plan.argmax(1)
    assert after[[2, 4]].tolist() == codes[[2, 4]].tolist()


def test_sinkhorn_cannot_part_equal_items_but_nearest_can():
    codes, residuals = np.zeros((6, 3), int), np.ones((6, 4), np.float32)
    book = crowd()[2]
    after = stage.resolve_collisions(codes, residuals, book, "sinkhorn", 0)
    nearest_first = ((book - 1) ** 2).sum(1).argsort()
    assert len(np.unique(after[:, -1])) == 6
    assert len(set(after[:, -1]) & set(nearest_first[:6])) >= 5


def test_random_is_reproducible_by_seed():
    codes, residuals, book = crowd(k=40)
    first, again, other = (stage.resolve_collisions(codes, residuals, book, "random", s) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    nearest = [stage.resolve_collisions(codes, residuals, book, "nearest", s) for s in (1, 2)]
    assert np.array_equal(*nearest)


@pytest.mark.parametrize("policy", ["nearest", "random", "sinkhorn"])
def test_old_rows_never_move_not_even_those_that_share_a_sid(policy):
    codes, residuals, book = crowd(k=20)
    codes[1] = codes[0]                                     # an official index may hold collisions
    residuals[:50] = 0                                                  # as assign_sids passes them
    after = stage.resolve_collisions(codes, residuals, book, policy, 0, num_fixed=50)
    assert np.array_equal(after[:50], codes[:50])
    old, new = {tuple(r) for r in after[:50]}, [tuple(r) for r in after[50:]]
    assert len(set(new)) == 40 and old.isdisjoint(new)
    if policy == "nearest":
        assert after.tolist() == slow_resolve(codes, residuals, book, num_fixed=50)


def test_a_full_prefix_names_itself_and_the_remedy(capsys):
    codes = np.array([[0, 1, 2]] + [[2, 1, 0]] * 4)
    residuals, book = np.zeros((5, 2), np.float32), np.eye(3, 2, dtype=np.float32)
    assert_stops(capsys, stage.resolve_collisions, codes, residuals, book, "nearest", 0,
                 words=("<a_2><b_1>", "4 items", "3 last codes", "--codebook-size", "--num-levels"))
    assert_stops(capsys, stage.resolve_collisions, codes, residuals, book, "nearest", 0, 1,
                 words=("<a_2><b_1>", "make a new run", "--codebook-size"))


@pytest.mark.parametrize("count, size", [(60, 8), (1008, 64)])
def test_the_default_codebook_size(count, size, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stage, "fit_codebooks", lambda x, levels, k, seed: asked.append(k) or stop_here())
    data = write_lines(tmp_path / "data" / "items.jsonl", toy_items(count)).parent
    write_lines(data / "interactions.jsonl", toy_interactions(count))
    with pytest.raises(KeyboardInterrupt):
        call(stage, "--data", data, "--run", tmp_path / "run")
    assert asked == [size]


def stop_here():
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", [5, 8, 12, 24, 60])
def test_a_small_catalogue_needs_no_flags(tmp_path, count):
    write_lines(tmp_path / "items.jsonl", toy_items(count))
    write_lines(tmp_path / "interactions.jsonl", toy_interactions(count))
    call(stage, "--data", tmp_path, "--run", tmp_path / "run")
    assert len({tuple(item["sid"]) for item in read(tmp_path / "run" / "items.jsonl")}) == count
    centroids = torch.load(tmp_path / "run" / "codebook.pt", weights_only=True)["centroids"]
    assert centroids.shape[1] == (4 if count < 8 else 8)


# ---- Encoders ------------------------------------------------------------------------------------

def test_terms_and_item_text():
    assert stage.terms_of("Steel rod, 12-mm") == ["steel", "rod", "12", "mm", "steel rod", "rod 12", "12 mm"]
    assert stage.terms_of("_ --") == []
    assert stage.item_text({"title": " Rod ", "description": "Long"}) == "Rod. Long"
    assert stage.item_text({"title": "", "description": "Long"}) == "Long"


def test_tfidf_by_hand():
    texts, idf = ["a b", "a a c unknown", "nothing known"], torch.tensor([1.0, 2.0, 3.0])
    matrix = stage.tfidf_matrix(texts, ["a", "b", "c"], idf).to_dense()
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
    x = stage.encode(texts, encoder, CPU)
    assert torch.allclose(x.norm(dim=1), torch.ones(60), atol=1e-5)
    dense = stage.tfidf_matrix(texts, encoder["terms"], encoder["idf"]).to_dense()
    assert torch.allclose(x @ x.T, dense @ dense.T, atol=1e-4)
    alone = stage.encode(texts[7:8], encoder, CPU)
    assert torch.allclose(alone, x[7:8], atol=1e-6)


def test_pca_reconstructs_the_sorted_variances():
    x = points(80, 6)
    pca = stage.fit_pca(x, 6)
    z = (x - pca["pca_mean"]) @ pca["pca_axes"]
    variances = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False) ** 2
    assert (z ** 2).sum(0).tolist() == pytest.approx(variances.tolist(), rel=1e-4)
    assert torch.allclose(z @ pca["pca_axes"].T + pca["pca_mean"], x, atol=1e-4)
    assert torch.equal(stage.fit_pca(x, 2)["pca_axes"], pca["pca_axes"][:, :2])


@pytest.fixture(scope="module")
def hf_encoder(tmp_path_factory) -> Path:
    """A random BERT with a small fast tokenizer, saved as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    words = sorted({w for item in toy_items() for w in stage.item_text(item).replace(".", " .").split()})
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]",
                            unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words) + 2, hidden_size=16, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=32, initializer_range=0.5)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_hf_encoder_equals_an_unbatched_loop(hf_encoder, pooling, monkeypatch):
    from transformers import AutoModel, AutoTokenizer
    words = (9, 2, 14, 1, 5, 30, 3)
    texts = [" ".join(stage.item_text(item).split()[:n]) for n, item in zip(words, toy_items())]
    encoder = {"name": str(hf_encoder), "pooling": pooling}
    monkeypatch.setattr(stage, "MAX_LENGTH", 10)
    monkeypatch.setattr(stage, "BATCH", 3)
    x = stage.encode(texts, encoder, CPU)
    model = AutoModel.from_pretrained(hf_encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf_encoder)
    for text, row in zip(texts, x):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :10]
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert torch.allclose(row, pooled / pooled.norm(), atol=1e-5)
    assert torch.allclose(x.norm(dim=1), torch.ones(7), atol=1e-5)
    monkeypatch.setattr(stage, "MAX_LENGTH", 999)                       # the model has 512 positions
    long, cut = (stage.encode([" ".join(["steel"] * n)], encoder, CPU) for n in (600, 512))
    assert torch.equal(long, cut)


def test_t5_has_an_encoder(hf_encoder, tmp_path):
    """TIGER's encoder is a T5, whose model wants decoder inputs, too."""
    from transformers import AutoTokenizer, T5Config, T5Model
    tokenizer = AutoTokenizer.from_pretrained(hf_encoder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    x = stage.encode(["steel rod", "steel \ud83d"], {"name": str(tmp_path), "pooling": "mean"}, CPU)
    assert x.shape == (2, 16) and torch.allclose(x.norm(dim=1), torch.ones(2))


def test_a_broken_model_is_one_line(hf_encoder, tmp_path, capsys):
    for path in hf_encoder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:200 if path.suffix == ".safetensors" else None])
    assert_stops(capsys, stage.encode, ["steel"], {"name": str(tmp_path), "pooling": "mean"}, CPU,
                 words=(tmp_path, "cannot be loaded"))


def test_hf_encoder_from_the_command_line(hf_encoder, toy_data, tmp_path, capsys):
    call(stage, "--data", toy_data, "--run", tmp_path, "--encoder", hf_encoder, "--codebook-size", 8,
         "--dim", 4, "--collision", "random")
    book = torch.load(tmp_path / "codebook.pt", weights_only=True)
    assert book["centroids"].shape == (3, 8, 4)
    texts = [stage.item_text(item) for item in toy_items()]
    x = stage.encode(texts, book["encoder"], CPU)
    codes = stage.quantize(x, book["centroids"])[0]
    assert [stage.sid_token(0, c) + stage.sid_token(1, d) for c, d, _ in codes.tolist()] == [
        "".join(item["sid"][:2]) for item in read(tmp_path / "items.jsonl")]
    assert_stops(capsys, call, stage, "--data", toy_data, "--run", tmp_path, "--encoder", tmp_path / "none",
                 words=(tmp_path / "none", "cannot be loaded"))


# ---- Samples -------------------------------------------------------------------------------------

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
            assert sample == {"user_id": user, "history": items[user][max(0, t - 3):t],
                              "target": items[user][t]}
    assert seen == {user: len(own) - 1 for user, own in items.items()}


def test_an_official_split_is_used_as_it_is(toy_data, tmp_path, capsys):
    data, splits = tmp_path / "data", {}
    write_lines(data / "items.jsonl", toy_items())
    for n, name in enumerate(SAMPLES):
        splits[name] = [{"user_id": f"{name}{u}", "history": list(range(12 + n)), "target": 40 + u}
                        for u in range(3)]
        write_lines(data / f"{name}.jsonl", splits[name])
    call(stage, "--data", data, "--run", tmp_path / "run", "--codebook-size", 8, "--max-history", 20)
    assert "split official" in capsys.readouterr().out
    assert {name: read(tmp_path / "run" / f"{name}.jsonl") for name in SAMPLES} == splits
    assert_stops(capsys, call, stage, "--data", data, "--run", tmp_path / "other", "--split", "leave-one-out",
                 words=("interactions.jsonl", "cannot be read"))


def test_chronological_is_the_peers_split():
    """One sample per target but the first, by its time (users in order where equal), cut at 80 and 90 %."""
    rng = random.Random(2)
    users = [{"user_id": u, "items": [rng.randrange(9) for _ in range(6)],
              "timestamps": sorted(rng.randrange(40) for _ in range(6))} for u in range(31)]
    peers = [(user["timestamps"][t], user["user_id"], user["items"][:t], user["items"][t])
             for user in users for t in range(1, 6)]
    peers.sort(key=lambda sample: sample[0])
    cuts = (0, int(0.8 * len(peers)), int(0.9 * len(peers)), len(peers))
    ours = stage.split_samples(users, "chronological")
    for name, low, high in zip(SAMPLES, cuts, cuts[1:]):
        theirs = [sample[1:] for sample in peers[low:high]]
        assert [(s["user_id"], s["history"], s["target"]) for s in ours[name]] == theirs


# ---- Whole runs ----------------------------------------------------------------------------------

def test_same_seed_same_files(toy_data, tmp_path, capsys):
    flags = ("--data", toy_data, "--codebook-size", 8, "--collision", "random")
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        call(stage, *flags, "--run", tmp_path / name, "--seed", seed)
    for file in ("items.jsonl", *(f"{name}.jsonl" for name in SAMPLES)):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    one, two, other = (torch.load(tmp_path / name / "codebook.pt", weights_only=True)
                       for name in ("one", "two", "other"))
    assert torch.equal(one["centroids"], two["centroids"])
    assert not torch.equal(one["centroids"], other["centroids"])
    assert torch.equal(one["encoder"]["components"], two["encoder"]["components"])
    assert one["encoder"]["terms"] == two["encoder"]["terms"]
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        "items.jsonl", "codebook.pt", *(f"{name}.jsonl" for name in SAMPLES)}
    out = capsys.readouterr().out
    assert "perplexity" in out and "codes in use" in out and " 0 after" in out and "wrote" in out


def test_the_stored_codebook_gives_every_item_its_own_prefix(tokenized):
    items = read(tokenized / "items.jsonl")
    book = torch.load(tokenized / "codebook.pt", weights_only=True)
    x = stage.encode([stage.item_text(item) for item in items], book["encoder"], CPU)
    raw, residuals = stage.quantize(x, book["centroids"])
    last = book["centroids"][-1].numpy()
    codes = stage.resolve_collisions(raw.numpy(), residuals.numpy(), last, "nearest", 42)
    assert [[stage.sid_token(l, c) for l, c in enumerate(row)] for row in codes.tolist()] == [
        item["sid"] for item in items]
    assert len({tuple(item["sid"]) for item in items}) == len(items)
    assert [{k: v for k, v in item.items() if k != "sid"} for item in items] == toy_items()


def given_sids() -> list[dict]:
    """SIDs for the toy shop: 60 items on 15 SIDs."""
    return [{"item_id": i, "sid": [f"<a_{i % 3}>", f"<b_{i % 5}>", "<c_9>"]} for i in range(60)]


def sids_of(run: Path) -> list[dict]:
    return [{"item_id": item["item_id"], "sid": item["sid"]} for item in read(run / "items.jsonl")]


def test_given_sids_keep_their_collisions(toy_data, run, tmp_path, capsys):
    sids = write_lines(tmp_path / "index.jsonl", given_sids()[::-1])
    assert (run / "codebook.pt").exists()                               # of an earlier run
    call(stage, "--data", toy_data, "--run", run, "--sids", sids)
    assert sids_of(run) == given_sids()
    assert not (run / "codebook.pt").exists()
    assert "45 collisions" in capsys.readouterr().out
    new = write_lines(tmp_path / "new.jsonl", [{"item_id": 999, "title": "Acme steel rod"}])
    assert_stops(capsys, call, stage, "--run", run, "--add", new, words=("codebook.pt", "cannot be loaded"))


@pytest.mark.parametrize("mangle, words", [
    (lambda rows: rows[:-1], ("item 59 has no valid SID",)),
    (lambda rows: [{**r, "item_id": str(r["item_id"])} for r in rows], ("item 0 has no valid SID",)),
    (lambda rows: put(rows, 7, {**rows[7], "item_id": "7"}), ("item 7 has no valid SID",)),
    (lambda rows: [{**r, "sid": ["<a_1>", "<q_1>"]} for r in rows], ("'<q_1>'",)),
    (lambda rows: rows[:1] + [{**r, "sid": r["sid"][:2]} for r in rows[1:]], ("item 1",)),
    (lambda rows: [{**r, "sid": r["sid"][::-1]} for r in rows], ("item 0",)),
    (lambda rows: [{**r, "sid": 7} for r in rows], ("line 1", "'sid'")),
    (lambda rows: [{**r, "sid": []} for r in rows], ("item 0",)),
    (lambda rows: [{**r, "sid": r["sid"][:1]} for r in rows], ("item 0",)),
], ids=["missing", "ids of another type", "an id of another type", "spelling", "ragged", "order",
        "number", "empty", "one level"])
def test_bad_given_sids(toy_data, tmp_path, capsys, mangle, words):
    sids = write_lines(tmp_path / "index.jsonl", mangle(given_sids()))
    assert_stops(capsys, call, stage, "--data", toy_data, "--run", tmp_path / "run", "--sids", sids,
                 words=(sids, *words))
    assert not (tmp_path / "run").exists()


def test_ids_of_two_types_are_two_items(tmp_path):
    """5 and "5" are different ids, in the catalogue and in --sids."""
    ids = [5, "5", 6, "6"]
    items = [{**item, "item_id": i} for item, i in zip(toy_items(), ids)]
    write_lines(tmp_path / "items.jsonl", items)
    write_lines(tmp_path / "interactions.jsonl", [{"user_id": 1, "items": ids}])
    given = [{"item_id": i, "sid": [f"<a_{n}>", "<b_0>"]} for n, i in enumerate(ids)]
    sids = write_lines(tmp_path / "index.jsonl", given)
    call(stage, "--data", tmp_path, "--run", tmp_path / "run", "--sids", sids)
    assert sids_of(tmp_path / "run") == given


def test_new_items_get_sids_and_nothing_moves(run, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    new = [{**item, "item_id": f"new{n}", "title": item["title"].replace("Acme", "Ajax")}
           for n, item in enumerate(toy_items(12))]
    new += [{"item_id": 999, "title": "Something unheard of"}]
    call(stage, "--run", run, "--add", write_lines(tmp_path / "new.jsonl", new))
    after = (run / "items.jsonl").read_bytes()
    assert after.startswith(before["items.jsonl"])
    assert all((run / name).read_bytes() == data for name, data in before.items() if name != "items.jsonl")
    assert sorted(p.name for p in run.iterdir()) == sorted(before)
    assert "60 old items, 13 new" in capsys.readouterr().out
    items = stage.read_catalogue(run / "items.jsonl")
    assert [i["item_id"] for i in items[60:]] == [i["item_id"] for i in new]
    assert len({tuple(i["sid"]) for i in items}) == 73
    book = torch.load(run / "codebook.pt", weights_only=True)
    x = stage.encode([stage.item_text(i) for i in items[60:]], book["encoder"], CPU)
    codes = stage.quantize(x, book["centroids"])[0]
    assert stage.codes_of(items)[60:, :2].tolist() == codes[:, :2].tolist()
    again = write_lines(tmp_path / "again.jsonl", [new[3]])
    assert_stops(capsys, call, stage, "--run", run, "--add", again, words=(again, "'new3'", "already"))
    many = write_lines(tmp_path / "many.jsonl", [{**new[0], "item_id": f"x{n}"} for n in range(9)])
    assert_stops(capsys, call, stage, "--run", run, "--add", many, words=("prefix <a_", "--codebook-size"))
    assert (run / "items.jsonl").read_bytes() == after


def test_added_items_are_reduced_like_the_old_ones(toy_data, tmp_path):
    call(stage, "--data", toy_data, "--run", tmp_path, "--codebook-size", 8, "--dim", 6)
    copies = [{**item, "item_id": f"copy{n}"} for n, item in enumerate(toy_items(5))]
    call(stage, "--run", tmp_path, "--add", write_lines(tmp_path / "new.jsonl", copies))
    items = read(tmp_path / "items.jsonl")
    assert torch.load(tmp_path / "codebook.pt", weights_only=True)["centroids"].shape == (3, 8, 6)
    assert [item["sid"][:2] for item in items[60:]] == [item["sid"][:2] for item in items[:5]]


@pytest.mark.parametrize("flags", [(), ("--dim", 6), ("--collision", "sinkhorn")])
def test_an_rqvae_run_is_reproducible_and_takes_new_items(flags, toy_data, tmp_path, capsys, monkeypatch):
    for name, value in (("RQVAE_UPDATES", 200), ("RQVAE_RESTART", 20), ("RQVAE_LR", 1e-3)):
        monkeypatch.setattr(stage, name, value)
    for name in ("one", "two"):
        call(stage, "--data", toy_data, "--run", tmp_path / name, "--codebook-size", 16, "--quantizer", "rqvae",
             *flags)
    out = capsys.readouterr().out
    assert out.count("level   a | mse") == 2 and out.count(" 0 after") == 2
    for file in ("items.jsonl", *(f"{name}.jsonl" for name in SAMPLES)):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    one, two = (torch.load(tmp_path / name / "codebook.pt", weights_only=True) for name in ("one", "two"))
    assert one["centroids"].shape == (3, 16, 32) and torch.equal(one["centroids"], two["centroids"])
    for layer, same in zip(one["encoder"]["rqvae"], two["encoder"]["rqvae"]):
        assert all(torch.equal(*pair) and not pair[0].requires_grad for pair in zip(layer, same))

    monkeypatch.setattr(stage, "fit_rqvae", stop_here)                  # no second training
    copies = [{**item, "item_id": f"copy{n}"} for n, item in enumerate(toy_items(5))]
    copies += [{"item_id": 999, "title": "Something unheard of"}]
    before = (tmp_path / "one" / "items.jsonl").read_bytes()
    policy = flags if "--collision" in flags else ()
    call(stage, "--run", tmp_path / "one", "--add", write_lines(tmp_path / "new.jsonl", copies), *policy)
    assert (tmp_path / "one" / "items.jsonl").read_bytes().startswith(before)
    items = stage.read_catalogue(tmp_path / "one" / "items.jsonl")
    assert [item["sid"][:2] for item in items[60:65]] == [item["sid"][:2] for item in items[:5]]
    assert len({tuple(item["sid"]) for item in items}) == 66
    x = stage.encode([stage.item_text(item) for item in items[60:]], one["encoder"], CPU)
    assert x.shape == (6, 32)
    assert stage.codes_of(items)[60:, :2].tolist() == stage.quantize(x, one["centroids"])[0][:, :2].tolist()


def test_bad_codebooks(run, tmp_path, capsys):
    new = write_lines(tmp_path / "new.jsonl", [{"item_id": 999, "title": "Acme steel rod"}])
    catalogue, codebook = run / "items.jsonl", run / "codebook.pt"
    before, whole = catalogue.read_bytes(), codebook.read_bytes()
    for data in (b"not a checkpoint\n", b"", whole[:500], whole[:len(whole) // 2]):
        codebook.write_bytes(data)
        assert_stops(capsys, call, stage, "--run", run, "--add", new, words=(codebook, "cannot be loaded"))
    torch.save([1, 2], codebook)
    assert_stops(capsys, call, stage, "--run", run, "--add", new, words=(codebook, "centroids, encoder"))
    codebook.unlink()
    assert_stops(capsys, call, stage, "--run", run, "--add", new, words=(codebook, "missing"))
    codebook.mkdir()
    assert_stops(capsys, call, stage, "--run", run, "--add", new, words=(codebook, "missing"))
    assert catalogue.read_bytes() == before


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


# ---- Bad input -----------------------------------------------------------------------------------

def item_lines(place: int, **fields) -> str:
    """The toy catalogue as JSONL, the item at `place` with other fields (None: without)."""
    rows = toy_items()
    return jsonl(put(rows, place, {k: v for k, v in {**rows[place], **fields}.items() if v is not None}))


def user_lines(**fields) -> str:
    """The toy interactions as JSONL, the second user with other fields (None: without)."""
    rows = toy_interactions()
    return jsonl(put(rows, 1, {k: v for k, v in {**rows[1], **fields}.items() if v is not None}))


def jsonl(rows: list) -> str:
    """One line per row; a row that is a string is a line already."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


BAD_ITEMS = {       # what is wrong: (content of items.jsonl, words of the message)
    "malformed": (jsonl(put(toy_items(), 4, '{"item_id": 4,')), ("items.jsonl, line 5", "JSON")),
    "after blank lines": ("\ufeff\n \n" + item_lines(4, title=7), ("items.jsonl, line 7", "'title'")),
    "no object": (jsonl(put(toy_items(), 2, [1, 2])), ("items.jsonl, line 3", "'item_id'")),
    "no title": (item_lines(2, title=None), ("line 3", "'title'")),
    "nothing": ("", ("items.jsonl", "is empty")),
    "twice": (jsonl(toy_items() + toy_items()[7:8]), ("line 61", "item_id 7")),
    "no text": (item_lines(3, title="", description=None), ("items.jsonl: item 3", "description")),
    "blank text": (item_lines(3, title=" ", description="\n"), ("items.jsonl: item 3", "description")),
    "list as id": (item_lines(3, item_id=[3]), ("line 4", "'item_id'")),
    "fraction as id": (item_lines(3, item_id=3.5), ("line 4", "'item_id'")),
    "number as title": (item_lines(3, title=7), ("line 4", "'title'")),
    "no common word": (jsonl([{"item_id": n, "title": f"word{n}"} for n in range(60)]), ("no word",))}
BAD_USERS = {       # what is wrong: (content of interactions.jsonl, words of the message)
    "malformed": ('{"user_id": 4,\n', ("interactions.jsonl, line 1", "JSON")),
    "unknown item": (user_lines(items=[1, 777, 2], timestamps=[1, 2, 3]),
                     ("interactions.jsonl, line 2", "777", "catalogue")),
    "id of another type": (user_lines(items=["1", "2", "3"], timestamps=[1, 2, 3]), ("line 2", "'1'")),
    "list as item": (user_lines(items=[[1], 2, 3], timestamps=[1, 2, 3]), ("line 2", "[1]")),
    "user twice": (user_lines(user_id="u0"), ("line 2", "'u0'")),
    "list as user": (user_lines(user_id=["u1"]), ("line 2", "'user_id'")),
    "items no list": (user_lines(items=5), ("line 2", "'items'")),
    "no items": (user_lines(items=[], timestamps=[]), ("line 2", "empty")),
    "times fall": (user_lines(items=[1, 2, 3], timestamps=[1, 3, 2]), ("'u1'", "ascending")),
    "times missing": (user_lines(items=[1, 2, 3], timestamps=[1, 2]), ("'u1'", "one for each")),
    "times no list": (user_lines(items=[1, 2, 3], timestamps=5), ("'u1'", "timestamps")),
    "times mixed": (user_lines(items=[1, 2, 3], timestamps=[1, "2", 3]), ("'u1'", "timestamps")),
    "empty split": (jsonl([{"user_id": "u", "items": [1, 2, 3]}]), ("train", "empty"))}
BAD_FLAGS = {       # what is wrong: (flags, words of the message)
    "no times": (("--split", "chronological"), ("'u1'", "timestamps")),
    "K too large": (("--codebook-size", 61), ("codebook size 61", "60", "--codebook-size")),
    "K too large for rqvae": (("--codebook-size", 61, "--quantizer", "rqvae"), ("codebook size 61", "60")),
    "full prefix": (("--codebook-size", 2, "--num-levels", 2), ("prefix <a_", "--codebook-size")),
    "no official split": (("--split", "official"), ("train.jsonl", "cannot be read")),
    "no device": (("--device", "nonsense"), ("--device nonsense",))}


@pytest.mark.parametrize("file, case", [("items", case) for case in BAD_ITEMS] + [
    ("interactions", case) for case in BAD_USERS] + [("", case) for case in BAD_FLAGS])
def test_bad_input_is_one_line_and_writes_nothing(file, case, toy_data, tmp_path, capsys):
    data, flags = Path(shutil.copytree(toy_data, tmp_path / "data")), ()
    if file:
        content, words = (BAD_ITEMS if file == "items" else BAD_USERS)[case]
        (data / f"{file}.jsonl").write_text(content, encoding="utf-8")
    else:
        flags, words = BAD_FLAGS[case]
        (data / "interactions.jsonl").write_text(user_lines(timestamps=None), encoding="utf-8")
    flags = ("--split", "chronological") if case.startswith("times") else flags
    assert_stops(capsys, call, stage, "--data", data, "--run", tmp_path / "run", *flags, words=words)
    assert not (tmp_path / "run").exists()


def test_the_run_may_not_be_the_data(toy_data, tmp_path, capsys):
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    assert_stops(capsys, call, stage, "--data", data, "--run", tmp_path / "." / "data", words=("--run", "--data"))
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_a_line_that_is_not_utf8_is_named(tmp_path, capsys):
    lines = [json.dumps({"item_id": n, "title": f"café {n}"}, ensure_ascii=False) for n in range(40)]
    path = tmp_path / "items.jsonl"
    path.write_bytes("\n".join(lines).encode().replace("é 20".encode(), "é 20".encode("latin-1")))
    assert_stops(capsys, stage.read_items, path, words=("items.jsonl, line 21", "UTF-8"))
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())     # a byte-order mark is no part of it
    assert stage.read_items(path)[0]["title"] == "café 0"


@pytest.mark.parametrize("fields, words", [
    ({"user_id": None}, ("'user_id'",)), ({"history": []}, ("empty",)), ({"history": "12"}, ("'history'",)),
    ({"history": [1, 99]}, ("99",)), ({"target": "3"}, ("'3'",)), ({"target": [3]}, ("'target'",))])
def test_bad_samples(tmp_path, capsys, fields, words):
    good = {"user_id": 1, "history": [1, 2], "target": 3}
    path = write_lines(tmp_path / "valid.jsonl", [good, {**good, **fields}])
    assert_stops(capsys, stage.read_samples, path, set(range(60)), words=("valid.jsonl, line 2", *words))


def test_a_bom_and_blank_lines_are_passed_over(tmp_path):
    text = jsonl([*toy_items(), '{"item_id": "e", "title": "\\ud83d\\ude00"}'])
    (tmp_path / "items.jsonl").write_text("\ufeff\n" + text.replace("\n", "\r\n \n"), encoding="utf-8")
    *items, emoji = stage.read_items(tmp_path / "items.jsonl")
    assert items == toy_items() and emoji["title"] == "\U0001f600"


def test_as_a_user_sees_it(tmp_path):
    done = run_script("tokenize_items.py", "--run", tmp_path / "run", "--data", tmp_path)
    assert_one_line_error(done, str(tmp_path / "items.jsonl"), "cannot be read")
    assert done.stderr.count("\n") == 1 and done.stdout == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    ["--no-such-flag"], ["--num-levels", "1"], ["--num-levels", "9"], ["--max-history", "0"], ["--add"],
    ["--codebook-size", "-1"], ["--collision", "never"], ["--split", "half"], ["--batch-tokens", "0"],
    ["--quantizer", "pq"], ["--quantizer"], ["--quantizer", ""],
    ["--dim", "-1"], ["--seed", "-1"], ["--seed", str(2 ** 70)], ["--seed", "x"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_sid_tokens_there_and_back():
    assert stage.sid_token(0, 12) == "<a_12>" and stage.parse_sid_token("<c_3>") == (2, 3)
    for level in range(8):
        assert stage.parse_sid_token(stage.sid_token(level, 255)) == (level, 255)


def test_a_catalogue_without_valid_sids_is_refused(tmp_path, capsys):
    good = [{"item_id": i, "title": "t", "sid": [f"<a_{i}>", "<b_0>"]} for i in range(3)]
    assert len(stage.read_catalogue(write_lines(tmp_path / "good.jsonl", good))) == 3
    wrong_tokens = ("<a_>", "<a_03>", "<a_٣>", f"<a_{10 ** 7}>", "a_1", "<i_1>", "<a_1><b_2>", " <a_1>",
                    5, None)
    for sid in (None, [], 7, ["<a_1>"], ["<b_0>", "<a_1>"], ["<a_1>", "<b_0>", "<c_0>"], "<a_1><b_0>",
                *([token, "<b_0>"] for token in wrong_tokens)):
        path = write_lines(tmp_path / "bad.jsonl", put(good, 1, {**good[1], "sid": sid}))
        assert_stops(capsys, stage.read_catalogue, path, words=(path, "item 1"))


@pytest.mark.parametrize("error, raised", [(ValueError, ValueError), (KeyboardInterrupt, KeyboardInterrupt),
                                            (RuntimeError, SystemExit)])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error, raised):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(raised), stage.atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with stage.atomic_write(path) as temporary:
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


def test_a_killed_run_leaves_the_old_catalogue(toy_data, run, monkeypatch):
    before = {p.name: p.read_bytes() for p in run.iterdir()}

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(stage.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        call(stage, "--data", toy_data, "--run", run, "--codebook-size", 6)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
