"""Which settings of a fit go with each other and with a model, by its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rotpruner.errors import InputError
from rotpruner.families import SPACES, check_space
from rotpruner.loading import check_pattern, meta_model
from rotpruner.objectives import Objective
from rotpruner.oneshot import check_layer_sparsity
from rotpruner.optimizers import CayleySGD
from rotpruner.patterns import Pattern, Slice
from rotpruner.placements import Placement, check_placement
from rotpruner.pruners import Pruner
from rotpruner.rotations import check_start, space_constraint


def check_choices(
    config: Any,
    pattern: Pattern | Slice,
    pruner: Pruner,
    objective: Objective,
    layer_sparsity: str,
    spaces: Sequence[str],
    placement: Placement,
    start: str | None,
    orthogonal_map: str,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise `InputError` if settings of a fit do not go with each other or with the model of a config."""
    check_layer_sparsity(pattern, layer_sparsity)
    if not spaces:
        raise InputError(f"spaces is empty; name at least one of {', '.join(SPACES)}")
    for space in spaces:
        check_space(config, space)
    check_placement(config, placement, spaces)
    check_pattern(meta_model(config), pattern)
    if isinstance(pattern, Slice) and list(spaces) != ["residual"]:
        raise InputError(
            f"pattern {pattern} removes residual directions only, but spaces is {list(spaces)}: set [residual]"
        )
    if isinstance(pattern, Slice) and objective.needs_importance:
        raise InputError(
            f"pattern {pattern} removes directions, and entropy and lost_mass judge weights: set them to 0"
        )
    check_start(start, spaces, pattern)
    if start == "pca" and space_constraint(config, "residual") != "none":
        raise InputError(f"start pca would change what this {config.model_type} model computes; use identity")
    if start == "pca" and pruner.needs == "nothing" and not isinstance(pattern, Slice):
        raise InputError(
            f"start pca needs statistics, and {type(pruner).__name__} has none gathered; take wanda, or start identity"
        )
    if (orthogonal_map == "manifold") != isinstance(optimizer, CayleySGD):
        raise InputError(
            f"orthogonal_map {orthogonal_map} does not go with {type(optimizer).__name__}: "
            "manifold and rotpruner.optimizers.CayleySGD need each other"
        )
