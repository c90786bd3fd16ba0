"""Orthogonal matrices as functions of free parameters, and their action on activations and weights.

Shapes: S = sites (places that share a space's form, such as layers), B = blocks of a block-diagonal
matrix (such as heads), n = width of a block. A rotation is stored by its blocks, (S, B, n, n) or, at
one site, (B, n, n); it stands for the block-diagonal (B·n, B·n) matrix. Row vectors: x' = x Q.
A permutation may be stored by its order instead, (S, n) or, at one site, (n,) int64: x'_j = x_order[j].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError

#: Smooth functions of a skew parameter; or `manifold`, the matrix itself, for `rotpruner.optimizers.CayleySGD`.
MapName = Literal["cayley", "exponential", "manifold"]

#: Which orthogonal matrices (n, n) a place admits: all; those that keep the all-ones direction, with which
#: LayerNorm commutes; or a turn in each plane (i, i + n/2), with which rotary positions commute.
Constraint = Literal["none", "fixes_ones", "planes"]


def skew_symmetric(upper: Tensor, n: int) -> Tensor:
    """The skew matrices (…, n, n) whose strict upper triangles, row by row, are `upper` (…, n(n−1)/2)."""
    rows, columns = torch.triu_indices(n, n, offset=1, device=upper.device)
    A = upper.new_zeros(*upper.shape[:-1], n, n)
    A[..., rows, columns] = upper
    return A - A.mT


def cayley(A: Tensor) -> Tensor:
    """Cayley transform (I − A/2)⁻¹ (I + A/2) of skew matrices (…, n, n).

    With the halves it agrees with exp(A) to second order, so both maps take the same learning rate.
    """
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(identity - A / 2, identity + A / 2)


ORTHOGONAL_MAPS = {"cayley": cayley, "exponential": torch.linalg.matrix_exp}


class _Subgroup(NamedTuple):
    """A constraint, by the free orthogonal cores (…, m, m) that its matrices (…, n, n) are made of.

    Attributes:
        core: n → shape of what one matrix is made of, (…, m, m).
        embed: cores → matrices; products of turns go to products, so Q₀ · embed(…) stays inside.
        extract: matrices → cores; undoes `embed`.
    """

    core: Callable[[int], tuple[int, ...]]
    embed: Callable[[Tensor], Tensor]
    extract: Callable[[Tensor], Tensor]


def _reflect(Q: Tensor) -> Tensor:
    """H Q H with H = I − 2 v vᵀ the Householder reflection between 1/√n and e₁, for Q (…, n, n)."""
    n = Q.shape[-1]
    v = Q.new_full((n,), n**-0.5)
    v[0] -= 1
    v = v / v.norm()
    Q = Q - 2 * v[:, None] * (v @ Q).unsqueeze(-2)
    return Q - 2 * (Q @ v).unsqueeze(-1) * v


def _keep_first(core: Tensor) -> Tensor:
    """diag(1, Q̃) for Q̃ (…, n − 1, n − 1)."""
    Q = nn.functional.pad(core, (1, 0, 1, 0))
    Q[..., 0, 0] = 1
    return Q


def _turn_planes(core: Tensor) -> Tensor:
    """Turns (…, n, n) in the planes (i, i + n/2), by the first rows (cos, sin) of (…, n/2, 2, 2)."""
    cos, sin = torch.diag_embed(core[..., 0, 0]), torch.diag_embed(core[..., 0, 1])
    return torch.cat([torch.cat([cos, sin], -1), torch.cat([-sin, cos], -1)], -2)


def _planes(Q: Tensor) -> Tensor:
    """The entries of Q (…, n, n) inside the planes (i, i + n/2), (…, n/2, 2, 2)."""
    half = Q.shape[-1] // 2
    return Q.unflatten(-1, (2, half)).unflatten(-3, (2, half)).diagonal(dim1=-3, dim2=-1).movedim(-1, -3)


_SUBGROUPS: dict[str, _Subgroup] = {
    "none": _Subgroup(lambda n: (n, n), lambda core: core, lambda Q: Q),
    "fixes_ones": _Subgroup(
        lambda n: (n - 1, n - 1), lambda core: _reflect(_keep_first(core)), lambda Q: _reflect(Q)[..., 1:, 1:]
    ),
    "planes": _Subgroup(lambda n: (n // 2, 2, 2), _turn_planes, _planes),
}


class OrthogonalMatrices(nn.Module):
    """Learnable orthogonal blocks Q = Q₀ · map(A), A skew and zero at the start; of `manifold`, Q₀ · P with P = I.

    Args:
        sites, blocks, n: shape of the result (S, B, n, n).
        map_name: `cayley`, `exponential`, or `manifold`.
        constraint: which orthogonal matrices; A then parametrises the part of them that is free.

    The parameter and all arithmetic keep their own dtype (float32 unless the module is cast), whatever
    autocast says: bf16 would cost orthogonality four digits.
    """

    start: Tensor

    def __init__(
        self, sites: int, blocks: int, n: int, map_name: MapName = "cayley", constraint: Constraint = "none"
    ) -> None:
        super().__init__()
        if map_name not in get_args(MapName):
            raise InputError(f"unknown orthogonal map '{map_name}'; choose one of {', '.join(get_args(MapName))}")
        self.map_name, self.subgroup = map_name, _SUBGROUPS[constraint]
        *many, self.m, _ = self.subgroup.core(n)
        shape = (sites, blocks, *many)
        if map_name == "manifold":
            self.turn = nn.Parameter(torch.eye(self.m, dtype=torch.float32).expand(*shape, self.m, self.m).clone())
        else:
            self.turn = nn.Parameter(torch.zeros(*shape, self.m * (self.m - 1) // 2, dtype=torch.float32))
        self.register_buffer("start", torch.eye(n, dtype=torch.float32).expand(sites, blocks, n, n).clone())

    def forward(self) -> Tensor:
        with torch.autocast(self.turn.device.type, enabled=False):
            core = self.turn
            if self.map_name != "manifold":
                core = ORTHOGONAL_MAPS[self.map_name](skew_symmetric(self.turn, self.m))
            return self.start @ self.subgroup.embed(core)

    @torch.no_grad()
    def restart(self, Q: Tensor) -> None:
        """Start again from Q (S, B, n, n), orthogonal and within the constraint."""
        self.start.copy_(Q)
        self.turn.zero_()
        if self.map_name == "manifold":
            self.turn.diagonal(dim1=-2, dim2=-1).fill_(1)


def random_orthogonal(
    sites: int,
    blocks: int,
    n: int,
    generator: torch.Generator,
    constraint: Constraint = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Haar-distributed orthogonal blocks (S, B, n, n) (Stewart, 1980: QR with positive diagonal)."""
    subgroup = _SUBGROUPS[constraint]
    shape = sites, blocks, *subgroup.core(n)
    # Where the generator is, whatever device is the default of the moment.
    normal = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    Q, R = torch.linalg.qr(normal)
    return subgroup.embed(Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(dtype)


def is_order(Q: Tensor | None) -> bool:
    """Whether a permutation is given by its order."""
    return Q is not None and Q.dtype == torch.int64


def permutation_matrix(order: Tensor) -> Tensor:
    """Q (…, n, n) float32 with (x Q)_j = x_order[j], for orders (…, n)."""
    return nn.functional.one_hot(order, order.shape[-1]).mT.float()


def orthogonality_error(Q: Tensor) -> float:
    """‖QᵀQ − I‖∞, the largest absolute entry, over all blocks of (…, n, n); of an order, infinity if it is none."""
    if is_order(Q):
        return 0.0 if (Q.sort(-1).values == torch.arange(Q.shape[-1], device=Q.device)).all() else float("inf")
    Q = Q.detach().double()
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().max().item()


def constraint_error(Q: Tensor, constraint: Constraint) -> float:
    """The largest absolute entry by which orthogonal blocks (…, n, n) miss a constraint."""
    subgroup, Q = _SUBGROUPS[constraint], Q.detach().double()
    return (Q - subgroup.embed(subgroup.extract(Q))).abs().max().item()


def rotate_features(x: Tensor, Q: Tensor) -> Tensor:
    """x · diag(Q₁, …, Q_B): features (…, R·B·n) by blocks (B, n, n), in the dtype of the features.

    When the features hold more heads than the rotation has blocks, each block serves R neighbouring
    heads: the query heads of one key-value head.
    """
    if is_order(Q):
        return x[..., Q]
    Q = Q.to(x.dtype)
    blocks, n = Q.shape[0], Q.shape[-1]
    if blocks == 1 and x.shape[-1] == n:
        return x @ Q[0]
    repeat = x.shape[-1] // (blocks * n)
    heads = x.unflatten(-1, (blocks, repeat, n))
    return torch.einsum("...bri,bij->...brj", heads, Q).flatten(-3)


def rotate_weight(weight: Tensor, reads: Tensor | None, writes: Tensor | None) -> Tensor:
    """W' = Q_Bᵀ W Q_A for W (O, I) that reads the space of Q_A, writes that of Q_B; None is the identity."""
    if writes is not None and is_order(writes):
        weight, writes = weight[writes], None  # first, while no gradient runs through the weight
    if reads is not None:
        weight = rotate_features(weight, reads)
    if writes is not None:
        Q = writes.to(weight.dtype)
        if Q.shape[0] == 1 and weight.shape[0] == Q.shape[-1]:
            return Q[0].mT @ weight
        heads = weight.unflatten(0, (Q.shape[0], -1, Q.shape[-1]))
        weight = torch.einsum("bij,bric->brjc", Q, heads).flatten(0, 2)
    return weight


def rotate_bias(bias: Tensor | None, writes: Tensor | None) -> Tensor | None:
    """b' = b Q_B for b (O,)."""
    if bias is None or writes is None:
        return bias
    return rotate_features(bias, writes)
