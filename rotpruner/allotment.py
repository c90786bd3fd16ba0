"""Which pattern each decoder linear gets: one for all, shared out unevenly over the blocks, and exceptions by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from rotpruner.errors import InputError
from rotpruner.layout import block_linears
from rotpruner.owl import outlier_sparsities
from rotpruner.patterns import Pattern, Scope, Slice, Unstructured, parse_pattern

LayerSparsity = Literal["uniform", "owl"]


def parse_exceptions(given: Mapping[str, str | float], scope: Scope = "row") -> dict[str, Pattern]:
    """Patterns of linears whose names match, as in `{"*.down_proj": "4:8", "model.layers.0.*": 0.0}`.

    Args:
        given: shell-style patterns of module paths, and what `parse_pattern` reads; a sparsity of 0 leaves linears
            dense.
        scope: where unstructured sparsities are counted.

    Raises:
        InputError: one of them is no pattern of a linear.
    """
    found = {}
    for names, text in given.items():
        pattern = parse_pattern(text, scope)
        if isinstance(pattern, Slice):
            raise InputError(f"exception {names}: {pattern} is of the residual stream, not of single linears; give N:M")
        found[names] = pattern
    return found


def allot(config: Any, blocks: Pattern | Sequence[Pattern], exceptions: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The pattern of every decoder linear by name: its block's, or that of the last exception that matches.

    Args:
        config: of the model.
        blocks: one pattern for all, or one a block.
        exceptions: by shell-style patterns of names.

    Raises:
        InputError: an exception matches no linear, or nothing is left to prune where something was.
    """
    places = block_linears(config)
    if isinstance(blocks, Pattern):
        found = dict.fromkeys((place.name for place in places), blocks)
    else:
        found = {place.name: blocks[place.layer] for place in places}
    for names, pattern in exceptions.items():
        matching = [name for name in found if fnmatchcase(name, names)]
        if not matching:
            raise InputError(f"exception '{names}' matches no decoder linear; a name of one is {next(iter(found))}")
        found |= dict.fromkeys(matching, pattern)
    if exceptions and not any(pattern.sparsity for pattern in found.values()):
        raise InputError(f"the exceptions {', '.join(exceptions)} leave no linear to prune; except fewer")
    return found


def described(pattern: Pattern | Slice, exceptions: Mapping[str, Pattern]) -> str:
    """A pattern and its exceptions in words, as `2:4 (*.v_proj 0)`."""
    excepted = ", ".join(f"{names} {other}" for names, other in exceptions.items())
    return f"{pattern} ({excepted})" if excepted else str(pattern)


def check_allotment(pattern: Pattern | Slice, layer_sparsity: str, exceptions: Mapping[str, Pattern]) -> None:
    """Raise `InputError` if a pattern cannot be shared out like that."""
    if layer_sparsity not in get_args(LayerSparsity):
        raise InputError(
            f"unknown layer_sparsity '{layer_sparsity}'; choose one of {', '.join(get_args(LayerSparsity))}"
        )
    if layer_sparsity == "owl":
        if not isinstance(pattern, Unstructured):
            raise InputError(f"layer_sparsity owl needs an unstructured pattern such as 0.5, not '{pattern}'")
        outlier_sparsities([], pattern.sparsity)
    if exceptions and isinstance(pattern, Slice):
        raise InputError(
            f"pattern {pattern} narrows all linears alike: leave out the exceptions {', '.join(exceptions)}"
        )
