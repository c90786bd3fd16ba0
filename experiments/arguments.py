"""Arguments of the one-shot commands: errors in one line, results on standard output, the rest on standard error."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import torch

from rotpruner.artifacts import to_json
from rotpruner.errors import InputError


class Parser(argparse.ArgumentParser):
    """`argparse` whose errors are `InputError`s."""

    def __init__(self, command: str, description: str, prints_json: bool = True) -> None:
        super().__init__(
            prog=f"python -m experiments {command}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        if prints_json:
            self.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def at_least(minimum: int) -> Any:
    """An `argparse` type: integers not below a minimum."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {minimum} or more")
        return value

    return integer


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, a `torch.device`."""
    parser.add_argument(
        "--device", type=_device, default="auto", help="where to compute; auto is a GPU if there is one"
    )


def _device(text: str) -> torch.device:
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
        return torch.empty(0, device=name).device  # of the number that models say they are on
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"device '{text}' cannot be used here: {str(error).splitlines()[0]}") from None


def report(result: dict[str, Any], as_json: bool) -> None:
    """Print a command's result, for programs or for people."""
    if as_json:
        print(to_json(result))
        return
    _print("", result)


def _print(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _print(f"{name} {key}".strip(), item)
    else:
        shown = f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
        print(f"{name} {shown}".encode(errors="backslashreplace").decode())
