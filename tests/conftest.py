"""What the tests share: a toy shop, a finished toy run, small random models, ways to call the scripts."""
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")      # the tests expect a CPU; set it to 0 to try a GPU

THINGS = ["steel rod", "brass fitting", "nylon rope", "glass beaker", "rubber gasket", "copper wire",
          "oak board", "paper filter", "wool blanket", "clay pot"]
USES = ["measuring liquids in a laboratory", "fixing pipes under a sink", "tying loads to a roof rack",
        "building a garden shed", "keeping a workshop tidy", "sealing a leaking joint"]


def toy_items(count: int = 60) -> list[dict]:
    """Items with distinct texts, some brands and a category."""
    items = []
    for i in range(count):
        thing = THINGS[i % 10]
        description = f"A sturdy {thing} for {USES[i % 6]}. Comes in size {i % 7} and lasts long."
        items.append({"item_id": i, "title": f"Acme {thing} number {i}", "description": description,
                      "brand": "Acme", "categories": f"Shop > {thing.split()[0]}"})
    return items


def toy_interactions(count: int = 60, users: int = 40) -> list[dict]:
    """Users who walk through the catalogue in steps."""
    rng = random.Random(0)
    rows = []
    for u in range(users):
        start, length = rng.randrange(count), rng.randrange(4, 9)
        rows.append({"user_id": f"u{u}", "items": [(start + 10 * t) % count for t in range(length)],
                     "timestamps": [100 * u + t for t in range(length)]})
    return rows


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_script(*args) -> subprocess.CompletedProcess:
    """Run a script as a user would, `run_script("train.py", "--run", run)`; text of both streams captured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / str(args[0])), *map(str, args[1:])]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def assert_one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and, as the last line on stderr, one sentence that holds all `words`; never a traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "error:" in line
    for word in words:
        assert word in line, line


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """A folder with items.jsonl and interactions.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "items.jsonl", toy_items())
    write_lines(folder / "interactions.jsonl", toy_interactions())
    return folder


@pytest.fixture(scope="session")
def finished_run(toy_data, tmp_path_factory) -> Path:
    """A run of stages 1-4 on the toy shop, 8 codes per level; read only (copy it with the `run` fixture)."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    tiny = ("--width", 32, "--layers", 2, "--vocab-size", 500, "--pretrain-steps", 10)
    for name, *flags in (("tokenize_items", "--data", toy_data, "--codebook-size", 8), ("extract_semantics",),
                         ("init_embeddings", *tiny), ("train", "--epochs", 2, "--batch-size", 16)):
        call(importlib.import_module(name), "--run", run, *flags)
    return run


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def random_model(kind: str = "qwen2", tied: bool = True, rows: int = 97, seed: int = 0, **extra):
    """A 2-layer, 32-wide random causal LM of a Hugging Face architecture, float32, in eval mode."""
    torch.manual_seed(seed)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256) if kind == "gpt2" else dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256)
    if kind == "qwen3":
        sizes["head_dim"] = 8
    config = AutoConfig.for_model(
        kind, vocab_size=rows, tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, **{**sizes, **extra})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def call(stage, *args) -> None:
    """Run a stage's main() in this process, `call(train, "--run", run)`: a tenth of a subprocess's time."""
    argv, flash = sys.argv, torch.backends.cuda.flash_sdp_enabled()
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{stage.__name__}.py", *map(str, args)]
    try:
        stage.main()
    finally:
        sys.argv = argv
        for name, handler in handlers.items():          # Ctrl-C is pytest's again
            signal.signal(name, handler)
        torch.backends.cuda.enable_flash_sdp(flash)


def assert_stops(capsys, function, *args, words: tuple = ()) -> None:
    """`function(*args)` ends with exit code 2 and one line on stderr that holds all `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert str(word) in lines[0], lines[0]
