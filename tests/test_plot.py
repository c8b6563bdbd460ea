"""Stage 6's figures: what they show against numpy on the run's own files, how they lie, what happens without."""
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import evaluate
from conftest import ROOT, assert_one_line_error, assert_stops, call, write_lines
from test_evaluate import read_lines, snapshot

NAMES = ["cosine.png", "curves.png", "pca.png", "spectra.png"]


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """Every figure that is saved from here on, by the name of its file's first word."""
    figure, out = pytest.importorskip("matplotlib.figure").Figure, {}
    save = figure.savefig

    def remember(self, path, **style):
        out[path.name.split(".")[1]] = self
        save(self, path, **style)
    monkeypatch.setattr(figure, "savefig", remember)
    return out


def rows_of(path, run) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Text rows, SID rows in use by level and code, their names, the rows of words most used in titles; by hand."""
    stored = torch.load(path, weights_only=True)
    matrix = stored["weights"]["model.embed_tokens.weight"].double().numpy()
    tokenizer, items = json.loads(stored["tokenizer"]), read_lines(run / "items.jsonl")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    names = sorted({t for item in items for t in item["sid"]}, key=lambda t: (t[1], int(t[3:-1])))
    _, encode, _ = evaluate.load_model(path, torch.device("cpu"))
    used = Counter(i for item in items for i in encode(item["title"], add_special_tokens=False).input_ids)
    words = [i for i in used if re.fullmatch(r"\s*[^\W\d_]+", encode.decode([i]))]
    common = sorted(words, key=lambda i: -used[i])[:50]
    return (matrix[:min(i for t, i in ids.items() if t.startswith("<a_"))], matrix[[ids[t] for t in names]], names,
            matrix[common])


def effective_rank(values: np.ndarray) -> float:
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def assert_readable(figure) -> None:
    """Every word at least 9 points high and on the canvas, every legend clear of the axes."""
    from matplotlib.text import Text
    figure.draw_without_rendering()
    words = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert len(words) > 8 and all(t.get_fontsize() >= 9 for t in words) and figure.dpi >= 150
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert min(figure.axes[0].get_window_extent().size) > 2 * figure.dpi


# ---- what the figures show ----

def test_figures_show_what_the_files_hold(run, tmp_path, drawn, capsys):
    stored = torch.load(run / "init.pt", weights_only=True)
    matrix = stored["weights"]["model.embed_tokens.weight"]
    matrix[-24:] = matrix[:-24].mean(0)                                 # STAR's eq. 1
    torch.save(stored, run / "init_mean.pt")
    torch.save({"weights": {}}, run / "align_resume.pt")                # an interrupted run's: no checkpoint
    write_lines(run / "rl_log.jsonl", [{"step": 0, "valid": 0.1}])
    write_lines(run / "plain_log.jsonl", [{"step": 5, "valid_loss": 3.0}, {"step": 7, "loss": 1.0},
                                          {"step": 9, "valid_loss": 2.5}])
    before = snapshot(run)
    call(evaluate, "--run", run, "--plot", tmp_path / "new" / "pictures")
    assert snapshot(run) == before
    assert sorted(p.name for p in (tmp_path / "new" / "pictures").iterdir()) == NAMES
    said = capsys.readouterr().out
    for name in NAMES:
        path = tmp_path / "new" / "pictures" / name
        assert path.read_bytes().startswith(b"\x89PNG") and f"wrote {path}" in said
        assert_readable(drawn[name.split(".")[0]])

    lines = {line.get_label(): line for line in drawn["curves"].axes[0].lines}
    assert list(lines) == ["plain", "sft"]
    assert lines["plain"].get_xydata().tolist() == [[5, 3.0], [9, 2.5]]
    log = [[row["step"], row["valid_loss"]] for row in read_lines(run / "sft_log.jsonl") if "valid_loss" in row]
    assert len(log) > 1 and lines["sft"].get_xydata().tolist() == log

    lines = drawn["spectra"].axes[0].lines
    legend = [text.get_text() for text in drawn["spectra"].legends[0].get_texts()]
    assert drawn["spectra"].legends[0].get_title().get_text() == "effective rank"
    for line, label, name in zip(lines, legend, ("init", "init_mean", "sft"), strict=True):
        values = np.linalg.svd(rows_of(run / f"{name}.pt", run)[1], compute_uv=False)
        assert label.startswith(f"{name}: ") and line.get_label() == label
        assert float(label.split()[-1]) == pytest.approx(effective_rank(values), abs=0.06)
        np.testing.assert_allclose(line.get_ydata(), values / values[0], atol=1e-5)
        assert line.get_xdata().tolist() == list(range(1, len(values) + 1))
    assert legend[1].endswith(" 1.0") and len({line.get_color() for line in lines}) == 3


def test_cosine_and_pca_before_and_after(run, tmp_path, drawn):
    call(evaluate, "--run", run, "--plot", tmp_path)
    for which, name in enumerate(("init.pt", "sft.pt")):
        text, sid, names, common = rows_of(run / name, run)
        assert len(names) < 50                                          # all of them are shown
        both = np.concatenate([common, sid])
        both /= np.linalg.norm(both, axis=1, keepdims=True)
        axes = drawn["cosine"].axes[which]
        assert axes.get_title() == drawn["pca"].axes[which].get_title() == name
        np.testing.assert_allclose(axes.images[0].get_array(), both @ both.T, atol=1e-5)
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["text", "level 1", "level 2", "level 3"]
        kinds = ["text"] * len(common) + [f"level {'abc'.index(n[1]) + 1}" for n in names]
        for label, middle in zip(labels, axes.get_xticks(), strict=True):
            places = [place for place, kind in enumerate(kinds) if kind == label]
            assert middle == pytest.approx(np.mean(places))
        edges = sorted(line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1])
        assert edges == [n - 0.5 for n in range(1, len(kinds)) if kinds[n] != kinds[n - 1]]

        both = np.concatenate([text, sid])
        u, s, _ = np.linalg.svd(both - both.mean(0), full_matrices=False)
        axes = drawn["pca"].axes[which]
        points = np.concatenate([points.get_offsets() for points in axes.collections])
        np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), atol=1e-3)
        assert [len(points.get_offsets()) for points in axes.collections] == [len(text)] + [
            sum(n[1] == level for n in names) for level in "abc"]
        for axis, label in enumerate((axes.get_xlabel(), axes.get_ylabel())):
            assert f" {s[axis] ** 2 / (s ** 2).sum():.0%} of " in label
    assert len(drawn["cosine"].axes) == 3                               # one colour bar for both


def test_large_spaces(drawn):
    """50 of many SID rows, evenly; more lines than colours; four levels."""
    figure_of = sys.modules["matplotlib.figure"].Figure
    generator = torch.Generator().manual_seed(0)
    levels = sorted(n % 4 for n in range(333))
    rows = {"text": torch.randn(900, 16, generator=generator), "sid": torch.eye(333)[:, :16] + 1}
    rows["common"] = rows["text"][:50]
    paths = [ROOT / f"init_sa_depth_{n}.pt" for n in range(9)]
    alone = {paths[0]: rows}
    for draw, what in ((evaluate.draw_spectra, (dict.fromkeys(paths, rows), [set()] * 333)),
                       (evaluate.draw_cosine, (alone, levels)), (evaluate.draw_pca, (alone, levels))):
        figure = figure_of(figsize=(8, 5), dpi=150, layout="constrained")
        draw(figure, *what)
        assert_readable(figure)
        if draw is evaluate.draw_spectra:
            assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 9
        if draw is evaluate.draw_cosine:
            assert figure.axes[0].images[0].get_array().shape == (100, 100)
            blocks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
            assert blocks == ["text", "level 1", "level 2", "level 3", "level 4"]


# ---- what is not there ----

def test_only_what_exists_is_drawn(run, tmp_path, drawn, capsys):
    (run / "sft_log.jsonl").unlink()
    (run / "sft.pt").rename(tmp_path / "other.pt")
    (run / "init.pt").unlink()
    call(evaluate, "--run", run, "--checkpoint", tmp_path / "other.pt", "--plot", tmp_path / "pictures")
    assert f"no validation loss in {run}/*_log.jsonl: no curves.png" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["cosine.png", "pca.png", "spectra.png"]
    assert [axes.get_title() for axes in drawn["pca"].axes] == ["other.pt"]


ERRORS = {      # name -> (a change to the run, words of the message)
    "no checkpoint": (lambda run: (run / "sft.pt").unlink(), ["sft.pt", "no such file"]),
    "a broken log": (lambda run: (run / "sft_log.jsonl").write_text('{"step": 1}\n{"st'), ["sft_log.jsonl", "line 2"]),
    "a broken init": (lambda run: (run / "init_x.pt").write_text("?"), ["init_x.pt", "write it again"]),
    "a file in the folder's place": (lambda run: (run / "pictures").write_text("?"),
                                     ["curves.png", "cannot be written"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(run, capsys, name):
    pytest.importorskip("matplotlib")
    change, words = ERRORS[name]
    change(run)
    before = snapshot(run)
    assert_stops(capsys, call, evaluate, "--run", run, "--plot", run / "pictures", words=words)
    assert snapshot(run) == before


def test_without_matplotlib(run):
    """Where it is missing, everything imports, and --plot alone says what to install."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import evaluate, rl
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
sys.argv = ["evaluate.py", "--run", {str(run)!r}, "--plot", {str(run / "pictures")!r}]
evaluate.main()
"""
    before = snapshot(run)
    assert_one_line_error(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True),
                          "pip install matplotlib")
    assert snapshot(run) == before
