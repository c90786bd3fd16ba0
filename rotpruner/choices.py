"""What a fit chooses, and which choices go with each other and with a model, by its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rotpruner.allotment import Allotment
from rotpruner.errors import InputError
from rotpruner.families import SPACES, check_space
from rotpruner.objectives import Objective
from rotpruner.optimizers import CayleySGD
from rotpruner.orthogonal import MapName
from rotpruner.patterns import Slice
from rotpruner.placements import Placement, check_placement
from rotpruner.pruners import Pruner
from rotpruner.rotations import Start, check_start, space_constraint
from rotpruner.surrogates import Surrogate, check_surrogate


@dataclass(frozen=True)
class Choices:
    """Settings of a fit that depend on each other.

    Attributes:
        allotment, pruner: what is pruned, and how.
        objective, surrogate: what is minimised, and how its gradient passes the masks.
        spaces, placement, orthogonal_map: what rotates, and by which matrices.
        start: of the rotations; None stands for rotations that are given.
    """

    allotment: Allotment
    pruner: Pruner
    objective: Objective
    surrogate: Surrogate
    spaces: Sequence[str]
    placement: Placement
    orthogonal_map: MapName
    start: Start | None

    def check(self, config: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Raise `InputError` if these do not go with each other, with the model of a config, or with an optimiser."""
        pattern = self.allotment.pattern
        if not self.spaces:
            raise InputError(f"spaces is empty; name at least one of {', '.join(SPACES)}")
        for space in self.spaces:
            check_space(config, space)
        check_placement(config, self.placement, self.spaces)
        if isinstance(pattern, Slice):
            self._check_slice(pattern)
        check_start(self.start, self.spaces, pattern)
        if self.start == "pca":
            self._check_principal_start(config)
        check_surrogate(self.surrogate, self.allotment, self.pruner, self.objective)
        if optimizer is not None:
            self._check_optimizer(optimizer)

    def _check_slice(self, pattern: Slice) -> None:
        if list(self.spaces) != ["residual"]:
            raise InputError(
                f"pattern {pattern} removes residual directions only, but spaces is {list(self.spaces)}: set [residual]"
            )
        if self.objective.needs_importance:
            raise InputError(
                f"pattern {pattern} removes directions, and entropy and lost_mass judge weights: set them to 0"
            )

    def _check_principal_start(self, config: Any) -> None:
        if space_constraint(config, "residual") != "none":
            raise InputError(f"start pca would change what this {config.model_type} model computes; use identity")
        if self.pruner.needs == "nothing" and not isinstance(self.allotment.pattern, Slice):
            raise InputError(
                f"start pca needs statistics, and {type(self.pruner).__name__} has none gathered; take wanda, or start "
                "identity"
            )

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        on_the_manifold = isinstance(optimizer, CayleySGD)
        if (self.orthogonal_map == "manifold") != on_the_manifold:
            raise InputError(
                f"orthogonal_map {self.orthogonal_map} does not go with {type(optimizer).__name__}: "
                "manifold and rotpruner.optimizers.CayleySGD need each other"
            )
        if on_the_manifold and self.surrogate.learns_masks:
            raise InputError(
                f"CayleySGD moves orthogonal matrices, not the logits of surrogate {self.surrogate.name}; use Adam"
            )
