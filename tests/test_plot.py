"""tests/studies/plot.py: figures against numpy on the run's own files, their layout, what is missing."""
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_stops, call, write_lines
from init_embeddings import load_model

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import plot  # noqa: E402

NAMES = ["cosine.png", "curves.png", "pca.png", "spectra.png"]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """Every figure that is saved from here on, by the name of its file without the suffix."""
    figure_class, figures = pytest.importorskip("matplotlib.figure").Figure, {}
    save = figure_class.savefig

    def remember(self, path, **style):
        figures[path.name.split(".")[1]] = self         # the temporary file is .curves.png.1234
        save(self, path, **style)
    monkeypatch.setattr(figure_class, "savefig", remember)
    return figures


def read_by_hand(path: Path, run: Path) -> dict:
    """The rows of text tokens, of SID tokens in use and of frequent words, without the code under test."""
    stored = torch.load(path, weights_only=True)
    matrix = stored["weights"]["model.embed_tokens.weight"].double().numpy()
    items = read_lines(run / "items.jsonl")
    ids = {token["content"]: token["id"] for token in json.loads(stored["tokenizer"])["added_tokens"]}
    in_use = {token for item in items for token in item["sid"]}
    names = sorted(in_use, key=lambda token: (token[1], int(token[3:-1])))
    _, tokenizer, _ = load_model(path, torch.device("cpu"))
    counts = Counter()
    for item in items:
        counts.update(tokenizer(item["title"], add_special_tokens=False).input_ids)
    words = [i for i in counts if re.fullmatch(r"\s*[^\W\d_]+", tokenizer.decode([i]))]
    words.sort(key=lambda i: -counts[i])
    first_sid = min(i for token, i in ids.items() if token.startswith("<a_"))
    return {"text": matrix[:first_sid], "words": matrix[words[:50]], "names": names,
            "sid": matrix[[ids[name] for name in names]]}


def effective_rank(values: np.ndarray) -> float:
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def assert_readable(figure) -> None:
    """All text is at least 9 points high and on the canvas; no legend covers the axes."""
    from matplotlib.text import Text
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert len(texts) > 8 and all(t.get_fontsize() >= 9 for t in texts) and figure.dpi >= 150
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    for legend in figure.legends:
        for axes in figure.axes:
            assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    assert min(figure.axes[0].get_window_extent().size) > 2 * figure.dpi


# ---- What the figures show -----------------------------------------------------------------------

def test_figures_show_what_the_files_hold(run, tmp_path, drawn, capsys):
    stored = torch.load(run / "init.pt", weights_only=True)
    matrix = stored["weights"]["model.embed_tokens.weight"]
    matrix[-24:] = matrix[:-24].mean(0)                                 # STAR, eq. 1
    torch.save(stored, run / "init_mean.pt")
    torch.save({"weights": {}}, run / "align_resume.pt")                # of an interrupted run: no checkpoint
    write_lines(run / "rl_log.jsonl", [{"step": 0, "valid": 0.1}])
    write_lines(run / "plain_log.jsonl", [{"step": 5, "valid_loss": 3.0}, {"step": 7, "loss": 1.0},
                                          {"step": 9, "valid_loss": 2.5}])
    before, out = contents(run), tmp_path / "new" / "pictures"
    call(plot, "--run", run, "--out", out)
    assert contents(run) == before
    assert sorted(path.name for path in out.iterdir()) == NAMES
    printed = capsys.readouterr().out
    for name in NAMES:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"wrote {out / name}" in printed
        assert_readable(drawn[name.split(".")[0]])

    lines = {line.get_label(): line for line in drawn["curves"].axes[0].lines}
    assert list(lines) == ["plain", "sft"]
    assert lines["plain"].get_xydata().tolist() == [[5, 3.0], [9, 2.5]]
    rows = read_lines(run / "sft_log.jsonl")
    log = [[row["step"], row["valid_loss"]] for row in rows if "valid_loss" in row]
    assert len(log) > 1 and lines["sft"].get_xydata().tolist() == log

    lines, [legend] = drawn["spectra"].axes[0].lines, drawn["spectra"].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert legend.get_title().get_text() == "effective rank"
    for line, label, name in zip(lines, labels, ("init", "init_mean", "sft"), strict=True):
        values = np.linalg.svd(read_by_hand(run / f"{name}.pt", run)["sid"], compute_uv=False)
        assert label.startswith(f"{name}: ") and line.get_label() == label
        assert float(label.split()[-1]) == pytest.approx(effective_rank(values), abs=0.06)
        np.testing.assert_allclose(line.get_ydata(), values / values[0], atol=1e-5)
        assert line.get_xdata().tolist() == list(range(1, len(values) + 1))
    assert labels[1].endswith(" 1.0") and len({line.get_color() for line in lines}) == 3


def test_cosine_before_and_after(run, tmp_path, drawn):
    call(plot, "--run", run, "--out", tmp_path)
    assert len(drawn["cosine"].axes) == 3                               # one colour bar for both
    for axes, name in zip(drawn["cosine"].axes, ("init.pt", "sft.pt")):
        rows = read_by_hand(run / name, run)
        assert axes.get_title() == name and len(rows["names"]) < 50     # all of them are shown
        both = np.concatenate([rows["words"], rows["sid"]])
        both /= np.linalg.norm(both, axis=1, keepdims=True)
        np.testing.assert_allclose(axes.images[0].get_array(), both @ both.T, atol=1e-5)
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["text", "level 1", "level 2", "level 3"]
        kinds = ["text"] * len(rows["words"]) + [f"level {'abc'.index(n[1]) + 1}" for n in rows["names"]]
        for label, middle in zip(labels, axes.get_xticks(), strict=True):
            places = [place for place, kind in enumerate(kinds) if kind == label]
            assert middle == pytest.approx(np.mean(places))
        ends = [line.get_xdata() for line in axes.lines]
        edges = sorted(left for left, right in ends if left == right)       # of the vertical lines
        assert edges == [place - 0.5 for place in range(1, len(kinds)) if kinds[place] != kinds[place - 1]]


def test_pca_before_and_after(run, tmp_path, drawn):
    call(plot, "--run", run, "--out", tmp_path)
    for axes, name in zip(drawn["pca"].axes, ("init.pt", "sft.pt"), strict=True):
        rows = read_by_hand(run / name, run)
        assert axes.get_title() == name
        both = np.concatenate([rows["text"], rows["sid"]])
        u, s, _ = np.linalg.svd(both - both.mean(0), full_matrices=False)
        points = np.concatenate([points.get_offsets() for points in axes.collections])
        np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), atol=1e-3)
        sizes = [len(points.get_offsets()) for points in axes.collections]
        assert sizes == [len(rows["text"]), *(sum(n[1] == level for n in rows["names"]) for level in "abc")]
        for axis, label in enumerate((axes.get_xlabel(), axes.get_ylabel())):
            assert f" {s[axis] ** 2 / (s ** 2).sum():.0%} of " in label


def test_large_spaces(drawn):
    """50 of many SID tokens, evenly spaced; more lines than colours; four levels."""
    generator = torch.Generator().manual_seed(0)
    levels = sorted(n % 4 for n in range(333))
    text = torch.randn(900, 16, generator=generator)
    rows = plot.Rows(text=text, words=text[:50], sid=torch.eye(333)[:, :16] + 1)
    paths = [ROOT / f"init_sa_depth_{n}.pt" for n in range(9)]
    spectra = plot.draw_spectra(dict.fromkeys(paths, rows))
    assert_readable(spectra)
    assert len({(line.get_color(), line.get_linestyle()) for line in spectra.axes[0].lines}) == 9
    cosine = plot.draw_cosine({paths[0]: rows}, levels)
    assert_readable(cosine)
    assert cosine.axes[0].images[0].get_array().shape == (100, 100)
    blocks = [label.get_text() for label in cosine.axes[0].get_yticklabels()]
    assert blocks == ["text", "level 1", "level 2", "level 3", "level 4"]
    assert_readable(plot.draw_pca({paths[0]: rows}, levels))


# ---- What is missing -----------------------------------------------------------------------------

def test_only_what_exists_is_drawn(run, tmp_path, drawn, capsys):
    (run / "sft_log.jsonl").unlink()
    (run / "sft.pt").rename(tmp_path / "other.pt")
    (run / "init.pt").unlink()
    call(plot, "--run", run, "--checkpoint", tmp_path / "other.pt")
    assert f"no validation loss in {run}/*_log.jsonl: no curves.png" in capsys.readouterr().out
    names = sorted(path.name for path in (run / "figures").iterdir())
    assert names == ["cosine.png", "pca.png", "spectra.png"]
    assert [axes.get_title() for axes in drawn["pca"].axes] == ["other.pt"]


ERRORS = {                              # name -> (a change to the run, words of the message)
    "no checkpoint": (lambda run: (run / "sft.pt").unlink(), ["sft.pt", "cannot be loaded"]),
    "a broken log": (lambda run: (run / "sft_log.jsonl").write_text('{"step": 1}\n{'), ["log.jsonl, line 2"]),
    "a broken init": (lambda run: (run / "init_x.pt").write_text("?"), ["init_x.pt", "cannot be loaded"]),
    "a file in the folder's place": (lambda run: (run / "figures").write_text("?"), ["cannot be written"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(run, capsys, name):
    pytest.importorskip("matplotlib")
    change, words = ERRORS[name]
    change(run)
    before = contents(run)
    assert_stops(capsys, call, plot, "--run", run, words=words)
    assert contents(run) == before


def test_without_matplotlib(run, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)                    # an import of it fails
    before = contents(run)
    assert_stops(capsys, call, plot, "--run", run, words=("pip install matplotlib",))
    assert contents(run) == before
