"""Which pattern each decoder linear gets: one for all, shared out unevenly over the blocks, and exceptions by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, get_args

from rotpruner.errors import InputError
from rotpruner.layout import block_linears
from rotpruner.owl import outlier_sparsities
from rotpruner.patterns import Pattern, Scope, Slice, Unstructured, parse_pattern

LayerSparsity = Literal["uniform", "owl"]


@dataclass(frozen=True)
class Allotment:
    """What is taken from a model: a pattern, how its blocks share that, and linears that get another one.

    Attributes:
        pattern: of all blocks together.
        layer_sparsity: `uniform`, or `owl` to let blocks with many outliers keep more (unstructured patterns only).
        exceptions: patterns of the decoder linears whose names match shell-style ones, the last match counts.

    Raises:
        InputError: the pattern cannot be shared out like that.
    """

    pattern: Pattern | Slice
    layer_sparsity: LayerSparsity = "uniform"
    exceptions: Mapping[str, Pattern] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.layer_sparsity not in get_args(LayerSparsity):
            raise InputError(
                f"unknown layer_sparsity '{self.layer_sparsity}'; choose one of {', '.join(get_args(LayerSparsity))}"
            )
        if self.layer_sparsity == "owl":
            if not isinstance(self.pattern, Unstructured):
                raise InputError(f"layer_sparsity owl needs an unstructured pattern such as 0.5, not '{self.pattern}'")
            outlier_sparsities([], self.pattern.sparsity)
        if self.exceptions and isinstance(self.pattern, Slice):
            raise InputError(
                f"pattern {self.pattern} narrows all linears alike: leave out the exceptions "
                f"{', '.join(self.exceptions)}"
            )

    @classmethod
    def of(cls, given: Pattern | Slice | Allotment) -> Allotment:
        """A pattern for all linears alike, or what is an allotment already."""
        return given if isinstance(given, Allotment) else cls(given)

    @classmethod
    def parse(
        cls,
        pattern: str | float,
        layer_sparsity: LayerSparsity = "uniform",
        exceptions: Mapping[str, str | float] = MappingProxyType({}),
        scope: Scope = "row",
    ) -> Allotment:
        """As users write it.

        Args:
            pattern: what `parse_pattern` reads.
            layer_sparsity: see above.
            exceptions: what `parse_exceptions` reads.
            scope: where unstructured sparsities are counted.

        Raises:
            InputError: one of them is no pattern, or they do not go together.
        """
        allotment = cls(parse_pattern(pattern, scope), layer_sparsity, parse_exceptions(exceptions, scope))
        given = [allotment.pattern, *(other for other in allotment.exceptions.values() if other.sparsity)]
        if scope != "row" and not any(isinstance(pattern, Unstructured) for pattern in given):
            raise InputError(
                f"scope says where a sparsity is counted, and pattern {allotment} has none: leave scope {scope} out"
            )
        return allotment

    @property
    def prunes(self) -> bool:
        """Whether single weights may be taken."""
        return isinstance(self.pattern, Pattern) and bool(self.pattern.sparsity or self.exceptions)

    def in_words(self) -> dict[str, Any]:
        """Its three parts as they are written, by the names that a model card has for them."""
        exceptions = {names: str(pattern) for names, pattern in self.exceptions.items()}
        return {"pattern": str(self.pattern), "layer_sparsity": self.layer_sparsity, "exceptions": exceptions}

    def __str__(self) -> str:
        """Pattern and exceptions, as `2:4 (*.v_proj 0)`."""
        excepted = ", ".join(f"{names} {other}" for names, other in self.exceptions.items())
        return f"{self.pattern} ({excepted})" if excepted else str(self.pattern)


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
