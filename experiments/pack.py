"""`python -m experiments pack`: store a pruned model as the values that stay and one bit a place."""

from __future__ import annotations

from pathlib import Path

from experiments.arguments import Parser, report
from rotpruner.packed import pack


def main(arguments: list[str]) -> None:
    """Print `{"output", "weights", "dense_bytes", "packed_bytes", "ratio"}` after writing a packed checkpoint."""
    parser = Parser("pack", "Write a packed copy of an exported model; rotpruner.load and --model take it as it is.")
    parser.add_argument("--model", required=True, type=Path, help="directory of an exported model")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist yet")
    options = parser.parse_args(arguments)
    report(pack(options.model, options.output), options.json)
