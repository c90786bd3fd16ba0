"""What a person sees: progress bars and result tables, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import track as rich_track
from rich.table import Table

T = TypeVar("T")

#: Standard output belongs to `--json`. Names of files may look like markup.
console = Console(stderr=True, markup=False)


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar."""
    return rich_track(items, description=f"{description:<28}", console=console)


class ResultsTable:
    """The rows of a `results.json` in one table, or in two where the terminal is too narrow for it.

    No number is broken; long names of texts are.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        rows, texts = results["rows"], list(results["rows"][0]["ppl"])
        self._names = {"": [row["name"] for row in rows]}
        self._texts = {text: [_perplexity(row["ppl"][text]) for row in rows] for text in texts}
        self._zeros = {
            "pattern": [row["pattern"] or "" for row in rows],
            "sparsity": [f"{row['sparsity']:.4f}" for row in rows],
        }
        self._costs = {
            "parameters": [f"{row['parameters'] / 1e6:.1f} M" for row in rows],
            "online FLOPs": [f"{row.get('online_flops', 0) / 1e6:.1f} M" for row in rows],
            "seconds": [f"{row['seconds']:.0f}" for row in rows],
        }
        if not any(row.get("online_flops") for row in rows):
            del self._costs["online FLOPs"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = self._table("perplexity", self._names | self._zeros | self._texts | self._costs)
        if Measurement.get(console, options.update(max_width=sys.maxsize), whole).minimum <= options.max_width:
            yield whole
        else:
            yield self._table("perplexity", self._names | self._texts)
            yield self._table("models", self._names | self._zeros | self._costs)

    def _table(self, title: str, columns: Mapping[str, list[str]]) -> Table:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column, cells in columns.items():
            justify: Literal["left", "right"] = "left" if column in ("", "pattern") else "right"
            width = max(map(len, cells))
            table.add_column(
                column, justify=justify, overflow="fold", min_width=width, no_wrap=column not in self._texts
            )
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        return table


def _perplexity(value: float) -> str:
    """Two decimals, or none where they say nothing."""
    return f"{value:.2f}" if value < 10_000 else f"{value:,.0f}"
