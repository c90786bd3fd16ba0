"""The choice of masks: the pruner looks at each group of linears in a rotated basis, and ranks share the groups out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rotpruner.basis import RotatedLinear
from rotpruner.distributed import Ranks, whole
from rotpruner.orthogonal import rotate_weight
from rotpruner.patterns import Pattern
from rotpruner.pruners import Pruner
from rotpruner.rotations import RotationSet, rotated_moment, sides
from rotpruner.statistics import Moment


def choose_masks(
    groups: Sequence[Sequence[RotatedLinear]],
    rotations: RotationSet,
    moments: Mapping[str, Moment],
    pruner: Pruner,
    patterns: Mapping[str, Pattern],
    ranks: Ranks,
    device: torch.device,
) -> Iterator[tuple[RotatedLinear, Tensor]]:
    """The mask (O, I) bool of every linear, the same on all ranks, even where kernels would not give the same twice.

    Args:
        groups: linears that read one input together.
        rotations: in which the pruner looks at them.
        moments: of the groups' inputs before rotation, by the group's name; none if the pruner needs none.
        patterns: of the linears, by name.
        ranks: take turns with the groups and hand the masks around.
        device: where to compute; weights that are offloaded come one at a time.
    """
    # All ranks choose at the same time, a group each, then tell the others.
    for start in range(0, len(groups), ranks.size):
        batch = groups[start : start + ranks.size]
        own: dict[RotatedLinear, Tensor] = {}
        for source, group in enumerate(batch):
            for linear in group:
                weight = whole(linear.weight)  # sharded weights come together one at a time, on all ranks
                if source == ranks.rank:
                    own[linear] = weight
        moment = None
        for linear, weight in own.items():
            config = linear.basis.config
            # Rotated once for the group, whose linears share what a pruner derives from it.
            if moment is None:
                moment = rotated_moment(config, rotations, moments, linear.place)
            rotated = rotate_weight(whole(weight, device), *sides(config, rotations, linear.place))
            own[linear] = pruner.mask(rotated, moment, patterns[linear.place.name])
        for source, group in enumerate(batch):
            for linear in group:
                mask = own.get(linear)
                if mask is None:
                    mask = torch.empty(linear.weight.shape, dtype=torch.bool, device=device)
                yield linear, ranks.broadcast(mask.contiguous(), source)
