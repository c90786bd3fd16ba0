"""One rotation per space of a model: which orthogonal matrix each linear reads and writes.

A set of rotations is a plain `dict[str, Tensor]` from the name of a space to its blocks (S, B, n, n):
`residual` (1, 1, d, d), shared by the whole stream; `value_heads` and `query_key`, each (layers, KV heads,
head_dim, head_dim). Spaces that are not in it stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import BlockLinear, block_linears, check_space, family_of, module_at
from rotpruner.fusion import fuse_norms, norm_bias
from rotpruner.orthogonal import (
    Constraint,
    MapName,
    OrthogonalMatrices,
    constraint_error,
    orthogonality_error,
    random_orthogonal,
    rotate_bias,
    rotate_features,
    rotate_weight,
)

RotationSet = dict[str, Tensor]
Start = Literal["identity", "random", "pca"]

_TOLERANCE = 1e-3  # of QᵀQ = I and of constraints; learned float32 rotations are within 1e-5


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


def space_constraint(config: Any, space: str) -> Constraint:
    """Which rotations of a space leave the model's function alone."""
    return family_of(config).constraints.get(space, "none")


def check_rotation(config: Any, space: str, Q: Tensor) -> None:
    """Raise `InputError` unless Q (S, B, n, n) is a rotation of this space of this model."""
    sites, blocks, n = space_shape(config, space)
    if Q.shape != (sites, blocks, n, n):
        raise InputError(
            f"the rotations of '{space}' have shape {tuple(Q.shape)}, but this model needs "
            f"{(sites, blocks, n, n)}; they were learned on another model"
        )
    if not torch.isfinite(Q).all() or orthogonality_error(Q) > _TOLERANCE:
        raise InputError(f"the rotations of '{space}' are not orthogonal; learn or save them again")
    constraint = space_constraint(config, space)
    if constraint_error(Q, constraint) > _TOLERANCE:
        raise InputError(
            f"the rotations of '{space}' would change what this {config.model_type} model computes "
            f"(they miss the constraint '{constraint}'); learn them on this model"
        )


def random_rotations(config: Any, spaces: Iterable[str], seed: int, dtype: torch.dtype = torch.float32) -> RotationSet:
    """Haar-distributed rotations of the named spaces; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        space: random_orthogonal(*space_shape(config, space), generator, space_constraint(config, space), dtype)
        for space in spaces
    }


class LearnedRotations(nn.Module):
    """The learnable rotations of a model; calling it gives the `RotationSet` of the moment.

    Args:
        config: of the model.
        spaces: names of the spaces to rotate.
        map_name: how orthogonal matrices are parametrised.
        start: `identity`, `random` with `seed`, or `pca`: identity until `RotatedModel.start_from_pca`.
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
        self.config = config
        if start == "pca" and "residual" not in spaces:
            raise InputError(f"start pca turns the residual stream, but spaces are {list(spaces)}; add 'residual'")
        self.spaces = nn.ModuleDict(
            {
                space: OrthogonalMatrices(*space_shape(config, space), map_name, space_constraint(config, space))
                for space in spaces
            }
        )
        if start == "random":
            self.restart(random_rotations(config, self.spaces, seed))

    def forward(self) -> RotationSet:
        return {space: matrices() for space, matrices in self.spaces.items()}

    def restart(self, rotations: Mapping[str, Tensor]) -> None:
        """Start again from given rotations of the same spaces.

        Raises:
            InputError: the spaces differ, or what is given for one is not a rotation of it.
        """
        if set(rotations) != set(self.spaces):
            raise InputError(
                f"the rotations are of the spaces {sorted(rotations)}, but {sorted(self.spaces)} are to be learned"
            )
        for space, matrices in self.spaces.items():
            check_rotation(self.config, space, rotations[space])
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

    Raises:
        InputError: they are not rotations of this model; it is as it was.
    """
    for space, Q in rotations.items():
        check_rotation(model.config, space, Q)
    rotations = {space: Q.double() for space, Q in rotations.items()}
    family = family_of(model.config)
    if "residual" in rotations:
        fuse_norms(model)
    for linear in block_linears(model.config):
        module = module_at(model, linear.name)
        reads, writes = sides(rotations, linear)
        module.weight.copy_(rotate_weight(module.weight.double(), reads, writes))
        if module.bias is not None:
            module.bias.copy_(rotate_bias(module.bias.double(), writes))
    residual = at_site(rotations, "residual", 0)
    if residual is not None:
        ends = [module_at(model, path).weight for path in (*family.embeddings, family.head)]
        bias = norm_bias(module_at(model, family.final_norm))
        for features in ends if bias is None else [*ends, bias]:
            features.copy_(rotate_features(features.double(), residual))
