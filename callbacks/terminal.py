"""What a person sees: progress bars and result tables, on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

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
    """The rows of a `results.json` as a table."""
    texts = list(results["rows"][0]["ppl"])
    table = Table(title="perplexity" if len(texts) == 1 else None)
    for column in ("", "pattern", "sparsity", *texts, "parameters", "online FLOPs", "seconds"):
        table.add_column(column, justify="left" if column in ("", "pattern") else "right")
    for row in results["rows"]:
        table.add_row(
            row["name"],
            row["pattern"] or "",
            f"{row['sparsity']:.4f}",
            *(f"{row['ppl'][text]:.2f}" for text in texts),
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row.get('online_flops', 0) / 1e6:.1f} M",
            f"{row['seconds']:.0f}",
        )
    return table
