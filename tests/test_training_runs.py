"""Runs of train.py: frozen means frozen, LoRA, kill and resume, several processes against one."""
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from tqdm import tqdm

import init_embeddings
import rl
import tokenize_items
import train as stage
from conftest import ROOT, assert_one_line_error, assert_stops, call, random_model
from init_embeddings import (LoRA, add_lora, build_trie, load_model, merged_weights, save_model, sid_digest,
                             sid_token_ids)
from test_train import loss_of, sids_of
from tokenize_items import read_catalogue, read_samples

CPU = torch.device("cpu")


def checkpoint(path) -> dict:
    return torch.load(path, weights_only=True)


def log_of(path) -> list[dict]:
    """The rows of a run's log, without the speed."""
    rows = [json.loads(line) for line in path.with_name(f"{path.stem}_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    assert one.dtype == two.dtype == torch.float32
    return torch.equal(one.view(torch.int32), two.view(torch.int32))


def rebuild(run, kind: str, tied: bool, spare: int = 0) -> torch.Tensor:
    """Give the run an init.pt of another architecture with the same tokenizer; -> which rows are of text."""
    _, tokenizer, old = load_model(run / "init.pt", CPU)
    model = random_model(kind, tied, len(tokenizer) + spare)
    sid = {**old["sid"], "digest": sid_digest(read_catalogue(run / "items.jsonl"))}
    save_model(run / "init.pt", model, tokenizer, sid, stage="init", args=old["args"], step=0, metrics={})
    text = torch.ones(len(tokenizer) + spare, dtype=torch.bool)
    text[sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"])] = False
    assert text.sum() == len(text) - 24
    return text


# ---- Processes, forked from one that has imported torch already ----------------------------------

def child(args: list[str], environment: dict[str, str], death: tuple | None) -> None:
    """train.main(); `death` (signal, function, n) sends the signal at the function's n-th call."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                    # the usual lock outlives a killed process
    if "RANK" in environment:
        init_embeddings.LORA_DROPOUT = 0.0              # what is dropped differs between processes
    sys.argv, calls = ["train.py", *args], itertools.count(1)
    if death:
        number, name, count = death
        function = getattr(stage, name)

        def dying(*given):
            if next(calls) == count:
                os.kill(os.getpid(), number)
            return function(*given)
        setattr(stage, name, dying)
    stage.main()


@pytest.fixture(scope="module")
def forked():
    """`forked(flags, ...)` starts a process that trains; one import of torch serves all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_training_runs", "transformers.models.qwen2.modeling_qwen2", "torch._dynamo"])
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
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}
        processes.append(forked(*args, "--device", "cpu", death=death if rank else None, **place))
    return [exit_code(process) for process in processes]


# ---- The alignment stage -------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tied, spare", [
    ("qwen2", True, 0), ("qwen2", True, 70), ("llama", False, 0), ("llama", False, 70)])
def test_align_moves_sid_rows_and_nothing_else(kind, tied, spare, run):
    text = rebuild(run, kind, tied, spare)
    call(stage, "--run", run, "--stage", "align", "--epochs", 1)        # else as shipped
    before, after = checkpoint(run / "init.pt")["weights"], checkpoint(run / "align.pt")
    args = after["args"]
    assert (args["lr"], args["batch_size"], args["weight_decay"]) == (1e-3, 16, 0)
    assert after["stage"] == "align" and after["step"] >= 20 and "valid_loss" in log_of(run / "align.pt")[-1]
    matrices = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert after["weights"].keys() == before.keys() > matrices
    for name, old in before.items():
        new = after["weights"][name]
        if name in matrices:
            assert same_bits(new[text], old[text]), name
            assert (new[~text] != old[~text]).any(1).all(), name
        else:
            assert same_bits(new, old), name


def test_sft_goes_on_from_align_with_all_weights(run):
    call(stage, "--run", run, "--stage", "align", "--epochs", 1, "--batch-size", 64)
    call(stage, "--run", run, "--from", run / "align.pt", "--tasks", "next", "--epochs", 1)
    before, after = (checkpoint(run / f"{name}.pt")["weights"] for name in ("align", "sft"))
    assert all(not torch.equal(after[name], old) for name, old in before.items())


# ---- LoRA ----------------------------------------------------------------------------------------

ADAPTED = {"qwen2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
           "phi3": "qkv_proj o_proj gate_up_proj down_proj"}            # Phi-3's projections are fused


def adapted_model(kind: str, tied: bool):
    """A model with adapters of rank 4 whose B are not zero, and the same model with the adapters merged."""
    model, merged = random_model(kind, tied), random_model(kind, tied)
    stage.train_sid_rows_only(model, torch.arange(90, 96))
    add_lora(model, 4)
    for module in model.modules():
        if isinstance(module, LoRA):
            assert not module.b.any()                                   # no change at the start
            torch.nn.init.normal_(module.b, std=0.02)
    weights = merged_weights(model)
    assert weights.keys() == merged.state_dict().keys()
    merged.load_state_dict(weights)
    return model.eval(), merged


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("phi3", True)])
def test_adapters_merge_and_their_gradients_are_those_of_the_merged_weight(kind, tied, monkeypatch):
    """With W' = W + s B A and G = dL/dW': dL/dB = s G A^T and dL/dA = s B^T G."""
    ids = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(0))
    model, merged = adapted_model(kind, tied)
    monkeypatch.setattr(init_embeddings, "LORA_DROPOUT", 0.5)           # which says nothing outside training
    with torch.no_grad():
        plain, logits = random_model(kind, tied)(ids).logits, model(ids).logits
        assert torch.allclose(logits, merged(ids).logits, atol=1e-4)
        assert not torch.allclose(logits, plain, atol=0.1)
        assert not torch.allclose(model.train()(ids).logits, logits, atol=1e-2)

    monkeypatch.setattr(init_embeddings, "LORA_DROPOUT", 0.0)
    for m in (model.double(), merged.double()):
        examples = [stage.Example("next", row, 1) for row in ids.tolist()]
        loss_of(m)(stage.collate(examples, CPU)).mean().backward()
    whole, found = dict(merged.named_parameters()), []
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            found.append(name.split(".")[-1])
            g = whole[f"{name}.weight"].grad
            assert module.scale == 8 and module.a.shape[0] == module.b.shape[1] == 4
            assert torch.allclose(module.b.grad, 8 * g @ module.a.T, atol=1e-5), name
            assert torch.allclose(module.a.grad, 8 * module.b.T @ g, atol=1e-5), name
    assert sorted(found) == sorted(2 * ADAPTED[kind].split())           # 2 layers, no LM head
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    matrices = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert trained == {name for name, _ in model.named_parameters() if name.endswith((".a", ".b"))} | matrices


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("llama", False)])
def test_lora_run_leaves_a_plain_checkpoint(kind, tied, run):
    text = rebuild(run, kind, tied)
    call(stage, "--run", run, "--tasks", "next,sid2title", "--epochs", 1, "--lora", 2, "--lr", 1e-3,
         "--batch-size", 16, "--precision", "float32")
    before, after = checkpoint(run / "init.pt")["weights"], checkpoint(run / "sft.pt")
    assert after["weights"].keys() == before.keys()
    for name, old in before.items():
        new = after["weights"][name]
        if name.endswith("_proj.weight"):
            assert torch.linalg.matrix_rank(new - old, rtol=1e-3) == 2, name
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert same_bits(new[text], old[text]) and (new[~text] != old[~text]).any(1).all(), name
        else:
            assert same_bits(new, old), name

    items = read_catalogue(run / "items.jsonl")                         # the merged model has the logged loss
    model, tokenizer, _ = load_model(run / "sft.pt", CPU, items)
    samples = read_samples(run / "valid.jsonl", {item["item_id"] for item in items})
    codes, sid_ids, leaf_of = sids_of(items, tokenizer)
    valid = stage.make_examples(tokenizer, "next", {"items": items, "samples": samples}, 9, "", leaf_of)
    trie = build_trie(codes, sid_ids.shape[1], CPU)
    loss = stage.validation_loss(model, trie, sid_ids, valid, 4096, "float32", 0, 1)
    assert loss == pytest.approx(after["metrics"]["valid_loss"], abs=1e-5)


def test_a_backbone_without_linear_layers_gets_no_adapters(run, capsys):
    rebuild(run, "gpt2", True)
    assert_stops(capsys, call, stage, "--run", run, "--lora", 2, words=("--lora", "Linear"))


# ---- Killed, interrupted, resumed ----------------------------------------------------------------

SHORT = ("--batch-size", 16, "--epochs", 2, "--log-every", 1, "--save-every", 2, "--dropout", 0.1,
         "--micro-tokens", 600)
SETUPS = {          # 12, 8 and 8 updates an epoch
    "sft": ("--tasks", "next,title2sid:0.5", "--evals-per-epoch", 2, "--patience", 9, *SHORT),
    "lora": ("--tasks", "next", "--lora", 2, *SHORT),
    "align": ("--stage", "align", "--tasks", "title2sid,name_item", *SHORT),
}
# Updates begin with the learning rate. save_progress comes after the new best weights of a validation.
DEATHS = [("sft", "learning_rate", 6), ("sft", "learning_rate", 18), ("sft", "save_progress", 3),
          ("lora", "learning_rate", 12), ("align", "learning_rate", 10)]


@pytest.fixture(scope="module")
def uninterrupted(finished_run, tmp_path_factory) -> dict:
    """Weights and log of each setup's run from beginning to end."""
    folder, out = tmp_path_factory.mktemp("whole"), {}
    for name, flags in SETUPS.items():
        call(stage, "--run", finished_run, *flags, "--out", folder / f"{name}.pt")
        out[name] = checkpoint(folder / f"{name}.pt"), log_of(folder / f"{name}.pt")
        assert sorted(path.name for path in folder.glob(f"{name}*")) == [f"{name}.pt", f"{name}_log.jsonl"]
    return out


def assert_equals(path, expected: tuple[dict, list]) -> None:
    """The run that wrote `path` ended as the uninterrupted one did, bit for bit."""
    found, whole = checkpoint(path), expected[0]
    assert log_of(path) == expected[1]
    assert found["weights"].keys() == whole["weights"].keys()
    assert all(same_bits(found["weights"][name], weight) for name, weight in whole["weights"].items())
    assert (found["step"], found["metrics"]) == (whole["step"], whole["metrics"])
    assert sorted(file.name for file in path.parent.iterdir()) == ["out.pt", "out_log.jsonl"]


@pytest.mark.parametrize("name, function, count", DEATHS)
def test_killed_and_resumed_equals_uninterrupted(name, function, count, forked, uninterrupted, finished_run,
                                                 tmp_path):
    flags = ("--run", finished_run, *SETUPS[name], "--out", tmp_path / "out.pt")
    assert exit_code(forked(*flags, death=(signal.SIGKILL, function, count))) == -signal.SIGKILL
    saved = 2 * (count - 1) if function == "save_progress" else (count - 1) // 2 * 2
    assert checkpoint(tmp_path / "out_resume.pt")["state"]["step"] == saved
    call(stage, *flags, "--resume")
    assert_equals(tmp_path / "out.pt", uninterrupted[name])


def test_interrupted_saves_and_leaves(forked, uninterrupted, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "out.pt"
    flags = ("--run", run, *SETUPS["sft"], "--out", out)
    for number, again in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        assert exit_code(forked(*flags, *again, death=(number, "learning_rate", 5))) == 130
    saved = checkpoint(out.with_name("out_resume.pt"))
    assert saved["state"]["step"] == 10 and saved.keys() == {"weights", "optimizer", "state", "settings"}
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    for changed, word in ((("--lr", 0.5), "lr"), (("--tasks", "next,title2sid"), "tasks"),
                          (("--precision", "float32"), "precision"), (("--seed", 3), "seed")):
        assert_stops(capsys, call, stage, *flags, *changed, "--resume", words=("out_resume.pt", word))
    train, init = (run / "train.jsonl").read_bytes(), (run / "init.pt").read_bytes()
    (run / "train.jsonl").write_bytes(b"".join(train.splitlines(True)[:-1]))            # a sample less
    assert_stops(capsys, call, stage, *flags, "--resume", words=("out_resume.pt", "examples"))
    (run / "train.jsonl").write_bytes(b"".join(reversed(train.splitlines(True))))       # another order
    assert_stops(capsys, call, stage, *flags, "--resume", words=("out_resume.pt", "examples"))
    (run / "train.jsonl").write_bytes(train)
    rebuild(run, "llama", True)
    assert_stops(capsys, call, stage, *flags, "--resume", words=("out_resume.pt", "parameters"))
    (run / "init.pt").write_bytes(init)
    other = load_model(run / "init.pt", torch.device("cpu"))
    other[0].get_input_embeddings().weight.data[-1] += 1                # another start of the same shape
    save_model(tmp_path / "other.pt", *other[:2], other[2].pop("sid"), **other[2])
    assert_stops(capsys, call, stage, *flags, "--from", tmp_path / "other.pt", "--resume",
                 words=("out_resume.pt", "SID rows"))
    assert {path: path.read_bytes() for path in before} == before
    call(stage, *flags, "--resume")
    assert_equals(out, uninterrupted["sft"])
    call(stage, *flags, "--resume")                                     # nothing left to continue: a new run
    assert_equals(out, uninterrupted["sft"])


@pytest.mark.parametrize("evals, best", [(1, 2), (2, 1)])
def test_what_an_interrupted_run_knew_is_kept(evals, best, finished_run, tmp_path, monkeypatch):
    """It stops after the first of two updates: before anything was logged, or after the best validation."""
    flags = ("--run", finished_run, "--tasks", "next", "--epochs", 1, "--evals-per-epoch", evals)
    flags += ("--batch-size", 64, "--patience", 3, "--out", tmp_path / "out.pt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(stage, "catch_interrupts", lambda device: lambda: True)
        patch.setattr(stage, "validation_loss", lambda *_: 0.5)
        call(stage, *flags)
    assert left.value.code == 130 and checkpoint(tmp_path / "out_resume.pt")["state"]["step"] == 1
    call(stage, *flags, "--resume")
    assert checkpoint(tmp_path / "out.pt")["step"] == best
    assert [row["step"] for row in log_of(tmp_path / "out.pt")] == list(range(best, 3))


# ---- Several processes ---------------------------------------------------------------------------

# 120 samples and 24 tokens in batches of 13: one has a single example, fewer than there are processes.
SHARED = ("--dropout", 0, "--tasks", "next,text2token:0.3", "--epochs", 1, "--batch-size", 13,
          "--log-every", 1, "--evals-per-epoch", 2, "--precision", "float32")


@pytest.fixture(scope="module")
def alone(finished_run, tmp_path_factory):
    """The run of one process."""
    path = tmp_path_factory.mktemp("alone") / "one.pt"
    call(stage, "--run", finished_run, *SHARED, "--out", path)
    assert len(log_of(path)) == 12
    return path


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


def test_torchrun_equals_one_process(alone, finished_run, tmp_path):
    flags = ("--run", finished_run, *SHARED, "--device", "cpu", "--micro-tokens", 200)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
         ROOT / "train.py", *map(str, flags), "--out", tmp_path / "two.pt"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 and "cpu x 2" in done.stdout            # only rank 0 prints
    assert_close(tmp_path / "two.pt", alone)


def test_two_processes_equal_one_though_one_is_interrupted(alone, forked, finished_run, tmp_path):
    flags = ("--run", finished_run, *SHARED, "--micro-tokens", 200, "--out", tmp_path / "two.pt")
    assert two_processes(forked, *flags, death=(signal.SIGINT, "learning_rate", 5)) == [130, 130]
    assert checkpoint(tmp_path / "two_resume.pt")["state"]["step"] == 5
    assert two_processes(forked, *flags, "--resume") == [0, 0]
    assert_close(tmp_path / "two.pt", alone)


def test_replicas_with_adapters_equal_one_process(forked, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(init_embeddings, "LORA_DROPOUT", 0.0)
    flags = ("--run", finished_run, *SHARED, "--lora", 2)
    call(stage, *flags, "--out", tmp_path / "one.pt")
    assert two_processes(forked, *flags, "--micro-tokens", 200, "--out", tmp_path / "two.pt") == [0, 0]
    assert_close(tmp_path / "two.pt", tmp_path / "one.pt")


@pytest.mark.parametrize("patience, choose", [(9, min), (0, lambda losses: losses[-1])])
def test_keep_leaves_the_weights_of_every_validation(patience, choose, run):
    call(stage, "--run", run, "--epochs", 2, "--keep", "--evals-per-epoch", 3, "--out", run / "k.pt",
         "--batch-size", 16, "--patience", patience)
    losses = {row["step"]: row["valid_loss"] for row in log_of(run / "k.pt") if "valid_loss" in row}
    saved = [checkpoint(path) for path in sorted(run.glob("k_?????.pt"))]
    kept = {content["step"]: content for content in saved}
    assert len(losses) >= 4 and {step: c["metrics"]["valid_loss"] for step, c in kept.items()} == losses
    best = checkpoint(run / "k.pt")
    assert best["metrics"]["valid_loss"] == choose(list(losses.values()))
    assert all(torch.equal(kept[best["step"]]["weights"][name], w) for name, w in best["weights"].items())


def test_a_full_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", sys.stdout)           # explain() drops it
    code = ("import tokenize_items, torch\n"
            "tokenize_items.set_up('cpu')\n"
            "raise torch.OutOfMemoryError('CUDA out of memory')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_one_line_error(done, "memory is full", "--micro-tokens")
    with pytest.raises(ZeroDivisionError) as caught:
        raise ZeroDivisionError("another error")
    tokenize_items.explain(caught.type, caught.value, caught.tb)
    assert "Traceback" in capsys.readouterr().err
    assert_stops(capsys, tokenize_items.explain, KeyboardInterrupt, KeyboardInterrupt(), None,
                 words=("interrupted",))


def test_a_closed_pipe_is_one_line(tmp_path):
    code = ("import tokenize_items\n"
            "tokenize_items.set_up('cpu')\n"
            "for n in range(999):\n"
            "    print('a long line ' * 99)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        process.stdout.close()                              # as `| head` does
        said = process.stderr.read()
    assert (process.returncode, said) == (2, "error: interrupted\n")


def test_a_training_does_not_overwrite_its_start(run, tmp_path, capsys):
    before = (run / "init.pt").read_bytes()
    flags = ("--run", run, "--epochs", 1)
    for more in (("--out", run / "init.pt"), ("--from", run / "init.pt", "--out", run / "." / "init.pt"),
                 ("--from", run / "sft.pt")):
        assert_stops(capsys, call, stage, *flags, *more, words=("--out", "--from"))
    assert_stops(capsys, call, rl, *flags, "--from", run / "rl.pt", words=("--out", "--from"))
    assert (run / "init.pt").read_bytes() == before


def test_a_folder_is_no_checkpoint(run, tmp_path, capsys):
    for out in (tmp_path, "."):
        assert_stops(capsys, call, stage, "--run", run, "--out", out, words=("--out", "folder"))
