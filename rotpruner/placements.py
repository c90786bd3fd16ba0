"""Where rotations stand in a model, and of which shape they are, as its config says.

The residual stream has boundaries: in front of the first sublayer (attention or MLP), between two, after the last.
Its matrices, of which a placement says how many there are, are shared out evenly among neighbouring boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rotpruner.errors import InputError
from rotpruner.families import check_space
from rotpruner.layout import residual_boundaries
from rotpruner.shortcuts import check_exportable

#: How many matrices the residual stream has: one; one a decoder block and one for the end; one a boundary (2L + 1, the
#: paper's placement); or that many.
Placement = Literal["shared", "per_layer", "per_block"] | int


def head_dim(config: Any) -> int:
    """Width of one attention head; it need not be hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(config: Any) -> int:
    """How many heads of values, and of keys, a layer has."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def mlp_width(config: Any) -> int:
    """How many features an MLP has between its linears."""
    return getattr(config, "intermediate_size", None) or config.ffn_dim


def turns(space: str) -> bool:
    """Whether a space has rotations that can be learned; the features of `mlp` can only change places."""
    return space != "mlp"


def residual_sites(config: Any, placement: Placement) -> int:
    """How many matrices a placement gives the residual stream.

    Raises:
        InputError: no such placement in this model.
    """
    boundaries = residual_boundaries(config)
    named = {"shared": 1, "per_layer": config.num_hidden_layers + 1, "per_block": boundaries}
    sites = named.get(placement, placement) if isinstance(placement, str) else placement
    if not isinstance(sites, int) or not 1 <= sites <= boundaries:
        raise InputError(
            f"placement '{placement}' is not one of {', '.join(named)} nor a number of matrices up to {boundaries}"
        )
    return sites


def site_at(boundary: int, sites: int, boundaries: int) -> int:
    """Which of the residual stream's `sites` matrices a boundary has: neighbours share them evenly."""
    return boundary * sites // boundaries


def basis_changes(config: Any, sites: int) -> list[int]:
    """The numbers of the sublayers after which the residual stream is in another of its `sites` bases."""
    boundaries = residual_boundaries(config)
    return [
        number
        for number in range(boundaries - 1)
        if site_at(number, sites, boundaries) != site_at(number + 1, sites, boundaries)
    ]


def space_shape(config: Any, space: str, placement: Placement = "shared") -> tuple[int, int, int]:
    """(sites, blocks, n) of a space's rotation; `placement` counts for the residual stream only.

    Raises:
        InputError: the model has no such space.
    """
    check_space(config, space)
    assert turns(space), "orders have no blocks"
    if space == "residual":
        return residual_sites(config, placement), 1, config.hidden_size
    return config.num_hidden_layers, key_value_heads(config), head_dim(config)


def rotation_shape(config: Any, space: str, placement: Placement = "shared") -> tuple[int, ...]:
    """Of what a `RotationSet` holds for a space."""
    check_space(config, space)
    if not turns(space):
        return config.num_hidden_layers, mlp_width(config)
    sites, blocks, n = space_shape(config, space, placement)
    return sites, blocks, n, n


def check_placement(config: Any, placement: Placement, spaces: Sequence[str]) -> None:
    """Raise `InputError` if a placement does not go with the spaces that rotate, or with the model of a config."""
    if placement not in ("shared", 1) and "residual" not in spaces:
        raise InputError(
            f"placement {placement} concerns the residual stream, but spaces are {list(spaces)}; add residual"
        )
    if "residual" in spaces and basis_changes(config, residual_sites(config, placement)):
        check_exportable(config)
