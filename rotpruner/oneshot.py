"""One-shot pruning of a plain model, in its own basis or in a rotated one."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.families import block_linears, linear_modules, module_at
from rotpruner.fusion import fuse_block_norms
from rotpruner.loading import check_pattern
from rotpruner.patterns import Pattern
from rotpruner.pruners import Pruner
from rotpruner.rotations import merge_rotations, sides, space_shape
from rotpruner.statistics import Moment, gather_moments


def gather_model_moments(
    model: nn.Module, pruner: Pruner, spaces: Container[str], batches: Iterable[Tensor]
) -> dict[str, Moment]:
    """What a pruner needs to know of each group of linears, keyed by the group's first linear.

    Args:
        model: plain model; if its residual stream is to be rotated, with fused block norms.
        spaces: names of the spaces that will be rotated, which decides how much must be gathered.
        batches: token ids, each (sequences, seq_len).
    """
    if pruner.needs == "nothing":
        return {}
    widths: dict[str, int] = {}
    modules: dict[str, nn.Module] = {}
    for linear in block_linears(model.config):
        if linear.name != linear.group:
            continue
        module = modules[linear.name] = module_at(model, linear.name)
        if pruner.needs == "full":
            widths[linear.name] = module.in_features
        elif linear.spec.reads in spaces:
            widths[linear.name] = space_shape(model.config, linear.spec.reads)[2]
        else:
            widths[linear.name] = 1
    return gather_moments(model, modules, widths, batches)


@torch.no_grad()
def prune_model(
    model: nn.Module,
    pruner: Pruner,
    pattern: Pattern,
    batches: Iterable[Tensor] = (),
    rotations: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Moment] | None = None,
) -> None:
    """Prune every decoder linear of a plain model in place, after moving it into a rotated basis if one is given.

    Args:
        model: plain model. Without `rotations` it is not fused and not untied: it is the control.
        pruner, pattern: how.
        batches: calibration token ids, each (sequences, seq_len); read only if `moments` is None.
        rotations: of its spaces, or None.
        moments: statistics gathered before, in the original basis (fused if the residual rotates).

    Raises:
        InputError: a linear cannot take the pattern.
    """
    check_pattern(model, pattern)
    rotations = rotations or {}
    if "residual" in rotations:
        fuse_block_norms(model)
    if moments is None and pattern.sparsity > 0:
        moments = gather_model_moments(model, pruner, rotations, batches)
    if rotations:
        merge_rotations(model, rotations)
    if pattern.sparsity == 0:
        return
    for group, members in groupby(block_linears(model.config), key=lambda linear: linear.group):
        linears = list(members)
        moment = (moments or {}).get(group)
        if moment is not None:
            moment = moment.rotate(sides(rotations, linears[0])[0])
        for linear in linears:
            weight = module_at(model, linear.name).weight
            weight.copy_(pruner.prune(weight, moment, pattern)[0])


def sparsity_of(model: nn.Module) -> float:
    """Share of exact zeros in the decoder linears."""
    weights = [module.weight for module in linear_modules(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def parameter_count(model: Any) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
