"""What a person sees: progress bars and result tables, on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track as rich_track
from rich.table import Table

T = TypeVar("T")

#: Standard output belongs to `--json`. Names of files may look like markup.
console = Console(stderr=True, markup=False)


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar."""
    return rich_track(items, description=f"{description:<28}", console=console)


def results_table(results: Mapping[str, Any]) -> Table:
    """The rows of a `results.json` as a table, which at 80 columns has two texts; long names of texts are broken."""
    rows, texts = results["rows"], list(results["rows"][0]["ppl"])
    columns: dict[str, list[str]] = {
        "": [row["name"] for row in rows],
        "pattern": [row["pattern"] or "" for row in rows],
        "sparsity": [f"{row['sparsity']:.4f}" for row in rows],
        **{text: [_perplexity(row["ppl"][text]) for row in rows] for text in texts},
        "parameters": [f"{row['parameters'] / 1e6:.1f} M" for row in rows],
        "online FLOPs": [f"{row.get('online_flops', 0) / 1e6:.1f} M" for row in rows],
        "seconds": [f"{row['seconds']:.0f}" for row in rows],
    }
    if not any(row.get("online_flops") for row in rows):
        del columns["online FLOPs"]
    table = Table(title="perplexity", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in ("", "pattern") else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in texts)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _perplexity(value: float) -> str:
    """Two decimals, or none where they say nothing."""
    return f"{value:.2f}" if value < 10_000 else f"{value:,.0f}"
