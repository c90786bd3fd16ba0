"""The choice of masks: the pruner looks at each group of linears in a rotated basis, and ranks share the groups out;
unless masks are learned by then, or were given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rotpruner.basis import RotatedLinear, grouped
from rotpruner.distributed import Ranks, whole
from rotpruner.orthogonal import rotate_weight
from rotpruner.patterns import Pattern
from rotpruner.pruners import Pruner
from rotpruner.relaxation import Relaxation
from rotpruner.rotations import RotationSet, rotated_moment, sides
from rotpruner.statistics import Moment


class Masks:
    """The masks of a model's linears, which each of them holds: a pruner's choice, that of learned logits, or given.

    Args:
        linears: all of them.
        relaxation: of these, whose logits may have taken over from the pruner.
        pruner: that chooses.
        ranks: that share the choice, and end with the same masks.

    Attributes:
        rotations, rng_state: the rotations in which they were chosen last, and the CPU's random state then, from which
            pruners of one's own may draw; they determine the masks. None before the first choice.
        block_flips: the share of each block's mask entries that flipped then.
    """

    def __init__(self, linears: Sequence[RotatedLinear], relaxation: Relaxation, pruner: Pruner, ranks: Ranks) -> None:
        self._linears, self._relaxation, self._pruner, self._ranks = linears, relaxation, pruner, ranks
        self._given = False
        self.rotations: RotationSet | None = None
        self.rng_state: Tensor | None = None
        self.block_flips: list[float] = []

    @torch.no_grad()
    def choose(
        self,
        rotations: RotationSet,
        moments: Mapping[str, Moment],
        patterns: Mapping[str, Pattern],
        device: torch.device,
    ) -> float:
        """Choose anew, as `choose_masks`; with no patterns, as of a slice, there is nothing to choose.

        Returns:
            The share of mask entries that flipped, 0 at the first choice.
        """
        self.rotations, self.rng_state = rotations, torch.get_rng_state()
        if not patterns:
            return 0.0
        flipped = [0] * (1 + max(linear.place.layer for linear in self._linears))
        total = [0] * len(flipped)
        settled = self._settled()
        if settled is None:
            chosen = choose_masks(
                grouped(self._linears), rotations, moments, self._pruner, patterns, self._ranks, device
            )
        else:
            chosen = zip(self._linears, settled, strict=True)
        for linear, mask in chosen:
            if linear.mask is not None:
                flipped[linear.place.layer] += int((mask != linear.mask).sum())
            total[linear.place.layer] += mask.numel()
            linear.mask = mask
        self._relaxation.begin([linear.mask for linear in self._linears if linear.mask is not None])
        self.block_flips = [part / entries for part, entries in zip(flipped, total, strict=True)]
        return sum(flipped) / sum(total)

    def give(self, masks: Mapping[str, Tensor], device: torch.device) -> None:
        """Have these masks (O, I) bool by name from here on, on a device."""
        for linear in self._linears:
            linear.mask = masks[linear.place.name].to(device)
        self._given = True

    def settled(self) -> dict[str, Tensor] | None:
        """The masks (O, I) by name, on the CPU, where they are learned or given; None where the pruner chooses."""
        settled = self._settled()
        if settled is None:
            return None
        return {linear.place.name: mask.cpu() for linear, mask in zip(self._linears, settled, strict=True)}

    def _settled(self) -> list[Tensor] | None:
        if self._given:
            return [linear.mask for linear in self._linears if linear.mask is not None]
        return self._relaxation.masks() if self._relaxation.learns_masks else None


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
