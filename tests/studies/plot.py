"""Draw a run's training and its embeddings: four figures. Needs matplotlib.

curves.png    validation loss against update, one line per log (TS-Rec, figure 4)
spectra.png   singular values of the SID rows in use, and their effective rank (STAR, figure 2)
cosine.png    cosines between frequent words and SID tokens, before and after training (STAR, figure 5)
pca.png       text rows and SID rows on their two principal axes, before and after training
              (TS-Rec, figure 1; STAR, figure 2)

Reads   RUN/items.jsonl, RUN/*_log.jsonl, RUN/sft.pt (or --checkpoint), RUN/init*.pt and align*.pt
Writes  the four figures

Examples, from the project's root
  python tests/studies/plot.py --run runs/demo --out runs/demo/figures
  python tests/studies/plot.py --run runs/demo --checkpoint runs/demo/rl.pt --out runs/demo/figures_rl
"""
import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from init_embeddings import load_model, sid_token_ids  # noqa: E402
from tokenize_items import (atomic_write, fit_pca, make_parser, parse_sid_token,  # noqa: E402
                            read_catalogue, read_jsonl, stop)

# Letters used in shapes: V text tokens of the vocabulary, W frequent words, S SID tokens in use, D width.
HEAT_MAP_ROWS = 50                      # of words and of SID tokens each (STAR, figure 5)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
LINE_STYLES = ("-", "--", ":")
MARKERS = "o^sDvP*<"                    # one per level


class Rows(NamedTuple):
    """Rows of a checkpoint's embedding matrix."""
    text: torch.Tensor                  # (V, D) all tokens that are no SID tokens
    words: torch.Tensor                 # (W, D) the words that titles use most
    sid: torch.Tensor                   # (S, D)


def read_rows(path: Path, items: list[dict], sid_tokens: list[str]) -> Rows:
    """Read the rows of a checkpoint that was made for these items."""
    model, tokenizer, checkpoint = load_model(path, torch.device("cpu"), items)
    matrix, sid = model.get_input_embeddings().weight.detach().float(), checkpoint["sid"]
    first_sid = int(sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).min())
    titles = tokenizer([item["title"] for item in items], add_special_tokens=False).input_ids
    frequent = Counter(token for title in titles for token in title).most_common()
    words = [token for token, _ in frequent if tokenizer.decode([token]).strip().isalpha()]
    return Rows(text=matrix[:first_sid], words=matrix[words[:HEAT_MAP_ROWS]],
                sid=matrix[tokenizer.convert_tokens_to_ids(sid_tokens)])


def read_losses(run: Path) -> dict[str, dict[int, float]]:
    """The validation losses in a run's logs: {"sft": {step: loss}, ...}; logs without any are left out."""
    losses = {}
    for path in sorted(run.glob("*_log.jsonl")):
        log = read_jsonl(path, {"step": int})
        found = {row["step"]: row["valid_loss"] for row in log if "valid_loss" in row}
        if found:
            losses[path.stem.removesuffix("_log")] = found
    return losses


# ---- The four figures ----------------------------------------------------------------------------

def new_figure(width: float, height: float):
    """An empty figure of that many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        stop(f"the figures need matplotlib, which cannot be imported ({error}); pip install matplotlib")
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def draw_lines(axes, lines: dict[str, dict[int, float]], marker: str = "", heading: str = "") -> None:
    """Draw a line {x: y} for each name; the names are a list to the right of the axes, with a heading."""
    for number, (name, points) in enumerate(lines.items()):
        style = LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)]
        axes.plot(list(points), list(points.values()), label=name, marker=marker,
                  color=COLOURS[number % len(COLOURS)], linestyle=style)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right upper", title=heading)


def draw_curves(losses: dict[str, dict[int, float]]):
    """Validation loss against update. --stage align validates on other examples than --stage sft."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    draw_lines(axes, losses, marker=".")
    axes.set(title="Validation loss", xlabel="update", ylabel="nats per supervised token")
    return figure


def effective_rank(rows: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); rows (n, D)."""
    values = torch.linalg.svdvals(rows.detach().float())
    share = values / values.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()


def draw_spectra(rows_of: dict[Path, Rows]):
    """Singular values of the SID rows of each checkpoint, the largest set to 1."""
    figure, lines = new_figure(8, 5), {}
    for path, rows in rows_of.items():
        values = torch.linalg.svdvals(rows.sid)
        relative = (values / values[0]).tolist()
        lines[f"{path.stem}: {effective_rank(rows.sid):.1f}"] = dict(enumerate(relative, 1))
    axes = figure.subplots()
    draw_lines(axes, lines, heading="effective rank")
    axes.set(title="Singular values of the SID rows in use", xlabel="place in descending order",
             ylabel="relative to the largest", yscale="log", ylim=(1e-3, 1.3))     # below are rounding errors
    return figure


def draw_cosine(rows_of: dict[Path, Rows], levels: list[int]):
    """Cosines between frequent words and evenly spaced SID tokens; levels: that of each SID token."""
    figure = new_figure(6 * len(rows_of), 5)
    count = min(HEAT_MAP_ROWS, len(levels))
    shown = [place * len(levels) // count for place in range(count)]
    for axes, (path, rows) in zip(np.ravel(figure.subplots(1, len(rows_of))), rows_of.items()):
        unit = F.normalize(torch.cat([rows.words, rows.sid[shown]]), dim=1)
        image = axes.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        blocks = {"text": len(rows.words)}                      # name -> number of rows
        for place in shown:
            level = f"level {levels[place] + 1}"
            blocks[level] = blocks.get(level, 0) + 1
        sizes = np.array(list(blocks.values()))
        ends = sizes.cumsum() - 0.5                             # the first row lies at 0, from -0.5 to 0.5
        for end in ends[:-1]:
            axes.axhline(end, color="black", linewidth=1)
            axes.axvline(end, color="black", linewidth=1)
        middles = ends - sizes / 2
        axes.set(title=path.name, xticks=middles, xticklabels=blocks, yticks=middles, yticklabels=blocks)
    figure.suptitle("Cosine between text rows and SID rows")
    figure.colorbar(image, ax=figure.axes, label="cosine")
    return figure


def draw_pca(rows_of: dict[Path, Rows], levels: list[int]):
    """Text rows and SID rows on the two principal axes of both together; levels: that of each SID token."""
    figure = new_figure(6 * len(rows_of), 5.5)
    for axes, (path, rows) in zip(np.ravel(figure.subplots(1, len(rows_of))), rows_of.items()):
        both = torch.cat([rows.text, rows.sid])
        pca = fit_pca(both, 2)
        centered = both - pca["pca_mean"]
        points = centered @ pca["pca_axes"]                                     # (V + S, 2)
        share = points.square().sum(0) / centered.square().sum()
        text, sid = points.numpy()[:len(rows.text)], points.numpy()[len(rows.text):]
        axes.scatter(text[:, 0], text[:, 1], s=3, color="0.75", label="text tokens")
        for level in sorted(set(levels)):
            chosen = sid[np.array(levels) == level]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=18, color=COLOURS[level % len(COLOURS)],
                         marker=MARKERS[level], label=f"SID tokens, level {level + 1}")
        axes.set(title=path.name, xlabel=f"axis 1: {share[0]:.0%} of the variance",
                 ylabel=f"axis 2: {share[1]:.0%} of the variance")
    figure.suptitle("Embedding rows on their two principal axes")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(rows_of))
    return figure


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run")
    parser.add_argument("--checkpoint", help="the model after training, instead of RUN/sft.pt")
    parser.add_argument("--out", help="folder for the figures, instead of RUN/figures")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    run = Path(args.run)
    out, trained = Path(args.out or run / "figures"), Path(args.checkpoint or run / "sft.pt")
    items = read_catalogue(run / "items.jsonl")
    sid_tokens = sorted({token for item in items for token in item["sid"]}, key=parse_sid_token)
    levels = [parse_sid_token(token)[0] for token in sid_tokens]

    figures, losses = {}, read_losses(run)
    if losses:
        figures["curves"] = draw_curves(losses)
    else:
        print(f"no validation loss in {run}/*_log.jsonl: no curves.png")
    starts = [*sorted(run.glob("init*.pt")), *sorted(run.glob("align*.pt"))]
    paths = [path for path in starts if not path.stem.endswith("_resume") and path != trained]
    rows_of = {path: read_rows(path, items, sid_tokens) for path in [*paths, trained]}
    before_and_after = {path: rows_of[path] for path in (run / "init.pt", trained) if path in rows_of}
    figures["spectra"] = draw_spectra(rows_of)
    figures["cosine"] = draw_cosine(before_and_after, levels)
    figures["pca"] = draw_pca(before_and_after, levels)
    for name, figure in figures.items():
        path = out / f"{name}.png"
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
