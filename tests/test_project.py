"""Hygiene: the import graph, the layout, dependencies, loading and searching as DESIGN.md fixes them."""
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# What each stage may import from, itself left out; "never a circle, no seventh file".
UPSTREAM = {
    "tokenize_items": set(),
    "extract_semantics": {"tokenize_items"},
    "init_embeddings": {"tokenize_items"},
    "train": {"tokenize_items", "init_embeddings"},
    "evaluate": {"tokenize_items", "init_embeddings", "train"},
    "rl": {"tokenize_items", "init_embeddings", "train", "evaluate"}}
CHAIN = {"extract_semantics": "tokenize_items", "init_embeddings": "tokenize_items", "train": "init_embeddings",
         "evaluate": "train", "rl": "evaluate"}                         # the arrows themselves
PACKAGES = {"torch", "transformers", "numpy", "tqdm", "requests"}
STAGES = [name for name in UPSTREAM if (ROOT / f"{name}.py").exists()]
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in STAGES}


def tracked() -> list[str]:
    """The files that git tracks; skips where this is no checkout."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def imports(nodes) -> list[tuple[str, list[str]]]:
    """(top-level module, imported names) of every import statement among `nodes`."""
    out = []
    for node in nodes:
        if isinstance(node, ast.Import):
            out += [(alias.name.split(".")[0], []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            out.append(("." * node.level + (node.module or "").split(".")[0], [alias.name for alias in node.names]))
    return out


def test_pyflakes_finds_nothing():
    pytest.importorskip("pyflakes")
    files = [name for name in tracked() if name.endswith(".py") and (ROOT / name).exists()]
    done = subprocess.run([sys.executable, "-m", "pyflakes", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


def test_the_import_graph_is_the_documented_one():
    assert len(STAGES) >= 5
    for name, tree in TREES.items():
        found = [(module, names) for module, names in imports(ast.walk(tree)) if module in UPSTREAM]
        assert {module for module, _ in found} <= UPSTREAM[name], name
        assert name not in CHAIN or CHAIN[name] in {module for module, _ in found}, name
        for module, names in found:                                     # by name, never *, and names that exist
            assert names and "*" not in names, (name, module)
            theirs = {n.name for n in TREES[module].body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            theirs |= {t.id for n in TREES[module].body if isinstance(n, (ast.Assign, ast.AnnAssign))
                       for target in (n.targets if isinstance(n, ast.Assign) else [n.target])
                       for t in ast.walk(target) if isinstance(t, ast.Name)}
            assert set(names) <= theirs, (name, module)                 # from the stage that owns them


def test_third_party_imports_are_the_five_packages():
    for name, tree in TREES.items():
        modules = {module for module, _ in imports(tree.body)} - set(sys.stdlib_module_names) - set(UPSTREAM)
        assert modules <= PACKAGES, name
        assert not any(module.startswith(".") for module in modules), name


def test_importing_a_stage_does_nothing():
    code = f"""
import random, sys
import numpy, requests, torch, tqdm, transformers
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--no-such-flag"]
random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
def state():
    return (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled(), torch.is_grad_enabled(),
            torch.cuda.is_initialized())
before = state()
import {", ".join(STAGES)}
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_else_at_top_level():
    top = {name.split("/")[0] for name in tracked()}
    allowed = {f"{name}.py" for name in UPSTREAM} | {"tests", "requirements.txt", "README.md", "LICENSE"}
    assert not {name for name in top - allowed if not name.startswith(".")}
    assert {f"{name}.py" for name in STAGES} <= top


def test_every_load_is_weights_only():
    for path in [*(ROOT / f"{name}.py" for name in STAGES), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and getattr(k.value, "value", 0) is True for k in node.keywords), (
                    f"{path.name}, line {node.lineno}")


def test_no_stage_but_the_teacher_generates():
    for name in set(STAGES) - {"extract_semantics"}:
        called = [node.func.attr for node in ast.walk(TREES[name])
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        assert "generate" not in called, name


def test_requirements_name_exactly_the_five():
    path = ROOT / "requirements.txt"
    if not path.exists():
        pytest.skip("no requirements.txt yet")
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(re.split(r"[<>=!~;\[ ]", line)[0] for line in lines if line) == sorted(PACKAGES)


@pytest.mark.parametrize("name", STAGES)
def test_docstring_and_command_line(name, capsys):
    stage = importlib.import_module(name)
    first = ast.get_docstring(TREES[name])
    for part in ("Reads", "Writes", f"  python {name}.py"):
        assert part in first, part
    with pytest.raises(SystemExit) as helped:
        stage.parse_args(["--help"])
    text = capsys.readouterr().out
    assert helped.value.code == 0 and "--run" in text and "runs/demo" in text
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(["--no-such-flag"])
    assert stopped.value.code == 2 and "--no-such-flag" in capsys.readouterr().err
    args = stage.parse_args([])
    assert Path(args.run) == Path("runs/demo")
    for command in re.findall(rf"^  python {name}\.py(.*)$", first, flags=re.M):      # the examples parse
        assert stage.parse_args(command.split("  #")[0].split())
