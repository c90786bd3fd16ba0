"""How concentrated importance is: what a basis can be judged by without running the model.

Importance is what removing a weight costs by a pruner's own score: W'² E[x'²] of Wanda, W'² / [H'⁻¹] of SparseGPT. The
fewer weights hold it, the less pruning takes away.
Shapes: O, I = outputs and inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rotpruner.basis import RotatedLinear
from rotpruner.distributed import whole
from rotpruner.errors import InputError
from rotpruner.objectives import Objective
from rotpruner.orthogonal import is_order, rotate_weight
from rotpruner.patterns import Pattern
from rotpruner.piecewise import Named, sum_of_pieces
from rotpruner.pruners import Pruner
from rotpruner.rotations import rotated_moment, sides
from rotpruner.statistics import Moment


def entropy(importance: Tensor, dim: int) -> Tensor:
    """−Σ p log p along a dimension, in nats, of importance (O, I) ≥ 0 normalised there; the mean over the other one.

    (DenoiseRotator, 2025, arXiv:2505.23049.) Rows or columns without importance count as zero.
    """
    total = importance.sum(dim, keepdim=True)
    p = importance / torch.where(total > 0, total, 1.0)
    # Where p is 0 its logarithm must have a finite gradient.
    return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny)).sum(dim).mean()


def concentration_entropy(importance: Tensor, reads: bool, writes: bool) -> Tensor:
    """The sum of the entropies that a rotation can lower: along the inputs if what is read rotates, along the outputs
    if what is written does."""
    found = [entropy(importance, dim) for dim, rotates in ((1, reads), (0, writes)) if rotates]
    return torch.stack(found).sum() if found else importance.new_zeros(())


def lost_mass(importance: Tensor, pattern: Pattern) -> Tensor:
    """The share of importance (O, I) that a pattern's best mask removes; the mask counts as a constant."""
    kept = pattern.mask(importance.detach())
    total = importance.sum()
    return 1 - (importance * kept).sum() / torch.where(total > 0, total, 1.0)


def concentration(
    groups: Sequence[Sequence[RotatedLinear]],
    rotations: Mapping[str, Sequence[Tensor]],
    moments: Mapping[str, Moment],
    pruner: Pruner,
    patterns: Mapping[str, Pattern],
    objective: Objective,
    device: torch.device,
) -> dict[str, Tensor]:
    """The terms of an objective that have a weight: `entropy`, mean over sides that rotate, `lost_mass`, over linears.

    One group at a time is scored and differentiated: it takes no more memory than that.

    Args:
        groups: linears that read one input together.
        rotations: of the moment, by space, then site.
        moments: of the groups' inputs before rotation, by the group's name; none if the pruner needs none.
        patterns: of the linears, by name; one of no sparsity has nothing to concentrate.
        device: where to compute; weights that are offloaded come one at a time.

    Raises:
        InputError: no side that rotates belongs to a linear that is pruned.
    """
    config = groups[0][0].basis.config
    linears = [linear for group in groups for linear in group]

    def turned(linear: RotatedLinear) -> list[bool]:
        loses = patterns[linear.place.name].sparsity > 0
        return [loses and _rotates(side) for side in sides(config, rotations, linear.place)]

    counts = {"entropy": sum(sum(turned(linear)) for linear in linears), "lost_mass": len(linears)}
    counts = {name: count for name, count in counts.items() if getattr(objective, name)}
    if counts.get("entropy") == 0:
        raise InputError(
            "the objective's entropy is of what rotates and is pruned, and no linear is both: set it to 0, or change "
            "spaces or exceptions"
        )

    def sums_of(group: Sequence[RotatedLinear], rotations: Named) -> Tensor:
        moment = rotated_moment(config, rotations, moments, group[0].place)
        found: dict[str, list[Tensor]] = {name: [] for name in counts}
        for linear in group:
            reads, writes = sides(config, rotations, linear.place)
            weight = rotate_weight(whole(linear.weight, device), reads, writes)
            importance = pruner.importance(weight, moment)
            if "entropy" in found:
                found["entropy"].append(concentration_entropy(importance, *turned(linear)))
            if "lost_mass" in found:
                found["lost_mass"].append(lost_mass(importance, patterns[linear.place.name]))
        return torch.stack([torch.stack(values).sum() for values in found.values()])

    sums = sum_of_pieces([partial(sums_of, group) for group in groups], rotations)
    return {name: total / count for (name, count), total in zip(counts.items(), sums, strict=True)}


def _rotates(side: Tensor | None) -> bool:
    """Whether a space rotates; an order lowers no entropy."""
    return side is not None and not is_order(side)
