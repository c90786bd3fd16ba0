"""What learning has found, in the form in which a plain model is pruned by it, and how it continues after that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.patterns import Pattern
from rotpruner.rotations import RotationSet
from rotpruner.statistics import Moment


@dataclass(frozen=True)
class SecondFit:
    """A second fit, which continues to train the rotations after the weight update, under its masks.

    Args:
        steps: of the second fit.
        lr_factor: of its optimiser's rate, from the first fit's.

    Raises:
        InputError: they are no steps and no factor.
    """

    steps: int
    lr_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"second_fit.steps {self.steps} must be at least 1; second_fit null leaves it at one fit")
        if not 0 < self.lr_factor < math.inf:
            raise InputError(f"second_fit.lr_factor {self.lr_factor} must be above 0")


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
