"""`python -m experiments unpack`: the ordinary checkpoint that was packed."""

from __future__ import annotations

from pathlib import Path

from experiments.arguments import Parser, report
from rotpruner.packed import unpack


def main(arguments: list[str]) -> None:
    """Print `{"output", "weights"}` after writing a checkpoint that plain transformers loads."""
    parser = Parser("unpack", "Write the ordinary checkpoint that was packed; plain transformers loads it.")
    parser.add_argument("--model", required=True, type=Path, help="directory of a packed model")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist yet")
    options = parser.parse_args(arguments)
    report(unpack(options.model, options.output), options.json)
