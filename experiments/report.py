"""`python -m experiments report`: one self-contained HTML page about finished runs, and its plots as SVG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from callbacks.terminal import console
from experiments.arguments import Parser, report
from experiments.report_page import alone, page
from experiments.report_plots import figures
from experiments.report_runs import read_runs
from rotpruner.artifacts import write_text
from rotpruner.errors import InputError


def main(arguments: list[str]) -> None:
    """Print `{"output", "plots": [paths], "runs": [labels]}` after writing the page and the plots beside it."""
    parser = Parser("report", "Write one HTML page that compares finished runs, and its plots as SVG files beside it.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directory of a fit or recovery that has ended"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write; replaced if it exists")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".html" or options.output.is_dir():
        raise InputError(f"output '{options.output}' is not the name of an HTML page; let it end in .html")

    runs = read_runs(options.runs)
    drawn = figures(runs)
    plots = options.output.with_name(f"{options.output.stem}_plots")
    paths = []
    for name, (_, svg) in drawn.items():
        paths.append(plots / f"{name}.svg")
        write_text(alone(svg), paths[-1])
    write_text(page(runs, drawn), options.output)
    console.print(f"{len(paths)} plots in {plots}")
    result: dict[str, Any] = {"output": str(options.output)}
    if options.json:
        result |= {"plots": [str(path) for path in paths], "runs": [run.label for run in runs]}
    report(result, options.json)
