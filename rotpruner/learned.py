"""What learning has found, in the form in which a plain model is pruned by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rotpruner.patterns import Pattern
from rotpruner.rotations import RotationSet
from rotpruner.statistics import Moment


class Learned(NamedTuple):
    """How a plain model is pruned as one has learned, by the names that `prune_model` has for it.

    Attributes:
        rotations: of its spaces.
        moments: the statistics that they were learned with; None has them gathered from pruned predecessors.
        masks: of all decoder linears by name, where they are learned themselves.
        patterns: of all decoder linears by name; none for a slice.
    """

    rotations: RotationSet | None = None
    moments: Mapping[str, Moment] | None = None
    masks: Mapping[str, Tensor] | None = None
    patterns: Mapping[str, Pattern] | None = None

    def to(self, device: torch.device | str) -> Learned:
        """The same with rotations and moments on a device."""
        rotations = self.rotations and {space: Q.to(device) for space, Q in self.rotations.items()}
        moments = self.moments and {group: moment.to(device) for group, moment in self.moments.items()}
        return self._replace(rotations=rotations, moments=moments)
