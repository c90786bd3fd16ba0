"""The figures of a report, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.report_runs import Curve, Run
from rotpruner.diagnostics import block_means
from rotpruner.errors import InputError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator, ScalarFormatter
except ImportError as error:
    raise InputError("reports need matplotlib; in the checkout: pip install -e '.[report]'") from error

# Drawn in colours that nobody would choose, which become the page's: figures follow its light or dark scheme.
_INK, _GRID = "#010203", "#040506"
_SERIES = [f"#0a0b{index:02x}" for index in range(1, 9)]
_PAGE_COLOURS = {_INK: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--c{index})" for index, colour in enumerate(_SERIES, 1)
}
_MARKERS = "osD^vPX*"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rotpruner",  # or every drawing would have other identifiers
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "image.cmap": "viridis",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_SIZE = (4.9, 3.3)  # inches; small enough that the letters stay readable across a phone


def figures(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Every figure that the runs hold data for: name → (caption, SVG element)."""
    drawn: dict[str, tuple[str, Callable[[Any], None]]] = {}
    for prefix in ("train/", "ppl/", "masks/"):
        for metric in dict.fromkeys(metric for run in runs for metric in run.curves if metric.startswith(prefix)):
            drawn[metric.replace("/", "-")] = (_caption(metric), _curve(runs, metric))
    for text in dict.fromkeys(text for run in runs for text in run.texts):
        caption = f"Gap to the dense model, G = ln ppl − ln ppl(dense), on {text}"
        drawn[f"gap-{text}"] = (caption, _gap(runs, text))
    for key, caption in _LAYERS.items():
        if any(row[key] is not None for run in runs for row in run.linears):
            drawn[f"layers-{key.replace('_', '-')}"] = (caption, _layers(runs, key))
    with matplotlib.rc_context(_STYLE):
        svgs = {name: (caption, _svg(name, draw)) for name, (caption, draw) in drawn.items()}
        for index, run in enumerate(runs, 1):
            if run.heat_map is not None:
                caption = f"{run.label}: root-mean-square weights of {run.heat_map[0]}, relative to their mean size"
                svgs[f"heatmap-{index}"] = (caption, _heat_map(f"heatmap-{index}", run.heat_map[1]))
    return svgs


_CURVES = {
    "train/loss": "Training loss of the pruned model: the weighted sum of its terms",
    "train/kl": "KL(dense ‖ pruned), nats per token",
    "train/cross_entropy": "Cross-entropy of the pruned model, nats per token",
    "train/cosine": "1 − cosine similarity of the final states of the dense and the pruned model",
    "train/entropy": "Entropy of the importance, nats per row or column",
    "train/lost_mass": "Lost mass: the share of the importance that the masks remove",
    "masks/flipped": "Share of mask entries that flipped at a refresh",
}


def _caption(metric: str) -> str:
    if metric.startswith("ppl/"):
        return f"Perplexity of the pruned model on {metric.removeprefix('ppl/')} while it learns"
    return _CURVES.get(metric, metric)


_LAYERS = {
    "sparsity": "Sparsity of each block's linears",
    "error": "Relative output error of the pruned linears, mean over a block",
    "kept_mass": "Kept mass: the share of saliency that the mask keeps, before and after rotation",
}


def line_plot(name: str, lines: Mapping[str, Curve], xlabel: str, ylabel: str) -> str:
    """An SVG element of labelled lines with a marker at each point, their heights on a logarithmic scale."""

    def draw(axes: Any) -> None:
        marks = zip(lines.items(), _cycle(len(lines)), _cycle(len(lines), _MARKERS), strict=True)
        for (label, points), colour, marker in marks:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))

    with matplotlib.rc_context(_STYLE):
        return _svg(name, draw)


def _curve(runs: Sequence[Run], metric: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for run, colour in zip(runs, _cycle(len(runs)), strict=True):
            if points := [point for point in run.curves.get(metric, []) if math.isfinite(point[1])]:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=run.label)
        axes.set(xlabel="step", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def _gap(runs: Sequence[Run], text: str) -> Callable[[Any], None]:
    names = list(dict.fromkeys(row["name"] for run in runs for row in run.results["rows"] if row["name"] != "dense"))

    def draw(axes: Any) -> None:
        for name, colour, marker in zip(names, _cycle(len(names)), _cycle(len(names), _MARKERS), strict=True):
            rows = [(run, row) for run in runs for row in run.results["rows"] if row["name"] == name]
            points = sorted((row["sparsity"], run.gap(row, text)) for run, row in rows)
            if points := [point for point in points if math.isfinite(point[1])]:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle="", label=name)
        axes.set(xlabel="sparsity of the decoder linears", ylabel="G (nats per token)")
        bottom, top = axes.get_ylim()
        bottom = min(0.0, bottom)
        axes.set_ylim(bottom, top + 0.05 * (top - bottom))  # room for whole markers
        axes.set_xlim(0, 1)

    return draw


def _layers(runs: Sequence[Run], key: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for run, colour in zip(runs, _cycle(len(runs)), strict=True):
            rows = [row for row in run.linears if row[key] is not None]
            if not rows:
                continue
            if key == "kept_mass":
                for basis, style in (("own", "--"), ("learned", "-")):
                    label = f"{run.label}, {'before' if basis == 'own' else 'after'}"
                    means = block_means(rows, lambda row, basis=basis: row[key][basis])  # type: ignore[misc]
                    axes.plot(
                        *zip(*means.items(), strict=True),
                        color=colour,
                        linestyle=style,
                        marker=".",
                        linewidth=1.2,
                        label=label,
                    )
            else:
                means = block_means(rows, lambda row: row[key])
                axes.plot(*zip(*means.items(), strict=True), color=colour, marker=".", label=run.label)
        axes.set(xlabel="decoder block", ylabel=key.replace("_", " "))
        if key == "sparsity":
            axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def _cycle(count: int, values: Sequence[str] = _SERIES) -> list[str]:
    return [values[index % len(values)] for index in range(count)]


def _svg(name: str, draw: Callable[[Any], None]) -> str:
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    if labels := axes.get_legend_handles_labels()[1]:
        # Some 74 letters go side by side, of which each entry's line and margin take eight.
        figure.legend(loc="outside upper left", ncols=min(3, max(1, 74 // (8 + max(map(len, labels))))))
    return _element(figure, name)


def _heat_map(name: str, maps: dict[str, Any]) -> str:
    figure = Figure((4.9, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    top = max(float(cells.quantile(0.995)) for cells in maps.values())
    for axes, basis, title in ((left, "own", "own basis"), (right, "learned", "learned basis")):
        image = axes.imshow(maps[basis].numpy(), vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set(title=title, xlabel="inputs", xticks=[], yticks=[])
        axes.grid(False)
    left.set_ylabel("outputs")
    figure.colorbar(image, ax=[left, right], shrink=0.9)
    return _element(figure, name)


def _element(figure: Any, name: str) -> str:
    """An `<svg>` whose ids are its own, without the prolog and the metadata, which name foreign addresses."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for drawn, shown in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg
