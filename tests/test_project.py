"""The layout, the import graph, the dependencies and the budgets of the project stay as they were decided."""
import argparse
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# The stages that each stage may import from. No stage imports from a later one.
UPSTREAM = {
    "tokenize_items": set(),
    "extract_semantics": {"tokenize_items"},
    "init_embeddings": {"tokenize_items", "extract_semantics"},
    "train": {"tokenize_items", "extract_semantics", "init_embeddings"},
    "evaluate": {"tokenize_items", "extract_semantics", "init_embeddings", "train"},
    "rl": {"tokenize_items", "init_embeddings", "train", "evaluate"}}
# The stage before, which each stage must import from.
CHAIN = {"extract_semantics": "tokenize_items", "init_embeddings": "tokenize_items",
         "train": "init_embeddings", "evaluate": "train", "rl": "evaluate"}
STAGES = list(UPSTREAM)
PACKAGES = {"torch", "transformers", "numpy", "tqdm", "requests"}
TEXTS = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in STAGES}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
FUNCTIONS = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef)]


def tracked() -> list[str]:
    """The files that git tracks; skips the test where this is no checkout."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def imports(nodes) -> list[tuple[str, list[str]]]:
    """(top-level module, imported names) of every import statement among the nodes."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "").split(".")[0]
            found.append((module, [alias.name for alias in node.names]))
    return found


def defined_names(tree: ast.Module) -> set[str]:
    """The functions, classes and constants of a module."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def too_long(limit: int, is_main: bool) -> list[tuple]:
    return [(name, node.name, length(node)) for name, node in FUNCTIONS
            if (node.name == "main") == is_main and length(node) > limit]


# ---- Layout and imports --------------------------------------------------------------------------

def test_pyflakes_finds_nothing():
    pytest.importorskip("pyflakes")
    files = [name for name in tracked() if name.endswith(".py")]
    done = subprocess.run([sys.executable, "-m", "pyflakes", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


def test_nothing_else_at_top_level():
    top = {name.split("/")[0] for name in tracked()}
    scripts = {f"{name}.py" for name in STAGES}
    others = {"tests", "requirements.txt", "README.md", "LICENSE"}
    assert scripts <= top
    assert not {name for name in top - scripts - others if not name.startswith(".")}


def test_the_folder_of_the_tests_has_tests_and_three_folders():
    inside = [name.split("/")[1:] for name in tracked() if name.startswith("tests/")]
    files = {parts[0] for parts in inside if len(parts) == 1}
    assert {parts[0] for parts in inside if len(parts) > 1} == {"demo", "data", "studies"}
    assert not {name for name in files if not re.fullmatch(r"conftest\.py|test_\w+\.py", name)}


def test_the_import_graph_is_the_documented_one():
    for name, tree in TREES.items():
        found = [(module, names) for module, names in imports(ast.walk(tree)) if module in UPSTREAM]
        assert {module for module, _ in found} <= UPSTREAM[name], name
        assert name not in CHAIN or CHAIN[name] in {module for module, _ in found}, name
        for module, names in found:                     # by name, never *, and from the stage that owns it
            assert names and set(names) <= defined_names(TREES[module]), (name, module)


def test_the_stages_import_only_the_five_packages():
    known = PACKAGES | set(sys.stdlib_module_names) | set(UPSTREAM)
    for name, tree in TREES.items():
        assert {module for module, _ in imports(ast.walk(tree))} <= known, name


def test_requirements_name_exactly_the_five_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    assert sorted(re.split(r"[<>=!~;\[ ]", line)[0] for line in lines if line) == sorted(PACKAGES)


def test_importing_a_stage_does_nothing():
    code = f"""
import random, sys
import numpy, requests, torch, tqdm, transformers
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--no-such-flag"]
random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
def state():
    return (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled(),
            torch.is_grad_enabled(), torch.cuda.is_initialized())
before = state()
import {", ".join(STAGES)}
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- What no script does -------------------------------------------------------------------------

def test_every_load_is_weights_only():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                values = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
                assert [getattr(value, "value", None) for value in values] == [True], (path.name, node.lineno)


def test_no_stage_calls_generate():
    for name, tree in TREES.items():
        called = [node.func.attr for node in ast.walk(tree)
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        assert "generate" not in called, name


# ---- Command lines -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", STAGES)
def test_docstring_and_command_line(name, capsys):
    stage = importlib.import_module(name)
    docstring = ast.get_docstring(TREES[name])
    for part in ("Reads", "Writes", f"  python {name}.py"):
        assert part in docstring, part
    with pytest.raises(SystemExit) as helped:
        stage.parse_args(["--help"])
    text = capsys.readouterr().out
    assert helped.value.code == 0 and "--run" in text and "runs/demo" in text
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(["--no-such-flag"])
    assert stopped.value.code == 2 and "--no-such-flag" in capsys.readouterr().err
    assert Path(stage.parse_args([]).run) == Path("runs/demo")
    examples = re.findall(rf"^  (?:python|torchrun .*--) {name}\.py(.*)$", docstring, flags=re.M)
    for example in examples:
        assert stage.parse_args(example.split("  #")[0].split())


# ---- Budgets -------------------------------------------------------------------------------------

def test_the_six_files_stay_within_the_budgets_of_design():
    lines = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert max(lines.values()) <= 600, lines
    assert sum(lines.values()) <= 3_050, lines
    assert sum(len(text.encode()) for text in TEXTS.values()) <= 175_000


def test_lines_are_short():
    lines = [(name, line) for name, text in TEXTS.items() for line in text.splitlines() if line.strip()]
    assert not [(name, line) for name, line in lines if len(line) > 110]
    assert sum(len(line) for _, line in lines) / len(lines) <= 62.0


def test_functions_are_short():
    assert not too_long(70, is_main=False)
    assert not too_long(130, is_main=True)


def test_few_functions_take_args():
    takers = []
    for name, node in FUNCTIONS:
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if any(parameter.arg == "args" for parameter in parameters):
            takers.append((name, node.name))
    assert len(takers) <= 12, takers


def test_there_are_at_most_99_flags(monkeypatch):
    parsers, parse = [], argparse.ArgumentParser.parse_args

    def remember(parser, argv):
        parsers.append(parser)
        return parse(parser, argv)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember)
    for name in STAGES:
        importlib.import_module(name).parse_args([])
    assert len(parsers) == len(STAGES)
    flags = [action for parser in parsers for action in parser._actions if action.dest != "help"]
    assert len(flags) <= 99, len(flags)


def test_the_readme_has_at_most_260_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 260
