"""Stage 5: rewards and advantages by hand, the tree forward against repeated prompts, a bandit, runs."""
import itertools
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import evaluate
import rl as stage
import tokenize_items
import train
from conftest import ROOT, assert_stops, call, random_model, write_lines
from evaluate import beam_search
from init_embeddings import build_trie, load_model, new_items, trie_paths, update_sid
from test_evaluate import CPU, KINDS, K, children_of, narrow, random_catalogue, random_prompts, read_lines
from test_search import WINDOWS, generator
from tokenize_items import codes_of, read_catalogue


def make_catalogue(num_levels: int = 3, count: int = 30, seed: int = 1) -> stage.Catalogue:
    """A random catalogue, one item per leaf."""
    codes, sid_ids = random_catalogue(num_levels, count, seed=seed)
    trie = build_trie(codes, K, CPU)
    return stage.Catalogue(trie, sid_ids, codes[torch.from_numpy(trie.leaf_items)], trie.leaf_items.tolist())


def draw_leaves(catalogue: stage.Catalogue, batch: int, group: int) -> Tensor:
    g = generator(7)
    return torch.stack([torch.randperm(len(catalogue.codes), generator=g)[:group] for _ in range(batch)])


def roll_out(model, catalogue, batch, sample=None, group_size=6, mix={"hit": 1.0}, micro_tokens=4096):
    return stage.roll_out(model, catalogue, batch, group_size, mix, sample, micro_tokens)


def update(model, reference, optimizer, catalogue, groups, num_groups, updates=1, kl_coef=0.0, max_norm=1.0,
           micro_tokens=4096, precision="float32"):
    return stage.update(
        model, reference, optimizer, catalogue, groups, num_groups, updates, clip_eps=0.2, kl_coef=kl_coef,
        max_grad_norm=max_norm, micro_tokens=micro_tokens, precision=precision)


# ---- rewards, advantages, objective ----

def test_rewards_by_hand():
    codes = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 1, 2]])

    def reward(mix: dict, leaves: list[list[int]], targets: list[int], scores: list[list[float]] = [[0.0]]):
        return stage.group_rewards(mix, codes, *map(torch.tensor, (leaves, scores, targets)))
    hits = reward({"hit": 1.0}, [[3, 2, 1], [1, 2, 3]], [2, 0])
    assert hits.tolist() == [[0, 1, 0], [0, 0, 0]]
    # the policy ranks the last rollout first, then the first, then the hit: costs 1, 1/log2(3), 1/2
    penalty = stage.rank_penalty(hits, torch.tensor([[-2.0, -3.0, -1.0], [-1.0, -2.0, -3.0]]))
    total = 1 + 1 / math.log2(3) + 0.5
    assert penalty[0].tolist() == pytest.approx([-1 / math.log2(3) / total, 0, -1 / total])
    assert not penalty[1].any()
    sixteen = stage.rank_penalty(torch.eye(16)[15:], -torch.arange(16.0)[None])[0]      # as in MiniOneRec
    assert sixteen[:3].tolist() == pytest.approx([-0.1638, -0.1033, -0.0819], abs=1e-4) and sixteen[15] == 0

    prefix = reward({"prefix": 1.0}, [[0, 1, 2, 3]], [0])
    assert prefix[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])    # not after a difference
    mixed = reward({"hit": 2.0, "prefix": 0.3, "rank": 0.5}, [[0, 1]], [0], [[-2.0, -1.0]])
    cost = 1 / (1 + 1 / math.log2(3))                                   # of the first place
    assert mixed.tolist() == [pytest.approx([2 + 0.3, 0.2 - 0.5 * cost])]


def test_advantages_by_hand():
    found, s = stage.group_advantages(torch.tensor([[1.0, 0, 0, 0], [0.3, 0.3, 0.3, 0.3]])), math.sqrt(3) / 4
    assert found[0].tolist() == pytest.approx([0.75 / (s + 1e-4)] + [-0.25 / (s + 1e-4)] * 3)
    assert found[1].abs().max() < 1e-2
    assert stage.group_advantages(torch.ones(2, 1)).tolist() == [[0], [0]]              # a group of one


def test_k3():
    x = torch.randn(50, generator=generator()).double().requires_grad_()
    ref = x.detach() + 0.3 * torch.randn(50, generator=generator(1)).double()
    assert not stage.k3(x, x).any() and (stage.k3(x, ref) > 0).all()
    torch.testing.assert_close(stage.k3(x, ref), (ref - x).exp() - 1 - (ref - x))
    stage.k3(x, ref).sum().backward()
    torch.testing.assert_close(x.grad, 1 - (ref - x.detach()).exp())
    # averaged over the policy p, its value is KL(p || reference), its gradient that of KL(reference || p)
    logits = torch.randn(9, generator=generator(2)).double().requires_grad_()
    log_p, log_r = logits.log_softmax(0), torch.randn(9, generator=generator(3)).double().log_softmax(0)
    estimate = (log_p.detach().exp() * stage.k3(log_p, log_r)).sum()
    assert estimate.item() == pytest.approx((log_p.exp() * (log_p - log_r)).sum().item())
    found, = torch.autograd.grad(estimate, logits, retain_graph=True)
    wanted, = torch.autograd.grad((log_r.exp() * (log_r - log_p)).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_policy_loss_by_hand():
    old = torch.tensor([[[-1.0, -2.0], [-0.5, -1.5]]])
    moved = (old + torch.tensor([[[0.5, 0.1], [0.5, -0.5]]])).requires_grad_()
    advantages = torch.tensor([[2.0, -1.0]])
    found = stage.policy_loss(moved, old, old - 0.2, advantages, 0.2, 0.1)
    gains = [2 * 1.2, 2 * math.exp(0.1), -math.exp(0.5), -0.8]          # clipped, free, free, clipped
    k3 = [math.exp(gap) - 1 - gap for gap in (-0.7, -0.3, -0.7, 0.3)]
    assert found["loss"].shape == found["kl"].shape == found["clipped"].shape == (1,)
    assert found["loss"].item() == pytest.approx((0.1 * sum(k3) - sum(gains)) / 4)
    assert found["kl"].item() == pytest.approx(sum(k3) / 4) and found["clipped"].item() == 0.5
    slope, = torch.autograd.grad(found["loss"].sum(), moved)            # only the KL where the clip holds
    free = torch.tensor([[[0, -2 * math.exp(0.1)], [math.exp(0.5), 0]]])
    torch.testing.assert_close(slope, (free + 0.1 * (1 - torch.exp(old - 0.2 - moved.detach()))) / 4)


# ---- the tree forward ----

def repeated(model, catalogue: stage.Catalogue, prompts: list[list[int]], leaves: Tensor) -> Tensor:
    """The truth: each prompt written out G times, without padding, with all logits; (B, G, L)."""
    kids, sid_ids, out = children_of(catalogue.codes), catalogue.sid_ids, []
    for prompt, row in zip(prompts, leaves.tolist()):
        for leaf in row:
            sid = catalogue.codes[leaf].tolist()
            ids = prompt + [int(sid_ids[level][code]) for level, code in enumerate(sid[:-1])]
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1:]
            for level, code in enumerate(sid):
                legal = kids[tuple(sid[:level])]
                out.append(logits[level, sid_ids[level][legal]].log_softmax(0)[legal.index(code)])
    return torch.stack(out).view(*leaves.shape, -1)


def gradients(model, total: Tensor) -> Tensor:
    model.zero_grad()
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_tree_equals_repeated(model, catalogue: stage.Catalogue, prompts: list[list[int]]) -> None:
    """Log-probabilities, gradients and the search's own scores."""
    leaves = draw_leaves(catalogue, len(prompts), 5)
    ours = stage.tree_log_probs(model, catalogue, prompts, leaves)
    theirs = repeated(model, catalogue, prompts, leaves)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.dtype == torch.float32
    weights = torch.randn(ours.shape, generator=generator())
    mine, wanted = gradients(model, (ours * weights).sum()), gradients(model, (theirs * weights).sum())
    assert (mine - wanted).norm() < 1e-4 * wanted.norm()
    assert (mine - wanted).abs().max() < 1e-4 * wanted.abs().max()
    found, scores = beam_search(model, catalogue.trie, catalogue.sid_ids, prompts, 7)
    with torch.no_grad():
        again = stage.tree_log_probs(model, catalogue, prompts, found).sum(-1)
    torch.testing.assert_close(again, scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_levels, kind, tied", [
    *itertools.product((3,), KINDS, (True, False)), (2, "qwen2", True), (4, "qwen2", True)])
def test_tree_forward_equals_repeated_prompts(num_levels, kind, tied):
    assert_tree_equals_repeated(random_model(kind, tied), make_catalogue(num_levels), random_prompts())


@pytest.mark.parametrize("name", WINDOWS)
def test_tree_forward_inside_a_sliding_window(name):
    model, catalogue = random_model(**WINDOWS[name]), make_catalogue()
    assert_tree_equals_repeated(model, catalogue, random_prompts((14, 3, 9)))           # 14 + L - 1 = 16


def test_paths_lead_to_the_leaves():
    catalogue = make_catalogue()
    path = trie_paths(catalogue.trie, torch.arange(len(catalogue.codes))[None])
    codes = [codes[nodes[0]] for codes, nodes in zip(catalogue.trie.codes, path)]
    assert torch.stack(codes, 1).equal(catalogue.codes.int())


def test_reduced_precision_starts_at_ratio_one():
    model, catalogue = random_model(), make_catalogue()
    batch = [stage.Prompt(prompt, 3) for prompt in random_prompts()]
    groups, _ = roll_out(model, catalogue, batch, group_size=30)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    sums = update(model, model, optimizer, catalogue, groups, len(batch), kl_coef=1.0, precision="bfloat16")
    assert sums["kl"] == sums["clipped"] == 0 and sums["grad_norm"] > 0 and len(groups) == 4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- learning ----

@torch.no_grad()
def enumerate_policy(model, catalogue: stage.Catalogue, prompt: list[int]) -> Tensor:
    """Log-probability of every leaf, (leaves,)."""
    leaves = torch.arange(len(catalogue.codes))[None]
    return stage.tree_log_probs(model, catalogue, [prompt], leaves)[0].sum(-1)


@pytest.mark.parametrize("seed, rollout, mix, updates, kl_coef", [
    *((seed, "sample", {"hit": 1.0}, 1, 0.0) for seed in (0, 1, 2)),
    (0, "sample", {"hit": 1.0, "rank": 1.0}, 1, 0.0),
    (0, "beam", {"hit": 1.0}, 2, 1e-3)])
def test_a_bandit_is_solved(seed, rollout, mix, updates, kl_coef):
    """The best of 20 items is found within 40 updates: from the middle of the start's ranking, or, by beams,
    from the fifth place, because they never try what is not among the first G."""
    model, reference = random_model(seed=seed), random_model(seed=seed)
    catalogue = make_catalogue(3, 22, seed)
    prompt = random_prompts((6,), seed)[0]
    place = 4 if rollout == "beam" else len(catalogue.codes) // 2
    best = int(enumerate_policy(model, catalogue, prompt).argsort(descending=True)[place])
    optimizer, batch = torch.optim.Adam(model.parameters(), 5e-3), [stage.Prompt(prompt, best)] * 4
    for step in range(40):
        noise = generator(step) if rollout == "sample" else None
        groups, _ = roll_out(model, catalogue, batch, noise, 8, mix)
        update(model, reference, optimizer, catalogue, groups, len(batch), updates, kl_coef)
    chance = enumerate_policy(model, catalogue, prompt).exp()
    assert chance.argmax() == best and chance[best] > 0.5, chance[best]


def test_groups_without_differences_are_dropped():
    model, catalogue, prompts = random_model(), make_catalogue(), random_prompts((4, 6))
    batch = [stage.Prompt(prompts[0], 2), stage.Prompt(prompts[1], -1)]         # the second target is no leaf
    groups, sums = roll_out(model, catalogue, batch, generator(), group_size=40)
    size = len(catalogue.codes)                                         # fewer than 40
    assert [g.prompt for g in groups] == prompts[:1] and groups[0].leaves.shape == (size,)
    assert (sums["groups"], sums["dropped"], sums["hits"]) == (2, 1, 1)
    assert sums["reward"] == pytest.approx(1 / size)
    policies = [enumerate_policy(model, catalogue, prompt) for prompt in prompts]
    assert sums["entropy"] == pytest.approx(sum(-(p.exp() * p).sum().item() for p in policies), rel=1e-4)
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 1.0)
    nothing = update(model, random_model(seed=9), optimizer, catalogue, [], 2, kl_coef=1.0)
    assert all(map(torch.equal, before, model.parameters()))            # no step at all
    assert not optimizer.state and not any(nothing.values())


def test_a_process_without_prompts_sums_the_same_names():
    model, catalogue = random_model(), make_catalogue()
    some, none = (roll_out(model, catalogue, batch)[1] for batch in ([stage.Prompt([5, 6], 1)], []))
    assert list(some) == list(none) and not any(none.values())


def test_log_row_by_hand():
    sums = {"groups": 8, "dropped": 4, "reward": 2.0, "hits": 6, "entropy": 12.0, "kl": 1.0, "clipped": 2.0,
            "grad_norm": 3.0, "steps": 2}
    assert stage.log_row(sums, 10, seconds=4.0) == {
        "reward": 0.25, "hit@10": 0.75, "zero_variance": 0.5, "entropy": 1.5, "kl": 0.25, "clipped": 0.5,
        "grad_norm": 1.5, "rollouts_per_second": 20}


def test_micro_batches_and_processes_do_not_change_the_update():
    catalogue, found = make_catalogue(), []
    batch = [stage.Prompt(prompt, 3) for prompt in random_prompts((1, 5, 23, 9, 12))]
    for micro, share in ((4096, 1), (60, 1), (4096, 2)):
        grads = 0
        for rank in range(share):
            model, reference = random_model(), random_model(seed=1)
            optimizer = torch.optim.SGD(model.parameters(), 0.0)
            groups, _ = roll_out(model, catalogue, batch[rank::share], group_size=20, micro_tokens=micro)
            update(model, reference, optimizer, catalogue, groups, len(batch), kl_coef=0.1, max_norm=math.inf,
                   micro_tokens=micro)
            grads = grads + torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append(grads)
    assert found[0].norm() > 0
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-5 * found[0].norm()


def test_batches_cover_an_epoch_and_shuffle_anew():
    batches = [stage.batch_rows(11, 3, step, 5) for step in range(6)]
    epochs = [sum(batches[:3], []), sum(batches[3:], [])]
    assert all(len(set(rows)) == 9 for rows in epochs) and epochs[0] != epochs[1]
    assert stage.batch_rows(11, 3, 4, 5) == stage.batch_rows(11, 3, 4, 5) != stage.batch_rows(11, 3, 4, 6)
    assert sorted(stage.batch_rows(2, 64, 7, 0)) == [0, 1]


def test_a_process_without_validation_users(monkeypatch):
    """More processes than users: this one has none, its figures are those of the others."""
    model, catalogue = random_model(), make_catalogue()
    prompts, targets = random_prompts((4, 6, 2)), catalogue.item_ids[:3]
    totals = []                                                         # of the other process
    monkeypatch.setattr(stage, "sum_over_processes", lambda value: totals.append(value) or value)
    alone = stage.validate(model, catalogue, prompts, targets)
    monkeypatch.setattr(stage, "sum_over_processes", lambda value: value + totals[0])
    assert stage.validate(model, catalogue, [], []) == pytest.approx(alone)
    assert stage.validate(model, catalogue, prompts, targets) == pytest.approx(alone)


# ---- whole runs ----

QUICK = ("--epochs", 1, "--batch-size", 16, "--group-size", 8, "--lr", 1e-3, "--eval-every", 3,
         "--log-every", 2)


def weights_of(path) -> dict:
    return torch.load(path, weights_only=True)["weights"]


def log_of(path) -> list[dict]:
    """The rows of a run's log, but for what depends on the machine's speed."""
    return [{key: value for key, value in row.items() if "second" not in key} for row in read_lines(path)]


def test_a_run(run, capsys):
    call(stage, "--run", run, *QUICK, "--reward", "hit:1,rank,prefix:0.1", "--tasks", "next,title2sid")
    out, rows = capsys.readouterr().out, read_lines(run / "rl_log.jsonl")
    assert [r["step"] for r in rows if "NDCG@10" in r] == [0, 3, 6, 9, 11] and rows[0]["step"] == 0
    assert [r["step"] for r in rows if "reward" in r] == [2, 4, 6, 8, 10, 11]
    figures = {"reward", "hit@8", "zero_variance", "entropy", "kl", "clipped", "grad_norm", "lr",
               "rollouts_per_second"}
    assert all(figures <= r.keys() for r in rows if "reward" in r)
    assert all({"HR@1", "HR@5", "HR@10", "HR@50"} <= r.keys() for r in rows if "NDCG@10" in r)
    best = max((r for r in rows if "NDCG@10" in r), key=lambda r: r["NDCG@10"])
    checkpoint = torch.load(run / "rl.pt", weights_only=True)
    assert checkpoint["stage"] == "rl" and checkpoint["metrics"]["NDCG@10"] == best["NDCG@10"]
    assert checkpoint["step"] == best["step"] and not (run / "rl_resume.pt").exists()
    assert "valid | step 0 |" in out and f"valid | step {best['step']} |" in out and ">><" in out
    _, _, loaded = load_model(run / "rl.pt", CPU, read_catalogue(run / "items.jsonl"))
    assert loaded["args"]["reward"] == {"hit": 1.0, "rank": 1.0, "prefix": 0.1}
    assert loaded["args"]["tasks"] == ["next", "title2sid"]


def test_validation_asks_as_sft_did_whatever_the_prompts(run):
    checkpoint = torch.load(run / "sft.pt", weights_only=True)
    assert checkpoint["args"]["recommends"] == "next_brief"
    starts = []
    for tasks in ((), ("--tasks", "title2sid")):
        call(stage, "--run", run, *QUICK, *tasks)
        starts.append(log_of(run / "rl_log.jsonl")[0])
        trained = torch.load(run / "rl.pt", weights_only=True)["args"]
        assert trained["recommends"] == "next_brief"                    # and so does evaluate.py
    assert starts[0] == starts[1]


def test_new_items_are_averaged_as_in_evaluation(run, tmp_path):
    new = [{"item_id": f"n{n}", "title": f"Acme clay pot number {100 + n}", "description": "A clay pot."}
           for n in range(3)]
    call(tokenize_items, "--run", run, "--add", write_lines(tmp_path / "new.jsonl", new))
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(run / "sft.pt", CPU, items)
    codes = torch.from_numpy(codes_of(items))
    for targets, still_new in ((set(), {"n0", "n1", "n2"}), ({"n1", 5}, {"n0", "n2"})):
        sid = update_sid(checkpoint["sid"], items, targets)             # what this training has as targets
        assert new_items(sid, items) == still_new
        catalogue = stage.load_catalogue(items, tokenizer, sid, CPU)
        new = torch.tensor([item["item_id"] in still_new for item in items])
        trie = build_trie(codes, sid["codebook_size"], CPU, new)
        assert all(map(torch.equal, catalogue.trie.is_new, trie.is_new)) and catalogue.trie.is_new[-1].any()
        leaves = torch.arange(len(catalogue.codes))[None]
        found, scores = beam_search(model, trie, catalogue.sid_ids, [[5, 6, 7]], len(items))
        ours = stage.tree_log_probs(model, catalogue, [[5, 6, 7]], leaves).sum(-1)
        torch.testing.assert_close(ours[0, found[0]], scores[0], atol=1e-5, rtol=1e-5)
    # and a whole run's validation is what evaluate.py reports, before and after
    call(stage, "--run", run, *QUICK)
    rows = read_lines(run / "rl_log.jsonl")
    best = max((r for r in rows if "NDCG@10" in r), key=lambda r: r["NDCG@10"])
    for name, row in (("sft.pt", rows[0]), ("rl.pt", best)):
        call(evaluate, "--run", run, "--checkpoint", run / name, "--split", "valid", "--num-beams", 50,
             "--memory", 0, "--batch-tokens", 4096)
        figures = read_lines(run / "metrics.jsonl")[-1]
        assert {k: figures[k] for k in stage.SHOWN} == pytest.approx({k: row[k] for k in stage.SHOWN})


def test_a_process_without_prompts_and_users(run, monkeypatch):
    """The second of two processes, for batches of one prompt and one user to validate on."""
    monkeypatch.setattr(stage, "join_processes", lambda *_: (CPU, 1, 2))
    monkeypatch.setattr(stage, "sum_over_processes", lambda value: value + 1)   # what the first one has
    write_lines(run / "valid.jsonl", read_lines(run / "valid.jsonl")[:1])
    call(stage, "--run", run, *QUICK, "--batch-size", 1, "--eval-every", 60)
    assert not (run / "rl.pt").exists() and not (run / "rl_log.jsonl").exists()         # the first one writes


def test_the_first_update_is_the_first_that_adamw_makes(run, monkeypatch):
    learned, real = 0, stage.update          # batches before this one with a group whose rewards differ

    def watch(model, reference, optimizer, catalogue, groups, *rest):
        nonlocal learned
        assert {int(state["step"]) for state in optimizer.state.values()} == ({learned} if learned else set())
        learned += bool(groups)
        return real(model, reference, optimizer, catalogue, groups, *rest)
    monkeypatch.setattr(stage, "update", watch)
    call(stage, "--run", run, *QUICK)
    assert learned > 1


def test_what_does_not_help_leaves_the_sft_weights(run, capsys, monkeypatch):
    figures = iter([0.5, 0.4, 0.5, 0.3])
    start = dict.fromkeys(stage.SHOWN, 0.1)
    monkeypatch.setattr(stage, "validate", lambda *_: {**start, "NDCG@10": next(figures)})
    call(stage, "--run", run, *QUICK, "--patience", 3, "--eval-every", 1)
    before, after = weights_of(run / "sft.pt"), weights_of(run / "rl.pt")
    assert before.keys() == after.keys() and all(torch.equal(w, after[name]) for name, w in before.items())
    assert capsys.readouterr().out.count("valid | step 0 |") == 2         # the start is the best
    assert read_lines(run / "rl_log.jsonl")[-1]["step"] == 3            # patience


@pytest.mark.parametrize("rollout", ("sample", "beam"))
def test_resumed_equals_uninterrupted_bit_for_bit(run, monkeypatch, capsys, rollout):
    flags = ("--run", run, *QUICK, "--rollout", rollout, "--patience", 99)
    real, better = stage.validate, itertools.count()                    # always better, to the last step
    monkeypatch.setattr(stage, "validate", lambda *a: {**real(*a), "NDCG@10": next(better) / 100})
    call(stage, *flags, "--out", run / "whole.pt")
    asked = []
    monkeypatch.setattr(stage, "catch_interrupts", lambda device: lambda: asked.append(1) or len(asked) == 4)
    with pytest.raises(SystemExit) as stopped:
        call(stage, *flags, "--out", run / "cut.pt")
    assert stopped.value.code == 130 and (run / "cut_resume.pt").exists() and len(asked) == 4
    flags = (*flags, "--out", run / "cut.pt", "--resume")
    assert_stops(capsys, call, stage, *flags, "--kl-coef", 0, words=("kl-coef", "0.001", "--resume"))
    assert_stops(capsys, call, stage, *flags, "--from", run / "whole.pt", words=("--resume",))
    train = (run / "train.jsonl").read_bytes()
    (run / "train.jsonl").write_bytes(b"".join(reversed(train.splitlines(True))))
    assert_stops(capsys, call, stage, *flags, words=("prompts", "--resume"))
    (run / "train.jsonl").write_bytes(train)
    call(stage, *flags)
    whole, cut = weights_of(run / "whole.pt"), weights_of(run / "cut.pt")
    assert all(torch.equal(w, cut[name]) for name, w in whole.items())
    assert not (run / "cut_resume.pt").exists()
    logs = [[{**row, "NDCG@10": 0} for row in log_of(run / f"{name}_log.jsonl")] for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert not all(torch.equal(w, weights_of(run / "sft.pt")[name]) for name, w in cut.items())


def test_the_resume_file_is_as_new_as_the_best_weights(run, monkeypatch):
    """It is written with them, and not at validations without gain: it is three times as large."""
    saves, figures = [], iter([0.1, 0.2, 0.1, 0.3, *[0.0] * 99])        # validation's NDCG@10: start, 1, 2, 3
    real = stage.validate
    monkeypatch.setattr(stage, "validate", lambda *a: {**real(*a), "NDCG@10": next(figures)})
    monkeypatch.setattr(stage, "save_progress", lambda path, model, optimizer, state, settings:
                        saves.append((state["step"], state["best"])))
    call(stage, "--run", run, *QUICK, "--eval-every", 1, "--patience", 99)
    assert saves == [(1, 0.2), (3, 0.3)]


def test_two_processes_make_the_updates_of_one(run):
    flags = ("--run", run, *QUICK, "--precision", "float32", "--log-every", 1, "--batch-size", 17)
    call(stage, *flags, "--out", run / "one.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, *map(str, (ROOT / "rl.py", *flags, "--out", run / "two.pt"))]
    processes = []
    for rank in ("0", "1"):                                             # as torchrun starts them
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank,
                       "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                          env=environment))
    (spoken, _), (silent, errors) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "updates of" in spoken and not silent
    one, two = (log_of(run / f"{name}_log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)


def test_the_training_path_never_sees_validation_targets(run, monkeypatch):
    """Validation histories and targets may become anything: the updates stay the same."""
    drawn, real = [], stage.roll_out
    monkeypatch.setattr(stage, "roll_out", lambda model, catalogue, batch, *a: drawn.append(batch) or real(
        model, catalogue, batch, *a))
    call(stage, "--run", run, *QUICK)
    first = drawn.copy()
    lines = read_lines(run / "valid.jsonl")
    for line, row in zip(lines, read_lines(run / "train.jsonl")):       # its histories with other targets
        line["history"], line["target"] = row["history"], (row["target"] + 1) % 60
    write_lines(run / "valid.jsonl", lines)
    drawn.clear()
    (run / "test.jsonl").unlink()                                       # and the test split is not read
    call(stage, "--run", run, *QUICK)
    assert drawn == first and len(drawn) == 7


def test_targets_are_the_prompts_own(run):
    items = read_catalogue(run / "items.jsonl")
    _, tokenizer, checkpoint = load_model(run / "sft.pt", CPU, items)
    catalogue = stage.load_catalogue(items, tokenizer, checkpoint["sid"], CPU)
    data = {"items": items, "samples": [{"history": [1, 2], "target": 3}, {"history": [1, 2], "target": 9}]}
    prompts = stage.read_prompts(tokenizer, ["next"], data, catalogue.trie)     # one history, two targets
    trie = catalogue.trie
    targets = [items[trie.leaf_items[trie.leaf_start[p.target]]]["item_id"] for p in prompts]
    assert targets == [3, 9]
    assert catalogue.codes[prompts[1].target].tolist() == codes_of(items)[9].tolist()
    instructions = [pair.instruction for pair in train.make_pairs("next", data)]
    assert [p.ids for p in prompts] == train.prompt_ids(tokenizer, instructions)        # SFT's own, id for id


def test_bad_input_is_one_line(run, capsys):
    before = (run / "sft.pt").read_bytes()
    assert_stops(capsys, call, stage, "--run", run / "none", words=("items.jsonl",))
    assert_stops(capsys, call, stage, "--run", run, "--from", run / "none.pt", words=("none.pt",))
    write_lines(run / "train.jsonl", [{"user_id": "u", "history": [1], "target": 777}])
    assert_stops(capsys, call, stage, "--run", run, words=("train.jsonl", "line 1", "777"))
    assert_stops(capsys, call, stage, "--run", run, "--tasks", "search", words=("queries.jsonl",))
    assert (run / "sft.pt").read_bytes() == before and not (run / "rl.pt").exists()
    narrow(run)                                                         # prompts beyond the window
    assert_stops(capsys, call, stage, "--run", run, "--tasks", "title2sid", words=("12", "tokens"))


def test_a_gradient_that_is_no_number_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(stage, "policy_loss", lambda log_probs, *_: dict.fromkeys(
        ("loss", "kl", "clipped"), log_probs.mean((1, 2)) * math.nan))
    assert_stops(capsys, call, stage, "--run", run, *QUICK, "--log-every", 1, words=("step 1", "--lr"))


@pytest.mark.parametrize("flags", [
    ["--reward", "hits"], ["--reward", "semantic"], ["--reward", ""], ["--reward", "hit:x"], ["--tasks", ""],
    ["--tasks", "sid2title"], ["--tasks", "text2token"], ["--group-size", "1"], ["--temperature", "1"],
    ["--clip-eps", "0"], ["--clip-eps", "1"], ["--epochs", "0"], ["--updates-per-rollout", "0"],
    ["--patience", "0"], ["--lr", "nan"], ["--rollout", "greedy"], ["--kl-coef", "-1"],
    ["--seed", str(2 ** 32)], ["--weights", "policy"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_presets_set_what_the_flags_leave_open():
    open_flags = {k for k, v in vars(stage.parse_args([])).items() if v is None} - {"start", "out", "tasks"}
    assert all(open_flags <= set(preset) for preset in stage.PRESETS.values())
