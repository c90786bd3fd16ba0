"""One rotation per space of a model: which orthogonal matrix each linear reads and writes.

A set of rotations is a plain `dict[str, Tensor]` from the name of a space to its blocks (S, B, n, n):
`residual` (S, 1, d, d); `value_heads` and `query_key`, each (layers, KV heads, head_dim, head_dim); and to the orders
`mlp` (layers, intermediate size) int64. Spaces that are not in it stay as they are.

One matrix for the whole residual stream merges away completely; where neighbouring boundaries (`rotpruner.placements`)
differ, the residual connection between them carries QᵢᵀQᵢ₊₁ at run time (the paper's shortcuts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.fusion import check_foldable, final_bias, folded, folded_head, reset_block_norms, reset_final_norm, untie
from rotpruner.layout import BlockLinear, block_linears, by_block, module_at, residual_boundaries
from rotpruner.orthogonal import (
    Constraint,
    MapName,
    OrthogonalMatrices,
    constraint_error,
    is_order,
    orthogonality_error,
    random_orthogonal,
    rotate_bias,
    rotate_features,
    rotate_weight,
)
from rotpruner.patterns import NM, Pattern, Slice
from rotpruner.placements import Placement, basis_changes, rotation_shape, site_at, space_shape, turns
from rotpruner.replay import visiting
from rotpruner.shortcuts import insert_shortcuts
from rotpruner.statistics import Moment

RotationSet = dict[str, Tensor]

#: The same, or unbound along the first dimension.
Sites = Mapping[str, Tensor | Sequence[Tensor]]
Start = Literal["identity", "random", "pca", "permutation"]

_TOLERANCE = 1e-3  # of QᵀQ = I and of constraints; learned float32 rotations are within 1e-5


def check_start(start: str | None, spaces: Sequence[str], pattern: Pattern | Slice) -> None:
    """Raise `InputError` if a start does not go with the spaces that rotate, or with the pattern.

    None stands for rotations that are given, which go with all spaces.
    """
    _check_start_name(start or "identity")
    if "mlp" in spaces and start in ("identity", "pca", "permutation") and not isinstance(pattern, NM):
        raise InputError(
            f"space mlp admits only permutations, which help groups of N:M, and pattern {pattern} has none: "
            "leave mlp out"
        )
    if start == "pca" and "residual" not in spaces:
        raise InputError(f"start pca turns the residual stream, but spaces are {list(spaces)}; add residual")
    if start == "permutation" and not isinstance(pattern, NM):
        raise InputError(f"start permutation helps groups of N:M, and pattern {pattern} has none; use identity")
    if "mlp" in spaces and start in ("identity", "pca"):
        raise InputError(
            f"space mlp admits only permutations, and start {start} does not permute: "
            "set start to permutation, or leave mlp out"
        )
    if not any(turns(space) for space in spaces):
        raise InputError(f"none of the spaces {list(spaces)} has rotations to learn; add residual or value_heads")


def _check_start_name(start: str) -> None:
    if start not in get_args(Start):
        raise InputError(f"unknown start '{start}'; choose one of {', '.join(get_args(Start))}")


def space_constraint(config: Any, space: str) -> Constraint:
    """Which rotations of a space leave the model's function alone."""
    return family_of(config).constraints.get(space, "none")


def check_rotation(config: Any, space: str, Q: Tensor) -> None:
    """Raise `InputError` unless Q, (S, B, n, n) or an order, is a rotation of this space of this model."""
    several = space == "residual" and 1 < len(Q) <= residual_boundaries(config)
    shape = rotation_shape(config, space, len(Q) if several else "shared")
    if Q.shape != shape or is_order(Q) == turns(space):
        raise InputError(
            f"the rotations of '{space}' have shape {tuple(Q.shape)}, but this model needs "
            f"{shape}; they were learned on another model"
        )
    if not torch.isfinite(Q).all() or orthogonality_error(Q) > _TOLERANCE:
        raise InputError(
            f"the rotations of '{space}' are not orthogonal: the largest entry of |QᵀQ − I| is "
            f"{orthogonality_error(Q):.1g}, above {_TOLERANCE:.0g}; learn or save them again"
        )
    constraint = space_constraint(config, space)
    if constraint_error(Q, constraint) > _TOLERANCE:
        raise InputError(
            f"the rotations of '{space}' would change what this {config.model_type} model computes "
            f"(they miss the constraint '{constraint}'); learn them on this model"
        )


def check_continues(rotations: Mapping[str, Tensor], spaces: Collection[str], sites: int) -> None:
    """Raise `InputError` unless these spaces, `sites` matrices of the residual one, can be learned from there on."""
    if set(rotations) != set(spaces):
        raise InputError(
            f"the rotations are of the spaces {sorted(rotations)}, but {sorted(spaces)} are to be learned; "
            "set spaces to those"
        )
    given = len(rotations["residual"]) if "residual" in rotations else 0
    if given > sites:
        raise InputError(
            f"the rotations have {given} matrices of the residual stream, but {sites} are to be learned; "
            f"set placement to {given}"
        )


def check_same_bases(config: Any, given: int, own: int) -> None:
    """Raise `InputError` unless `given` matrices of the residual stream, shared out to `own`, stay at their boundaries.

    A start may be any rotation; but a mask that was chosen in one basis says nothing in another.
    """
    boundaries = residual_boundaries(config)
    sites = [site_at(boundary, own, boundaries) for boundary in range(boundaries)]
    if any(
        site_at(own_site, given, own) != site_at(boundary, given, boundaries) for boundary, own_site in enumerate(sites)
    ):
        raise InputError(
            f"the weights were pruned in {given} bases of the residual stream, and {own} matrices change it at other "
            f"places: set placement to {given}, or to per_block"
        )


def random_rotations(
    config: Any,
    spaces: Iterable[str],
    seed: int,
    dtype: torch.dtype = torch.float32,
    placement: Placement = "shared",
) -> RotationSet:
    """Haar-distributed rotations of the named spaces; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(space: str) -> Tensor:
        if turns(space):
            shape, constraint = space_shape(config, space, placement), space_constraint(config, space)
            return random_orthogonal(*shape, generator, constraint, dtype)
        layers, n = rotation_shape(config, space)
        return torch.stack([torch.randperm(n, generator=generator, device=generator.device) for _ in range(layers)])

    return {space: drawn(space) for space in spaces}


class LearnedRotations(nn.Module):
    """The learnable rotations of a model; calling it gives the current `RotationSet`.

    The order of `mlp` is chosen where learning starts, and stays.

    Args:
        config: of the model.
        spaces: names of the spaces to rotate.
        map_name: how orthogonal matrices are parametrised.
        start: `identity`, `random` with `seed`; `pca` and `permutation`: identity until
            `RotatedModel.start_from_statistics`.
        placement: of the residual stream's matrices.

    Raises:
        InputError: an unknown start, map or placement, or a space that the model does not have.
    """

    def __init__(
        self,
        config: Any,
        spaces: Collection[str] = ("residual", "value_heads"),
        map_name: MapName = "cayley",
        start: Start = "identity",
        seed: int = 0,
        placement: Placement = "shared",
    ) -> None:
        super().__init__()
        _check_start_name(start)
        self.config = config
        self.spaces = nn.ModuleDict(
            {
                space: OrthogonalMatrices(
                    *space_shape(config, space, placement), map_name, space_constraint(config, space)
                )
                for space in spaces
                if turns(space)
            }
        )
        order = None
        if "mlp" in spaces:
            layers, n = rotation_shape(config, "mlp")
            order = torch.arange(n).repeat(layers, 1)
        self.order: Tensor | None
        self.register_buffer("order", order)
        if start == "random":
            self.restart(random_rotations(config, spaces, seed, placement=placement))

    @property
    def sites(self) -> int:
        """How many matrices the residual stream has, 0 if it does not rotate."""
        return len(self.spaces["residual"].start) if "residual" in self.spaces else 0  # type: ignore[arg-type]

    def forward(self) -> RotationSet:
        rotations = {space: matrices() for space, matrices in self.spaces.items()}
        return rotations if self.order is None else {**rotations, "mlp": self.order}

    @torch.no_grad()
    def started(self) -> RotationSet:
        """Where learning started."""
        rotations = {space: matrices.start.clone() for space, matrices in self.spaces.items()}  # type: ignore[operator]
        return rotations if self.order is None else {**rotations, "mlp": self.order}

    def restart(self, rotations: Mapping[str, Tensor]) -> None:
        """Start again from given rotations of the same spaces; fewer matrices of the residual stream are shared out.

        Raises:
            InputError: as `check_continues`, or what is given for a space is not a rotation of it.
        """
        check_continues(rotations, [*self.spaces, *(() if self.order is None else ("mlp",))], self.sites)
        if self.order is not None:
            check_rotation(self.config, "mlp", rotations["mlp"])
            self.order.copy_(rotations["mlp"])
        for space, matrices in self.spaces.items():
            check_rotation(self.config, space, rotations[space])
            given, own = rotations[space], len(matrices.start)  # type: ignore[arg-type]
            shared = [site_at(boundary, len(given), own) for boundary in range(own)]
            matrices.restart(given[shared] if len(given) < own else given)  # type: ignore[operator]


def sides(config: Any, rotations: Sites, linear: BlockLinear) -> tuple[Tensor | None, Tensor | None]:
    """The blocks (B, n, n) of what a decoder linear reads and writes, (Q_A, Q_B); None where nothing rotates."""

    def at(space: str, boundary: int) -> Tensor | None:
        if space == "residual":
            return residual_at(config, rotations, boundary)
        return rotations[space][linear.layer] if space in rotations else None

    return at(linear.spec.reads, linear.boundary), at(linear.spec.writes, linear.boundary + 1)


def rotated_moment(config: Any, rotations: Sites, moments: Mapping[str, Moment], linear: BlockLinear) -> Moment | None:
    """The moment of what a linear reads, as seen from the rotated basis; None if none was gathered."""
    moment = moments.get(linear.group)
    return None if moment is None else moment.rotate(sides(config, rotations, linear)[0])


def residual_at(config: Any, rotations: Sites, boundary: int) -> Tensor | None:
    """The matrix (1, d, d) of the residual stream at a boundary, −1 being the last; None if it does not rotate."""
    if "residual" not in rotations:
        return None
    boundaries, sites = residual_boundaries(config), rotations["residual"]
    return sites[site_at(boundary % boundaries, len(sites), boundaries)]


def basis_change(config: Any, rotations: Sites, number: int) -> Tensor | None:
    """T = QᵢᵀQᵢ₊₁ (d, d), what the residual connection of a sublayer carries; None if the stream does not rotate."""
    before, after = residual_at(config, rotations, number), residual_at(config, rotations, number + 1)
    return None if before is None or after is None else before[0].mT @ after[0]


@torch.no_grad()
def merge_rotations(model: nn.Module, rotations: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Move a plain model into the rotated basis, in place; it computes the same function.

    Fuses norms if the residual stream rotates, and inserts shortcuts where that changes its basis on the way. Products
    are taken in float64, and every weight is rounded once.

    Args:
        model: plain.
        rotations: of its spaces.
        device: where products are taken, one block after the other, then the head and the embeddings; None is where the
            model is, and stays.

    Raises:
        InputError: they are not rotations of this model; it is as it was.
    """
    for space, Q in rotations.items():
        check_rotation(model.config, space, Q)
    family = family_of(model.config)
    there = device or module_at(model, family.head).weight.device
    rotations = {space: (Q.double() if turns(space) else Q).to(there) for space, Q in rotations.items()}
    first, last = residual_at(model.config, rotations, 0), residual_at(model.config, rotations, -1)
    final = None
    if first is not None:
        check_foldable(model)  # before anything is changed
        final = final_bias(model)
    blocks = module_at(model, family.blocks)
    for layer, members in by_block(block_linears(model.config)):
        with visiting(blocks[layer], there):
            for linear in members:
                module = module_at(model, linear.name)
                reads, writes = sides(model.config, rotations, linear)
                weight, bias = folded(model, linear, norms=first is not None)
                module.weight.copy_(rotate_weight(weight, reads, writes))
                if bias is not None:
                    module.bias.copy_(rotate_bias(bias, writes))
    if first is not None and last is not None:
        untie(model)
        reset_block_norms(model)
        head = module_at(model, family.head)
        with visiting(head, there):
            head.weight.copy_(rotate_features(folded_head(model), last))
        reset_final_norm(model, None if final is None else rotate_features(final.to(there), last))
        for path in family.embeddings:
            embedding = module_at(model, path)
            with visiting(embedding, there):
                embedding.weight.copy_(rotate_features(embedding.weight.double(), first))
        changes = basis_changes(model.config, len(rotations["residual"]))
        if changes:
            found = {number: basis_change(model.config, rotations, number) for number in changes}
            insert_shortcuts(model, {number: T for number, T in found.items() if T is not None})
