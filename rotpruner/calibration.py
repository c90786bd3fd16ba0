"""What is gathered of a dense model before it is pruned: statistics, and how its blocks share the sparsity out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.allotment import Allotment, allot
from rotpruner.distributed import whole
from rotpruner.fusion import fuse_block_norms
from rotpruner.layout import BlockLinear, block_linears, by_block, module_at
from rotpruner.owl import outlier_sparsities
from rotpruner.patterns import Pattern, Slice, Unstructured
from rotpruner.placements import space_shape, turns
from rotpruner.pruners import Pruner, resolve_pruner
from rotpruner.pruners.base import Needs
from rotpruner.statistics import Moment, gather_moments

#: (model, linears by name, widths of their moments' blocks, batches) → moments by name.
Gather = Callable[[nn.Module, Mapping[str, nn.Module], Mapping[str, int], Sequence[Tensor]], dict[str, Moment]]


def gather_model_moments(
    model: nn.Module,
    pruner: Pruner,
    spaces: Container[str],
    batches: Sequence[Tensor],
    gather: Gather = gather_moments,
) -> dict[str, Moment]:
    """What a pruner needs to know of each group of linears of the dense model, keyed by the group's first linear.

    Args:
        model: plain model; its block norms are fused if its residual stream is to be rotated.
        spaces: names of the spaces that will be rotated, which decides how much must be gathered.
        batches: token ids, each (sequences, seq_len).
        gather: `gather_moments`, which runs the model as a whole, or `moments_by_block`, their other arguments bound.
    """
    if "residual" in spaces:
        fuse_block_norms(model)
    linears = block_linears(model.config)
    return gather(model, *linears_to_watch(model, linears, pruner.needs, spaces), batches)


def linears_to_watch(
    model: nn.Module, linears: Iterable[BlockLinear], needs: Needs, spaces: Container[str]
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The first linear of each group, and the width of the diagonal blocks to gather of its input."""
    modules: dict[str, nn.Module] = {}
    widths: dict[str, int] = {}
    if needs == "nothing":
        return modules, widths
    for linear in linears:
        if not linear.leads_group:
            continue
        module = modules[linear.name] = module_at(model, linear.name)
        if needs == "full":
            widths[linear.name] = module.in_features
        elif linear.spec.reads in spaces and turns(linear.spec.reads):
            widths[linear.name] = space_shape(model.config, linear.spec.reads)[2]
        else:
            widths[linear.name] = 1
    return modules, widths


def linear_patterns(
    model: nn.Module,
    allotment: Allotment,
    batches: Sequence[Tensor],
    gather: Gather = gather_moments,
    fused: bool = False,
) -> dict[str, Pattern]:
    """The pattern of every decoder linear by name: the same for all blocks, or by the outlier ratios of Wanda's
    saliencies in the dense model (OWL), but for exceptions.

    Args:
        model: plain model in its own basis; a basis of its own would blur the outliers.
        allotment: of a pattern that is no `Slice`; what exceptions lose or keep is not shared out again.
        batches: calibration token ids, each (sequences, seq_len); read for `owl` only.
        gather: as in `gather_model_moments`.
        fused: judge it with its block norms fused, as learning does where the residual stream rotates; norms with a
            bias make a difference.
    """
    config: Any = model.config
    pattern, exceptions = allotment.pattern, allotment.exceptions
    assert not isinstance(pattern, Slice)
    if allotment.layer_sparsity == "uniform":
        return allot(config, pattern, exceptions)
    assert isinstance(pattern, Unstructured), "an Allotment sees to that"
    wanda = resolve_pruner("wanda")
    if fused:
        model = copy.deepcopy(model)
        fuse_block_norms(model)
    moments = gather_model_moments(model, wanda, (), batches, gather)

    def saliency(linear: BlockLinear) -> Tensor:
        moment = moments[linear.group]
        weight = whole(module_at(model, linear.name).weight, moment.blocks.device)
        return wanda.saliency(weight, moment).flatten()

    blocks = by_block(block_linears(config))
    saliencies = (torch.cat([saliency(linear) for linear in members]) for _, members in blocks)
    sparsities = outlier_sparsities(saliencies, pattern.sparsity)
    return allot(config, [replace(pattern, sparsity=sparsity) for sparsity in sparsities], exceptions)
