"""One rotation per space of a model: which orthogonal matrix each linear reads and writes.

A set of rotations is a plain `dict[str, Tensor]` from the name of a space to its blocks (S, B, n, n):
`residual` (1, 1, d, d), shared by the whole stream, and `value_heads` (layers, KV heads, head_dim, head_dim).
Spaces that are not in it stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import BlockLinear, block_linears, check_space, family_of
from rotpruner.fusion import fuse_norms
from rotpruner.orthogonal import (
    MapName,
    OrthogonalMatrices,
    random_orthogonal,
    rotate_bias,
    rotate_features,
    rotate_weight,
)

RotationSet = dict[str, Tensor]
Start = Literal["identity", "random"]


def head_dim(config: Any) -> int:
    """Width of one attention head; it need not be hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def space_shape(config: Any, space: str) -> tuple[int, int, int]:
    """(sites, blocks, n) of a space's rotation.

    Raises:
        InputError: the model has no such space.
    """
    check_space(config, space)
    if space == "residual":
        return 1, 1, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim(config)


def random_rotations(config: Any, spaces: Iterable[str], seed: int) -> RotationSet:
    """Haar-distributed rotations of the named spaces, float32; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {space: random_orthogonal(*space_shape(config, space), generator) for space in spaces}


class LearnedRotations(nn.Module):
    """The learnable rotations of a model; calling it gives the `RotationSet` of the moment.

    Args:
        config: of the model.
        spaces: names of the spaces to rotate.
        map_name: how orthogonal matrices are parametrised.
        start: `identity`, or `random` with `seed`.
    """

    def __init__(
        self,
        config: Any,
        spaces: Iterable[str] = ("residual", "value_heads"),
        map_name: MapName = "cayley",
        start: Start = "identity",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if start not in get_args(Start):
            raise InputError(f"unknown start '{start}'; choose one of {', '.join(get_args(Start))}")
        self.spaces = nn.ModuleDict(
            {space: OrthogonalMatrices(*space_shape(config, space), map_name) for space in spaces}
        )
        if start == "random":
            self.restart(random_rotations(config, self.spaces, seed))

    def forward(self) -> RotationSet:
        return {space: matrices() for space, matrices in self.spaces.items()}

    def restart(self, rotations: Mapping[str, Tensor]) -> None:
        """Start again from given rotations of the same spaces.

        Raises:
            InputError: the spaces or their shapes differ.
        """
        if set(rotations) != set(self.spaces):
            raise InputError(
                f"the rotations are of the spaces {sorted(rotations)}, but {sorted(self.spaces)} are to be learned"
            )
        for space, matrices in self.spaces.items():
            if rotations[space].shape != matrices.start.shape:  # type: ignore[union-attr]
                raise InputError(
                    f"the rotations of '{space}' have shape {tuple(rotations[space].shape)}, but this model "
                    f"needs {tuple(matrices.start.shape)}; they were learned on another model"  # type: ignore
                )
            matrices.restart(rotations[space])  # type: ignore[operator]


def at_site(rotations: Mapping[str, Tensor], space: str, layer: int) -> Tensor | None:
    """The blocks (B, n, n) that act in a space at a layer; None where nothing rotates."""
    if space not in rotations:
        return None
    sites = rotations[space]
    return sites[layer] if len(sites) > 1 else sites[0]


def sides(rotations: Mapping[str, Tensor], linear: BlockLinear) -> tuple[Tensor | None, Tensor | None]:
    """What a decoder linear reads and writes: (Q_A, Q_B)."""
    return (
        at_site(rotations, linear.spec.reads, linear.layer),
        at_site(rotations, linear.spec.writes, linear.layer),
    )


@torch.no_grad()
def merge_rotations(model: nn.Module, rotations: Mapping[str, Tensor]) -> None:
    """Move a plain model into the rotated basis, in place; it computes the same function.

    Fuses norms if the residual stream rotates. Products are taken in float64 and rounded once.
    """
    rotations = {space: Q.double() for space, Q in rotations.items()}
    family = family_of(model.config)
    if "residual" in rotations:
        fuse_norms(model)
    for linear in block_linears(model.config):
        module = model.get_submodule(linear.name)
        reads, writes = sides(rotations, linear)
        module.weight.copy_(rotate_weight(module.weight.double(), reads, writes))
        if module.bias is not None:
            module.bias.copy_(rotate_bias(module.bias.double(), writes))
    residual = at_site(rotations, "residual", 0)
    if residual is not None:
        for path in (*family.embeddings, family.head):
            weight = model.get_submodule(path).weight
            weight.copy_(rotate_features(weight.double(), residual))
