"""Where the linears of a model stand: its family's table, laid out over the decoder blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from rotpruner.errors import InputError
from rotpruner.families import LinearSpec, available_spaces, family_of


@dataclass(frozen=True)
class BlockLinear:
    """One linear of one decoder block, by its place in the model.

    Attributes:
        name: module path in the model.
        layer: index of the block.
        spec: its row in the family's table.
        group: name of the first linear that reads the same tensor.
        boundary: how many linears before it write the residual stream: where on its way it reads the stream, if it
            does; it writes at the next one.
    """

    name: str
    layer: int
    spec: LinearSpec
    group: str
    boundary: int

    @property
    def leads_group(self) -> bool:
        """Whether it is the one that statistics of its group are named after."""
        return self.name == self.group


def block_linears(config: Any) -> list[BlockLinear]:
    """Every decoder linear of a model, in data-flow order."""
    family = family_of(config)
    found: list[BlockLinear] = []
    boundary = 0
    for layer in range(config.num_hidden_layers):
        prefix = f"{family.blocks}.{layer}."
        first: dict[tuple[str, str | None], str] = {}
        for spec in family.linears:
            name = prefix + spec.path
            group = first.setdefault((spec.reads, spec.norm), name)
            found.append(BlockLinear(name, layer, spec, group, boundary))
            boundary += spec.writes == "residual"
    return found


def by_block(linears: Iterable[BlockLinear]) -> list[tuple[int, list[BlockLinear]]]:
    """(index of the block, its linears) of every block, in data-flow order."""
    return [(layer, list(members)) for layer, members in groupby(linears, key=lambda linear: linear.layer)]


def by_group(linears: Iterable[BlockLinear]) -> list[list[BlockLinear]]:
    """The linears, those that read the same tensor together, in data-flow order."""
    return [list(members) for _, members in groupby(linears, key=lambda linear: linear.group)]


class Sublayer(NamedTuple):
    """What lies between two boundaries of the residual stream: module paths inside the block.

    Attributes:
        norm: that reads the stream.
        writer: the linear that writes it.
    """

    norm: str
    writer: str


def residual_sublayers(config: Any) -> list[Sublayer]:
    """The sublayers of each block, in data-flow order."""
    found, norm = [], ""
    for spec in family_of(config).linears:
        norm = spec.norm or norm
        if spec.writes == "residual":
            found.append(Sublayer(norm, spec.path))
    return found


def residual_boundaries(config: Any) -> int:
    """Places where the residual stream may be in a basis of its own: before, between and after all sublayers."""
    return 1 + config.num_hidden_layers * len(residual_sublayers(config))


def module_at(model: nn.Module, path: str) -> Any:
    """`get_submodule`, typed as `Any`: the table, not the type checker, knows what the module has."""
    return model.get_submodule(path)


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder linears of a model, by name, in data-flow order."""
    return {linear.name: module_at(model, linear.name) for linear in block_linears(model.config)}


def check_described(model: nn.Module) -> None:
    """Raise `InputError` if the table of a model's family names a module that the model does not have."""
    config: Any = model.config
    family = family_of(config)
    ends = [*family.embeddings, family.blocks, family.head]
    if "residual" in available_spaces(config):  # only where the stream rotates is there anything to fold
        ends.append(family.final_norm)
    norms = [f"{family.blocks}.{place.layer}.{place.spec.norm}" for place in block_linears(config) if place.spec.norm]
    try:
        for path in [*ends, *norms, *(place.name for place in block_linears(config))]:
            module_at(model, path)
    except AttributeError as error:
        raise InputError(
            f"the family table of {config.model_type} does not describe this model: {error}; mend the table"
        ) from None
