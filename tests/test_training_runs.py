"""Runs of train.py: frozen means frozen, LoRA, a death at any step, two processes against one, accumulation."""
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
import train as stage
from conftest import ROOT, assert_stops, call, random_model, write_lines
from init_embeddings import load_model, save_model, sid_digest, sid_token_ids
from tokenize_items import read_catalogue, read_samples
from tqdm import tqdm

CPU = torch.device("cpu")
SPEEDS = {"tokens_per_second", "supervised_per_second"}


def checkpoint(path) -> dict:
    return torch.load(path, weights_only=True)


def log_of(path) -> list[dict]:
    """The rows of a run's log, but for what depends on the machine's mood."""
    rows = [json.loads(line) for line in path.with_name(path.stem + "_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype == torch.float32 and torch.equal(one.view(torch.int32), two.view(torch.int32))


def rebuild(run, kind: str, tied: bool, spare: int = 0) -> torch.Tensor:
    """Give the run an init.pt of another architecture with the same tokenizer; its SID rows' ids, sorted."""
    _, tokenizer, old = load_model(run / "init.pt", CPU)
    model = random_model(kind, tied, len(tokenizer) + spare)
    sid = {**old["sid"], "digest": sid_digest(read_catalogue(run / "items.jsonl"))}
    save_model(run / "init.pt", model, tokenizer, sid, stage="init", args=old["args"], step=0, metrics={})
    return sid_token_ids(tokenizer, old["sid"]["num_levels"], old["sid"]["codebook_size"]).flatten().sort().values


# ---- processes of their own, forked from one that has imported torch already ----

def child(args: list[str], environment: dict[str, str], death: tuple | None) -> None:
    """train.main() with these flags; `death` (signal, function, n) sends the signal at the function's n-th call."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                    # the usual one, a semaphore, would outlive a killed process
    sys.argv, calls = ["train.py", *args], itertools.count(1)
    if death:
        number, name, count = death
        function = getattr(stage, name)

        def dying(*given, **named):
            if next(calls) == count:
                os.kill(os.getpid(), number)
            return function(*given, **named)
        setattr(stage, name, dying)
    stage.main()


@pytest.fixture(scope="module")
def forked():
    """`forked(flags, ...)` starts a process that trains; one import of torch serves all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_training_runs", "transformers.models.qwen2.modeling_qwen2", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        patch.setenv("OMP_NUM_THREADS", "1")

        def start(*args, death: tuple | None = None, **environment):
            process = context.Process(target=child, args=(list(map(str, args)), environment, death))
            process.start()
            return process
        yield start


def exit_code(process) -> int:
    process.join(300)
    return process.exitcode


def two_processes(forked, *args, death: tuple | None = None) -> list[int]:
    """Run train.py in two processes that talk by gloo; `death` is for the second alone. Their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [forked(*args, "--device", "cpu", death=death if rank else None, RANK=str(rank), LOCAL_RANK=str(rank),
                        WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    return [exit_code(process) for process in processes]


# ---------------------------------------------------------------------------------------------------------
# The alignment stage
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tied, spare", [("qwen2", True, 0), ("llama", False, 0), ("qwen2", True, 70),
                                               ("llama", False, 70)])
def test_align_moves_sid_rows_and_nothing_else(kind, tied, spare, run):
    sid_rows = rebuild(run, kind, tied, spare)
    call(stage, "--run", run, "--stage", "align", "--epochs", 1)        # else as shipped
    before, after = checkpoint(run / "init.pt")["weights"], checkpoint(run / "align.pt")
    settings = after["args"]
    assert (settings["lr"], settings["batch_size"], settings["weight_decay"]) == (1e-3, 16, 0)
    assert after["stage"] == "align" and after["step"] >= 20
    matrices = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert after["weights"].keys() == before.keys() > matrices
    text = torch.ones(len(before["model.embed_tokens.weight"]), dtype=torch.bool)
    text[sid_rows] = False
    assert text.sum() == len(text) - 24 and (spare == 0 or text[-spare:].all())
    for name, old in before.items():
        new = after["weights"][name]
        if name in matrices:
            assert same_bits(new[text], old[text]), name
            assert (new[~text] != old[~text]).any(1).all(), name
        else:
            assert same_bits(new, old), name


def test_sft_goes_on_from_align_with_all_weights(run):
    call(stage, "--run", run, "--stage", "align", "--epochs", 1, "--batch-size", 64)
    call(stage, "--run", run, "--from", run / "align.pt", "--tasks", "next", "--epochs", 1, "--batch-size", 64)
    before, after = (checkpoint(run / f"{name}.pt")["weights"] for name in ("align", "sft"))
    assert all(not torch.equal(after[name], old) for name, old in before.items())
    rows = log_of(run / "align.pt")
    assert "valid_loss" in rows[-1] and log_of(run / "sft.pt")[0]["cosine"] == pytest.approx(
        stage.geometry(before["model.embed_tokens.weight"][rebuild(run, "qwen2", True)], [set()] * 24)["cosine"])


# ---------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------

def adapted_model(kind: str = "qwen2", dropout: float = 0.0):
    """A model with adapters of rank 3 whose B are not zero, and the same model with the adapters merged."""
    args = stage.parse_args(["--lora", "3", "--lora-alpha", "6", "--lora-dropout", str(dropout)])
    model, merged = random_model(kind, False), random_model(kind, False)
    stage.train_sid_rows(model, torch.arange(90, 96))
    stage.add_lora(model, args)
    for module in model.modules():
        if isinstance(module, stage.LoRA):
            assert not module.b.any()                                   # no change at the start
            torch.nn.init.normal_(module.b, std=0.1)
    weights = stage.merge_lora(model, {n: w.detach().clone() for n, w in model.state_dict().items()})
    assert weights.keys() == merged.state_dict().keys()
    merged.load_state_dict(weights)
    return model.eval(), merged


def test_adapters_merge_and_their_gradients_are_those_of_the_merged_weight():
    """With W' = W + s B A and G = dL/dW': dL/dB = s G A^T and dL/dA = s B^T G."""
    ids = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    for kind in ("qwen2", "llama"):
        model, merged = adapted_model(kind, dropout=0.5)                # which says nothing outside training
        with torch.no_grad():
            plain, logits = random_model(kind, False)(ids).logits, model(ids).logits
        assert torch.allclose(logits, merged(ids).logits, atol=1e-4) and not torch.allclose(logits, plain, atol=0.1)
        assert not torch.allclose(model.train()(ids).logits, logits, atol=1e-2)

        model, merged = adapted_model(kind)
        for m in (model.train(), merged):
            stage.response_loss(m, ids, labels).mean().backward()
        whole, count = dict(merged.named_parameters()), 0
        for name, module in model.named_modules():
            if isinstance(module, stage.LoRA):
                g, count = whole[f"{name}.weight"].grad, count + 1
                assert module.scale == 2 and module.a.shape[0] == module.b.shape[1] == 3
                assert torch.allclose(module.b.grad, 2 * g @ module.a.T, atol=1e-5), name
                assert torch.allclose(module.a.grad, 2 * module.b.T @ g, atol=1e-5), name
        assert count == 14                                              # 7 projections, 2 layers
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if n.endswith((".a", ".b"))} | {
            "model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_lora_run_leaves_a_plain_checkpoint(tied, run, capsys):
    sid_rows = rebuild(run, "qwen2" if tied else "llama", tied)
    call(stage, "--run", run, "--tasks", "next,sid2title", "--epochs", 1, "--lora", 2, "--lr", 1e-3, "--batch-size", 16,
         "--weight-decay", 0.1, "--precision", "float32")
    before, after = checkpoint(run / "init.pt")["weights"], checkpoint(run / "sft.pt")
    assert after["weights"].keys() == before.keys()
    for name, old in before.items():
        new = after["weights"][name]
        if name.split(".")[-2] in stage.LORA_TARGETS and name.endswith("weight"):
            assert torch.linalg.matrix_rank(new - old, rtol=1e-3) == 2, name
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            text = torch.ones(len(old), dtype=torch.bool)
            text[sid_rows] = False
            assert same_bits(new[text], old[text]) and (new[~text] != old[~text]).any(1).all(), name
        else:
            assert same_bits(new, old), name

    items = read_catalogue(run / "items.jsonl")                         # the merged model has the loss that was logged
    model, tokenizer, _ = load_model(run / "sft.pt", CPU, items)
    samples = read_samples(run / "valid.jsonl", {item["item_id"] for item in items})
    pairs = stage.task_pairs("next", {"items": items, "samples": samples})
    args = stage.parse_args(["--micro-tokens", "4096", "--precision", "float32"])
    args.rank, args.world = 0, 1
    loss = stage.validation_loss(stage.ResponseLoss(model), stage.encode_examples(tokenizer, "next", pairs, 9), args)
    assert loss == pytest.approx(after["metrics"]["valid_loss"], abs=1e-5)


def test_lora_needs_projections_by_name(run, capsys):
    rebuild(run, "gpt2", True)
    assert_stops(capsys, call, stage, "--run", run, "--lora", 2, words=("--lora", "q_proj"))


# ---------------------------------------------------------------------------------------------------------
# Death and resurrection
# ---------------------------------------------------------------------------------------------------------

SHORT = ("--batch-size", 16, "--warmup", 3, "--log-every", 3, "--save-every", 2, "--dropout", 0.1,
         "--micro-tokens", 600)
SETUPS = {          # 120 samples: 8 updates an epoch; 24 tokens; 60 items in six tasks
    "sft": ("--tasks", "next", "--epochs", 2, "--evals-per-epoch", 2, *SHORT),
    "lora": ("--tasks", "next", "--epochs", 2, "--lora", 2, *SHORT),
    "align": ("--stage", "align", "--tasks", "title2sid,name_item", "--epochs", 2, *SHORT),
}
RANDOM = random.Random(1)
DEATHS = [("sft", "train_step", step) for step in sorted(RANDOM.sample(range(2, 17), 3))] + [
    ("sft", "save_progress", RANDOM.choice((2, 4, 6))),                   # between the weights and the resume file
    ("lora", "train_step", RANDOM.randrange(4, 17)), ("align", "train_step", RANDOM.randrange(4, 15))]


@pytest.fixture(scope="module")
def uninterrupted(finished_run, tmp_path_factory) -> dict:
    """Weights and log of each setup's run from beginning to end."""
    folder, out = tmp_path_factory.mktemp("whole"), {}
    for name, flags in SETUPS.items():
        call(stage, "--run", finished_run, *flags, "--out", folder / f"{name}.pt")
        out[name] = checkpoint(folder / f"{name}.pt"), log_of(folder / f"{name}.pt")
        assert sorted(p.name for p in folder.glob(f"{name}*")) == [f"{name}.pt", f"{name}_log.jsonl"]
    return out


def assert_equals(path, expected: tuple[dict, list]) -> None:
    """The run that wrote `path` ended as the uninterrupted one did, bit for bit."""
    found, whole = checkpoint(path), expected[0]
    assert log_of(path) == expected[1]
    assert found["weights"].keys() == whole["weights"].keys()
    assert all(same_bits(found["weights"][name], weight) for name, weight in whole["weights"].items())
    assert (found["step"], found["metrics"]) == (whole["step"], whole["metrics"])
    assert not path.with_name(path.stem + "_resume.pt").exists()


@pytest.mark.parametrize("name, function, count", DEATHS)
def test_killed_and_resumed_equals_uninterrupted(name, function, count, forked, uninterrupted, finished_run, tmp_path):
    flags = ("--run", finished_run, *SETUPS[name], "--out", tmp_path / "out.pt")
    assert exit_code(forked(*flags, death=(signal.SIGKILL, function, count))) == -signal.SIGKILL
    resume = tmp_path / "out_resume.pt"
    if function == "train_step":
        assert checkpoint(resume)["progress"]["step"] in (count - 1, count - 2) if count > 2 else not resume.exists()
    call(stage, *flags, "--resume")
    assert_equals(tmp_path / "out.pt", uninterrupted[name])


def test_interrupted_saves_and_leaves(forked, uninterrupted, run, tmp_path, capsys):
    flags = ("--run", run, *SETUPS["sft"], "--out", tmp_path / "out.pt")
    for number, step in ((signal.SIGINT, 5), (signal.SIGTERM, 2)):      # the second resumes after 5: at 7
        again = ("--resume",) if step == 2 else ()
        assert exit_code(forked(*flags, *again, death=(number, "train_step", step))) == 130
    saved = checkpoint(tmp_path / "out_resume.pt")
    assert saved["progress"]["step"] == 7                               # a multiple of neither 2 nor 4
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for changed, word in ((("--lr", 0.5), "lr 0.0015, not 0.5"), (("--tasks", "next,title2sid"), "tasks next, not"),
                          (("--precision", "float32"), "precision"), (("--seed", 3), "seed")):
        assert_stops(capsys, call, stage, *flags, *changed, "--resume", words=("out_resume.pt", word, "--resume"))
    (tmp_path / "run").rename(tmp_path / "same")
    for kind, swap, word in (("llama", False, "another backbone"), ("qwen2", True, "data")):
        shutil.copytree(tmp_path / "same", run)                         # made anew since then
        if swap:
            items = read_catalogue(run / "items.jsonl")
            items[0]["sid"], items[1]["sid"] = items[1]["sid"], items[0]["sid"]
            write_lines(run / "items.jsonl", items)
        rebuild(run, kind, True)
        assert_stops(capsys, call, stage, *flags, "--resume", words=("out_resume.pt", word, "--resume"))
        shutil.rmtree(run)
    (tmp_path / "same").rename(run)
    train = (run / "train.jsonl").read_text()
    (run / "train.jsonl").write_text("".join(train.splitlines(True)[:-1]))      # fewer samples than before
    assert_stops(capsys, call, stage, *flags, "--resume", words=("out_resume.pt", "data", "--resume"))
    (run / "train.jsonl").write_text(train)
    assert {path: path.read_bytes() for path in before} == before
    call(stage, *flags, "--resume")
    assert "going on after update 7" in capsys.readouterr().out
    assert_equals(tmp_path / "out.pt", uninterrupted["sft"])
    call(stage, *flags, "--resume")                                     # nothing left to go on with
    assert "starting from the beginning" in capsys.readouterr().out
    assert_equals(tmp_path / "out.pt", uninterrupted["sft"])


def test_resumed_where_there_are_fewer_gpus(monkeypatch):
    states, given = {**stage.random_states(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 3}, []
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    stage.set_random_states(states)
    assert len(given[0]) == 1


# ---------------------------------------------------------------------------------------------------------
# Two processes, accumulation
# ---------------------------------------------------------------------------------------------------------

# 120 samples and 24 tokens in batches of 13: the last one has a single example, fewer than there are processes.
SHARED = ("--dropout", 0, "--tasks", "next,text2token:0.3", "--epochs", 1, "--batch-size", 13, "--warmup", 2, "--log-every", 1,
          "--evals-per-epoch", 2, "--precision", "float32")


def assert_close(path, other) -> None:
    """Two runs went the same way, to 1e-5."""
    rows, others = log_of(path), log_of(other)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, expected in zip(rows, others):
        assert row == pytest.approx(expected, abs=1e-5, rel=1e-5)
    one, two = checkpoint(path), checkpoint(other)
    assert one["weights"].keys() == two["weights"].keys() and one["step"] == two["step"]
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, two["weights"][name], atol=1e-5), name


def test_torchrun_equals_one_process(finished_run, tmp_path):
    flags = ("--run", finished_run, *SHARED)
    call(stage, *flags, "--out", tmp_path / "one.pt")
    assert len(log_of(tmp_path / "one.pt")) == 1 + 12
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
         ROOT / "train.py", *map(str, flags), "--device", "cpu", "--out", tmp_path / "two.pt", "--micro-tokens", "200"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 and "cpu x 2" in done.stdout            # only rank 0 speaks
    assert_close(tmp_path / "two.pt", tmp_path / "one.pt")


def test_two_processes_equal_one(forked, run, tmp_path):
    """Shards, interrupted in one of the two and resumed; replicas that train SID rows and adapters."""
    full = ("--run", run, *SHARED)
    adapters = (*full, "--lora", 2, "--lora-dropout", 0)
    for name, flags in (("full", full), ("adapters", adapters)):
        call(stage, *flags, "--out", tmp_path / f"{name}.pt")
        flags = (*flags, "--micro-tokens", 200, "--out", tmp_path / "two.pt")
        if name == "full":
            assert two_processes(forked, *flags, "--fsdp", death=(signal.SIGINT, "train_step", 5)) == [130, 130]
            assert checkpoint(tmp_path / "two_resume.pt")["progress"]["step"] == 5
            assert two_processes(forked, *flags, "--fsdp", "--resume") == [0, 0]
        else:
            assert two_processes(forked, *flags) == [0, 0]
        assert_close(tmp_path / "two.pt", tmp_path / f"{name}.pt")


def test_one_by_32_equals_four_by_8(run, tmp_path, monkeypatch):
    flags = ("--run", run, *SHARED, "--batch-size", 32, "--micro-tokens", 10 ** 6)
    pieces, cut = [], stage.length_batches
    monkeypatch.setattr(stage, "length_batches", lambda *given: pieces.append(len(cut(*given))) or cut(*given))
    call(stage, *flags, "--out", tmp_path / "one.pt")
    assert set(pieces) == {1}
    pieces.clear()
    monkeypatch.setattr(stage, "length_batches", lambda rows, _: pieces.append(
        -(-len(rows) // 8)) or [list(range(a, min(a + 8, len(rows)))) for a in range(0, len(rows), 8)])
    call(stage, *flags, "--out", tmp_path / "four.pt")
    assert 4 in pieces and max(pieces) <= 5                             # validation: 40 in five
    assert_close(tmp_path / "four.pt", tmp_path / "one.pt")


def test_keep_leaves_the_weights_of_every_validation(run):
    call(stage, "--run", run, "--epochs", 2, "--warmup", 2, "--keep", "--evals-per-epoch", 2, "--out", run / "k.pt")
    losses = {row["step"]: row["valid_loss"] for row in log_of(run / "k.pt") if "valid_loss" in row}
    kept = {checkpoint(path)["step"]: checkpoint(path) for path in sorted(run.glob("k_?????.pt"))}
    assert len(losses) >= 4 and {step: c["metrics"]["valid_loss"] for step, c in kept.items()} == losses
    best = checkpoint(run / "k.pt")
    assert best["metrics"]["valid_loss"] == min(losses.values())
    assert all(torch.equal(kept[best["step"]]["weights"][name], w) for name, w in best["weights"].items())
