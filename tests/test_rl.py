"""Stage 5: rewards and advantages by hand, the tree forward against repeated prompts, the objective against the
enumerated policy, a bandit, and whole runs."""
import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

import rl as stage
import train
from conftest import ROOT, assert_one_line_error, assert_stops, call, random_model, run_script
from evaluate import beam_search, build_trie
from init_embeddings import load_model
from test_evaluate import CPU, KINDS, K, children_of, random_catalogue, random_prompts
from tokenize_items import read_catalogue


def settings(**changes) -> Namespace:
    """What rollouts and updates need."""
    return Namespace(**{"rollout": "sample", "group_size": 6, "temperature": 1.0, "weights": "group",
                        "advantage": "std", "reward": {"hit": 1.0}, "kl_coef": 0.0, "clip_eps": 0.2,
                        "updates_per_rollout": 1, "micro_tokens": 4096, "precision": "float32", "clip": 1.0, **changes})


def make_shop(num_levels: int, count: int, seed: int = 1) -> stage.Shop:
    codes, sid_ids = random_catalogue(num_levels, count, seed=seed)
    trie = build_trie(codes, K, CPU)
    return stage.Shop(trie, sid_ids, [], codes[torch.from_numpy(trie.leaf_items)], None)    # one item per leaf


def draw_leaves(shop: stage.Shop, batch: int, group: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(len(shop.codes), generator=g)[:group] for _ in range(batch)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------
# Rewards, advantages, objective
# ---------------------------------------------------------------------------------------------------------

def test_rewards_by_hand():
    leaves, targets = torch.tensor([[4, 2, 9], [1, 2, 3]]), torch.tensor([2, 7])
    hits = stage.hit_reward(leaves, targets)
    assert hits.tolist() == [[0, 1, 0], [0, 0, 0]]
    # the policy ranks leaf 9 first, 4 second and 2 third: costs 1, 1/log2(3), 1/2, of which the hit pays nothing
    penalty = stage.rank_penalty(hits, torch.tensor([[-2.0, -3.0, -1.0], [-1.0, -2.0, -3.0]]))
    total = 1 + 1 / math.log2(3) + 0.5
    assert penalty[0].tolist() == pytest.approx([-1 / math.log2(3) / total, 0, -1 / total])
    assert not penalty[1].any()
    sixteen = stage.rank_penalty(torch.eye(16)[15:], -torch.arange(16.0)[None])         # MiniOneRec's own figures
    assert sixteen[0, :3].tolist() == pytest.approx([-0.1638, -0.1033, -0.0819], abs=1e-4) and sixteen[0, 15] == 0

    codes = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 1, 2]])
    assert stage.prefix_reward(codes, torch.tensor([[0, 1, 2, 3]]), torch.tensor([0])).tolist() == [
        pytest.approx([1, 2 / 3, 1 / 3, 0])]                            # what follows a difference does not count
    vectors = torch.tensor([[2.0, 0], [3.0, 4.0], [-1.0, 0], [0, 0]])
    assert stage.semantic_reward(vectors, torch.tensor([[0, 1, 2, 3]]), torch.tensor([0])).tolist() == [
        pytest.approx([1, 0.6, 0, 0])]
    shop = stage.Shop(None, None, [], codes, vectors)
    mixed = stage.group_rewards(shop, {"hit": 2.0, "prefix": 0.3, "semantic": 0.1}, torch.tensor([[0, 1]]),
                                torch.zeros(1, 2), torch.tensor([0]))
    assert mixed.tolist() == [pytest.approx([2 + 0.3 + 0.1, 0.2 + 0.06])]


def test_advantages_by_hand():
    rewards, even = torch.tensor([[1.0, 0, 0, 0], [0.3, 0.3, 0.3, 0.3]]), torch.full((2, 4), 0.25)
    found, deviation = stage.advantages(rewards, even, "std")
    s = math.sqrt(3) / 4
    assert deviation.tolist() == pytest.approx([s, 0], abs=1e-7)
    assert found[0].tolist() == pytest.approx([0.75 / (s + 1e-4)] + [-0.25 / (s + 1e-4)] * 3)
    assert found[1].abs().max() < 1e-2 and abs(float(found[0].sum())) < 1e-6
    mean_only, _ = stage.advantages(rewards, even, "mean-only")
    assert mean_only[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    weighted, deviation = stage.advantages(torch.tensor([[1.0, 0, 5.0]]), torch.tensor([[0.2, 0.8, 0]]), "mean-only")
    assert weighted[0].tolist() == pytest.approx([0.8, -0.2, 4.8]) and deviation.item() == pytest.approx(0.4)
    for kind in ("std", "mean-only"):                                   # a group of one, and of nothing but hits
        assert stage.advantages(torch.ones(1, 1), torch.ones(1, 1), kind)[0].item() == 0
        assert stage.advantages(torch.ones(1, 4), torch.full((1, 4), 0.25), kind)[0].isfinite().all()


def test_k3():
    x = torch.randn(50, generator=generator()).double().requires_grad_()
    ref = x.detach() + 0.3 * torch.randn(50, generator=generator(1)).double()
    assert not stage.k3(x, x).any() and (stage.k3(x, ref) > 0).all()
    torch.testing.assert_close(stage.k3(x, ref), (ref - x).exp() - 1 - (ref - x))
    stage.k3(x, ref).sum().backward()
    torch.testing.assert_close(x.grad, 1 - (ref - x.detach()).exp())
    # averaged over the policy, its value is KL(policy || reference), its gradient that of KL(reference || policy)
    logits = torch.randn(9, generator=generator(2)).double().requires_grad_()
    log_p, log_r = logits.log_softmax(0), torch.randn(9, generator=generator(3)).double().log_softmax(0)
    estimate = (log_p.detach().exp() * stage.k3(log_p, log_r)).sum()
    assert estimate.item() == pytest.approx((log_p.exp() * (log_p - log_r)).sum().item())
    found, = torch.autograd.grad(estimate, logits, retain_graph=True)
    wanted, = torch.autograd.grad((log_r.exp() * (log_r - log_p)).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_policy_loss_by_hand():
    old = torch.tensor([[[-1.0, -2.0], [-0.5, -1.5]]])
    moved = old + torch.tensor([[[0.5, 0.1], [0.5, -0.5]]])
    advantage, weights = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.25, 0.75]])
    ref = old - 0.2
    loss, kl, clipped = stage.policy_loss(moved, old, ref, advantage, weights, 0.2, 0.1)
    gains = [[2 * 1.2, 2 * math.exp(0.1)], [-math.exp(0.5), -0.8]]      # clipped, free, free, clipped
    k3 = [[math.exp(-0.7) - 1 + 0.7, math.exp(-0.3) - 1 + 0.3], [math.exp(-0.7) - 1 + 0.7, math.exp(0.3) - 1 - 0.3]]
    mean = [sum(w * (row[0] + row[1]) / 2 for w, row in zip((0.25, 0.75), rows)) for rows in (gains, k3)]
    assert loss.item() == pytest.approx(0.1 * mean[1] - mean[0]) and kl.item() == pytest.approx(mean[1])
    assert clipped.item() == pytest.approx(0.25 * 0.5 + 0.75 * 0.5)


# ---------------------------------------------------------------------------------------------------------
# The tree forward
# ---------------------------------------------------------------------------------------------------------

def repeated(model, shop: stage.Shop, prompts: list[list[int]], leaves: torch.Tensor) -> torch.Tensor:
    """The truth: each prompt written out G times, without padding, with all logits; (B, G, L)."""
    kids, out = children_of(shop.codes), []
    for prompt, row in zip(prompts, leaves.tolist()):
        for leaf in row:
            code = shop.codes[leaf].tolist()
            ids = prompt + [int(shop.sid_ids[level][c]) for level, c in enumerate(code)]
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1:]
            for level, c in enumerate(code):
                legal = kids[tuple(code[:level])]
                out.append(logits[level, shop.sid_ids[level][legal]].log_softmax(0)[legal.index(c)])
    return torch.stack(out).view(*leaves.shape, -1)


def gradients(model, total: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("num_levels, kind, tied", [(3, kind, tied) for kind in KINDS for tied in (True, False)]
                         + [(2, "qwen2", True), (4, "qwen2", True)])
def test_tree_forward_equals_repeated_prompts(num_levels, kind, tied):
    model, shop, prompts = random_model(kind, tied), make_shop(num_levels, 30), random_prompts()
    leaves = draw_leaves(shop, len(prompts), 5)
    ours, theirs = stage.tree_log_probs(model, *shop[:2], prompts, leaves), repeated(model, shop, prompts, leaves)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.dtype == torch.float32
    weights = torch.randn(ours.shape, generator=generator())
    mine, wanted = gradients(model, (ours * weights).sum()), gradients(model, (theirs * weights).sum())
    assert (mine - wanted).norm() < 1e-4 * wanted.norm() and (mine - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # and they are the search's own scores
    found, scores = beam_search(model, *shop[:2], prompts, 7)
    with torch.no_grad():
        torch.testing.assert_close(stage.tree_log_probs(model, *shop[:2], prompts, found).sum(-1), scores,
                                   atol=1e-5, rtol=1e-5)


def test_temperature_and_paths():
    model, shop, prompts = random_model(), make_shop(3, 30), random_prompts()
    found, scores, _ = beam_search(model, *shop[:2], prompts, 7, sample=generator(), temperature=1.7)
    torch.testing.assert_close(stage.tree_log_probs(model, *shop[:2], prompts, found, 1.7).sum(-1), scores,
                               atol=1e-5, rtol=1e-5)
    path = stage.trie_paths(shop.trie, torch.arange(len(shop.codes))[None])
    assert torch.stack([codes[nodes[0]] for codes, nodes in zip(shop.trie.codes, path)], 1).equal(shop.codes.int())


def test_reduced_precision_starts_at_ratio_one():
    model, shop = random_model(), make_shop(3, 30)
    batch = [stage.Example(prompt, 3) for prompt in random_prompts()]
    args = settings(precision="bfloat16", group_size=30, kl_coef=1.0)
    groups, _ = stage.roll_out(model, shop, batch, generator(), args)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sums = stage.update(model, model, torch.optim.SGD(model.parameters(), 0.0), shop, groups, len(batch), args)
    assert sums[0] == 0 and sums[1] == 0 and sums[2] > 0 and len(groups) == 4       # no KL, nothing clipped
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------

def enumerate_policy(model, shop: stage.Shop, prompt: list[int]) -> torch.Tensor:
    """Log-probability of every item, with gradients; (leaves,)."""
    return stage.tree_log_probs(model, *shop[:2], [prompt], torch.arange(len(shop.codes))[None]).sum(-1)[0]


def test_policy_gradient_is_that_of_the_enumerated_policy():
    model, shop, prompt, count = random_model(rows=110, seed=3), make_shop(3, 22), [5, 17], 1500
    log_p = enumerate_policy(model, shop, prompt)
    assert len(log_p) >= 20 and log_p.exp().max() > 5 / len(log_p)      # far from uniform
    values = torch.rand(len(log_p), generator=generator(5))
    exact = gradients(model, (log_p.exp() * values).sum())
    cosine = {}
    for kind in ("policy", "group"):
        leaves, scores, perturbed = beam_search(model, *shop[:2], [prompt] * count, 8, sample=generator(1))
        weights = stage.policy_weights(scores, perturbed) if kind == "policy" else torch.full_like(scores, 1 / 8)
        advantage, _ = stage.advantages(values[leaves], weights, "mean-only")
        log_probs = stage.tree_log_probs(model, *shop[:2], [prompt] * count, leaves)
        loss, _, _ = stage.policy_loss(log_probs, log_probs.detach(), log_probs.detach(), advantage, weights, 0.2, 0.0)
        cosine[kind] = float(torch.cosine_similarity(gradients(model, -loss.mean()), exact, dim=0))
    assert cosine["policy"] > 0.99 > cosine["group"], cosine            # 1/G presses on the tail as if it were likely


def test_policy_weights_estimate_means_over_the_policy():
    model, shop, prompt = random_model(rows=110, seed=3), make_shop(3, 22), [5, 17]
    with torch.no_grad():
        log_p = enumerate_policy(model, shop, prompt)
    _, scores, perturbed = beam_search(model, *shop[:2], [prompt] * 3000, 8, sample=generator(1))
    weights = stage.policy_weights(scores, perturbed)
    assert weights.sum(1).allclose(torch.ones(3000)) and not weights[:, -1].any() and (weights >= 0).all()
    entropy = -(log_p.exp() * log_p).sum().item()
    assert -(weights * scores).sum(1).mean().item() == pytest.approx(entropy, rel=0.03)
    beams = stage.policy_weights(torch.tensor([[0.5, 0.3, 0.1]]).log(), None)
    assert beams[0].tolist() == pytest.approx([5 / 9, 3 / 9, 1 / 9])


@pytest.mark.parametrize("seed, how", [
    *((seed, dict(weights="policy")) for seed in (0, 1, 2)), *((seed, {}) for seed in (0, 1, 2)),
    (0, dict(rollout="beam", updates_per_rollout=2, kl_coef=1e-3)),
    (0, dict(reward={"hit": 1.0, "rank": 1.0}, advantage="mean-only"))])
def test_a_bandit_is_solved(seed, how):
    """The best of 20 items is found within 40 updates: from the middle of the start's ranking, or from the fifth
    place by beams, which never try what is not among the first G."""
    model, shop, args = random_model(seed=seed), make_shop(3, 22, seed), settings(group_size=8, **how)
    prompt = random_prompts((6,), seed)[0]
    with torch.no_grad():
        place = 4 if args.rollout == "beam" else len(shop.codes) // 2
        best = int(enumerate_policy(model, shop, prompt).argsort(descending=True)[place])
    reference = random_model(seed=seed)
    optimizer, batch = torch.optim.Adam(model.parameters(), 5e-3), [stage.Example(prompt, best)] * 4
    for step in range(40):
        groups, _ = stage.roll_out(model, shop, batch, generator(step), args)
        stage.update(model, reference, optimizer, shop, groups, len(batch), args)
    with torch.no_grad():
        chance = enumerate_policy(model, shop, prompt).exp()
    assert chance.argmax() == best and chance[best] > 0.5, chance[best]


def test_groups_without_differences_are_dropped():
    model, shop, args = random_model(), make_shop(3, 30), settings(group_size=40, kl_coef=1.0)
    prompts = random_prompts((4, 6))
    batch = [stage.Example(prompts[0], 2), stage.Example(prompts[1], -1)]           # the second target is no leaf
    groups, sums = stage.roll_out(model, shop, batch, generator(), args)
    size = len(shop.codes)
    assert [g.prompt for g in groups] == prompts[:1] and sums[:4].tolist() == [2, 1, 1, 2 * size]
    assert sums[5].item() == pytest.approx(1 / size) and sums[6].item() == pytest.approx(1 / size)
    row = stage.gauges(torch.cat([sums, torch.tensor([0.5, 0.25, 3.0, 2.0, 0.5])]).double(), 40)
    assert row["zero_variance"] == row["hit@40"] == 0.5 and row["unique"] == size and row["grad_norm"] == 1.5
    assert row["prompts_per_second"] == 4 and row["rollouts_per_second"] == 160
    assert row["reward"] == pytest.approx(0.5 / size) and row["kl"] == 0.5 and row["clipped"] == 0.25
    assert row["reward_std"] == pytest.approx(math.sqrt(0.5 / size - 0.25 / size ** 2))
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 1.0)
    stage.update(model, random_model(seed=9), optimizer, shop, [], 2, args)          # nothing to learn: no step at all
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_micro_batches_and_processes_do_not_change_the_update():
    shop, found = make_shop(3, 30), []
    batch = [stage.Example(prompt, 3) for prompt in random_prompts((1, 5, 23, 9, 12))]
    args = settings(rollout="beam", group_size=20, kl_coef=0.1)
    for micro, share in ((4096, 1), (60, 1), (4096, 2)):
        args.micro_tokens, grads = micro, 0
        for rank in range(share):
            model = random_model()
            groups, _ = stage.roll_out(model, shop, batch[rank::share], None, args)
            stage.update(model, random_model(seed=1), torch.optim.SGD(model.parameters(), 0.0), shop, groups,
                         len(batch), Namespace(**{**vars(args), "clip": math.inf}))
            grads = grads + torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append(grads)
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-5 * found[0].norm()


def test_batches_cover_an_epoch_and_shuffle_anew():
    epochs = [[r for step in range(first, first + 3) for r in stage.batch_rows(11, 3, step, 5)] for first in (0, 3)]
    assert all(len(set(rows)) == 9 for rows in epochs) and epochs[0] != epochs[1]
    assert stage.batch_rows(11, 3, 4, 5) == stage.batch_rows(11, 3, 4, 5) != stage.batch_rows(11, 3, 4, 6)
    assert sorted(stage.batch_rows(2, 64, 7, 0)) == [0, 1]


# ---------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def signals():
    """Runs catch SIGINT and SIGTERM; give them back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


QUICK = ("--epochs", 1, "--batch-size", 16, "--warmup", 1, "--eval-every", 3, "--log-every", 2, "--lr", 1e-3,
         "--group-size", 8)


def weights_of(path) -> dict:
    return torch.load(path, weights_only=True)["weights"]


def test_a_run(run, capsys):
    call(stage, "--run", run, *QUICK, "--reward", "hit:1,rank,prefix:0.1,semantic:0.1", "--tasks", "next,title2sid")
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "rl_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "NDCG@10" in r] == [0, 3, 6, 9, 11] and rows[0]["step"] == 0
    assert [r["step"] for r in rows if "reward" in r] == [2, 4, 6, 8, 10, 11]
    gauges = {"reward", "reward_std", "hit@8", "zero_variance", "unique", "entropy", "kl", "clipped", "grad_norm",
              "prompts_per_second", "rollouts_per_second", "lr"}
    assert all(gauges <= r.keys() for r in rows if "reward" in r)
    assert all({"HR@1", "HR@5", "HR@10", "HR@50"} <= r.keys() for r in rows if "NDCG@10" in r)
    best = max((r for r in rows if "NDCG@10" in r), key=lambda r: r["NDCG@10"])
    checkpoint = torch.load(run / "rl.pt", weights_only=True)
    assert checkpoint["stage"] == "rl" and checkpoint["metrics"]["NDCG@10"] == best["NDCG@10"]
    assert checkpoint["step"] == best["step"] and not (run / "rl_resume.pt").exists()
    assert "valid | sft.pt" in out and "valid | rl.pt" in out and ">><" in out
    _, _, loaded = load_model(run / "rl.pt", CPU, read_catalogue(run / "items.jsonl"))
    assert loaded["args"]["reward"] == {"hit": 1.0, "rank": 1.0, "prefix": 0.1, "semantic": 0.1}


def test_validation_asks_as_sft_did_whatever_the_prompts(run, capsys):
    checkpoint = torch.load(run / "sft.pt", weights_only=True)
    torch.save({**checkpoint, "args": {**checkpoint["args"], "tasks": "next_brief,title2sid"}}, run / "sft.pt")
    starts = []
    for tasks in ((), ("--tasks", "title2sid")):
        call(stage, "--run", run, *QUICK, *tasks)
        starts.append(json.loads((run / "rl_log.jsonl").read_text().splitlines()[0]))
        trained = torch.load(run / "rl.pt", weights_only=True)["args"]
        assert trained["tasks"] == ("title2sid" if tasks else "next_brief")
        assert train.recommends_by(trained) == "next_brief"             # and so does evaluate.py
    assert starts[0] == starts[1]


def test_the_first_update_is_the_first_that_adamw_makes(run, monkeypatch):
    learned, real = 0, stage.update          # batches before this one with a group whose rewards differ

    def watch(model, reference, optimizer, shop, groups, *rest):
        nonlocal learned
        assert {int(state["step"]) for state in optimizer.state.values()} == ({learned} if learned else set())
        learned += bool(groups)
        return real(model, reference, optimizer, shop, groups, *rest)
    monkeypatch.setattr(stage, "update", watch)
    call(stage, "--run", run, *QUICK)
    assert learned > 1


def test_what_does_not_help_leaves_the_sft_weights(run, capsys, monkeypatch):
    figures = iter([0.5, 0.4, 0.5, 0.3])
    monkeypatch.setattr(stage, "validate", lambda *_: {
        f"{m}@{k}": next(figures) if (m, k) == ("NDCG", 10) else 0.1 for m in ("HR", "NDCG") for k in stage.CUTOFFS})
    call(stage, "--run", run, *QUICK, "--patience", 3, "--eval-every", 1)
    before, after = weights_of(run / "sft.pt"), weights_of(run / "rl.pt")
    assert before.keys() == after.keys() and all(torch.equal(w, after[name]) for name, w in before.items())
    assert "these are the weights of sft.pt" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "rl_log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3                                        # patience


@pytest.mark.parametrize("rollout", ("sample", "beam"))
def test_resumed_equals_uninterrupted_bit_for_bit(run, monkeypatch, capsys, rollout):
    flags = ("--run", run, *QUICK, "--rollout", rollout, "--patience", 99)
    kept = []
    real = stage.validate                                               # every step better: rl.pt is the last step
    monkeypatch.setattr(stage, "validate", lambda *a: {**real(*a), "NDCG@10": kept.append(1) or float(len(kept))})
    call(stage, *flags, "--out", run / "whole.pt")
    asked = []
    monkeypatch.setattr(stage, "on_interrupt", lambda: lambda device: asked.append(1) or len(asked) == 4)
    with pytest.raises(SystemExit) as stopped:
        call(stage, *flags, "--out", run / "cut.pt")
    assert stopped.value.code == 130 and (run / "cut_resume.pt").exists() and len(asked) == 4
    assert_stops(capsys, call, stage, *flags, "--out", run / "cut.pt", "--resume", "--kl-coef", 0, words=("kl-coef 0.001, not 0",))
    assert_stops(capsys, call, stage, *flags, "--out", run / "cut.pt", "--resume", "--from", run / "whole.pt",
                 words=("reference", "--resume"))                       # the KL would be to other weights
    call(stage, *flags, "--out", run / "cut.pt", "--resume")
    whole, cut = weights_of(run / "whole.pt"), weights_of(run / "cut.pt")
    assert all(torch.equal(w, cut[name]) for name, w in whole.items()) and not (run / "cut_resume.pt").exists()
    logs = [[{k: v for k, v in json.loads(line).items() if "second" not in k and k != "NDCG@10"} for line in
             (run / f"{name}_log.jsonl").read_text().splitlines()] for name in ("whole", "cut")]
    assert logs[0] == logs[1]                                           # the figures too, whatever the window
    assert not all(torch.equal(w, weights_of(run / "sft.pt")[name]) for name, w in cut.items())


def test_two_processes_make_the_updates_of_one(run):
    flags = ("--run", run, *QUICK, "--rollout", "beam", "--precision", "float32", "--log-every", 1)
    call(stage, *flags, "--out", run / "one.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--", ROOT / "rl.py", *flags]
    done = subprocess.run([*map(str, command), "--out", str(run / "two.pt")], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = ([{k: v for k, v in json.loads(line).items() if "second" not in k} for line in
                 (run / f"{name}_log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two) == 8 and done.stdout.count("the start") == 1            # only one of them speaks
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)


def test_the_training_path_never_sees_validation_targets(run, monkeypatch):
    """Validation histories and targets may become anything: the updates stay the same."""
    drawn, real = [], stage.roll_out
    monkeypatch.setattr(stage, "roll_out", lambda model, shop, batch, *a: drawn.append(batch) or real(
        model, shop, batch, *a))
    call(stage, "--run", run, *QUICK, "--eval-users", 10)
    first = drawn.copy()
    lines = [json.loads(line) for line in (run / "valid.jsonl").read_text().splitlines()]
    train_rows = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    for line, row in zip(lines, train_rows):                            # the same histories with other targets
        line["history"], line["target"] = row["history"], (row["target"] + 1) % 60
    (run / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn.clear()
    call(stage, "--run", run, *QUICK, "--eval-users", 10)
    assert drawn == first
    (run / "test.jsonl").unlink()                                       # and the test split is not read at all
    call(stage, "--run", run, *QUICK, "--eval-users", 10)


def test_targets_are_the_prompts_own(run):
    items = read_catalogue(run / "items.jsonl")
    _, tokenizer, checkpoint = load_model(run / "sft.pt", CPU, items)
    shop = stage.make_shop(items, tokenizer, checkpoint["sid"], run / "codebook.pt", CPU)
    samples = [{"history": [1, 2], "target": 3}, {"history": [1, 2], "target": 9}]      # one history, two targets
    examples = stage.read_prompts(tokenizer, ["next"], {"items": items, "samples": samples}, shop.trie)
    assert [items[shop.trie.leaf_items[shop.trie.leaf_start[e.target]]]["item_id"] for e in examples] == [3, 9]
    prompts = [p for p, _ in train.task_pairs("next", {"items": items, "samples": samples})]
    assert [e.prompt for e in examples] == train.prompt_ids(tokenizer, prompts)         # SFT's own, id for id
    centroids = torch.load(run / "codebook.pt", weights_only=True)["centroids"]
    codes = [int(token[3:-1]) for token in items[9]["sid"]]
    expected = sum(centroids[level, code] for level, code in enumerate(codes))
    torch.testing.assert_close(shop.vectors[examples[1].target], expected)


def test_bad_input_is_one_line(run, capsys):
    before = (run / "sft.pt").read_bytes()
    assert_stops(capsys, call, stage, "--run", run, "--from", run / "none.pt", words=("none.pt",))
    (run / "codebook.pt").unlink()
    assert_stops(capsys, call, stage, "--run", run, "--reward", "semantic", words=("codebook.pt",))
    torch.save({"centroids": torch.zeros(2, 8, 4)}, run / "codebook.pt")
    assert_stops(capsys, call, stage, "--run", run, "--reward", "semantic", words=("codebook.pt", "levels"))
    (run / "train.jsonl").write_text('{"user_id": "u", "history": [1], "target": 777}\n')
    assert_stops(capsys, call, stage, "--run", run, words=("train.jsonl, line 1", "777"))
    assert (run / "sft.pt").read_bytes() == before and not (run / "rl.pt").exists()


def test_a_gradient_that_is_no_number_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(stage, "policy_loss", lambda log_probs, *_: [log_probs.mean((1, 2)) * math.nan] * 3)
    assert_stops(capsys, call, stage, "--run", run, *QUICK, words=("step 1", "--lr"))


def test_as_a_user_sees_it(tmp_path):
    assert_one_line_error(run_script("rl.py", "--run", tmp_path / "none"), "items.jsonl", "cannot be read")


@pytest.mark.parametrize("flags", [
    ["--reward", "hits"], ["--reward", ""], ["--reward", "hit:x"], ["--tasks", "sid2title"], ["--tasks", "text2token"],
    ["--tasks", ""], ["--group-size", "1"], ["--temperature", "0"], ["--clip-eps", "0"], ["--clip-eps", "1"],
    ["--epochs", "0"], ["--updates-per-rollout", "0"], ["--patience", "0"], ["--rollout", "greedy"],
    ["--temperature", "nan"], ["--kl-coef", "-1"], ["--lr", "nan"], ["--clip", "-1"], ["--seed", str(2 ** 32)],
    ["--rollout", "sample", "--weights", "policy", "--group-size", "2"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_presets_set_what_the_flags_leave_open():
    open_flags = {k for k, v in vars(stage.parse_args([])).items() if v is None} - {"start", "out", "tasks"}
    assert all(open_flags == set(preset) for preset in stage.PRESETS.values())
