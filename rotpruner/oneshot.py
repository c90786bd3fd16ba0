"""One-shot pruning of a plain model, in its own basis or in a rotated one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import BlockLinear, block_linears, family_of, linear_modules, module_at
from rotpruner.fusion import fuse_block_norms
from rotpruner.loading import check_pattern
from rotpruner.owl import outlier_sparsities
from rotpruner.patterns import Pattern, Unstructured
from rotpruner.pruners import Pruner, resolve_pruner
from rotpruner.replay import BlockReplay
from rotpruner.rotations import merge_rotations, sides, space_shape
from rotpruner.statistics import Moment, gather_moments, watch_inputs

LayerSparsity = Literal["uniform", "owl"]


def gather_model_moments(
    model: nn.Module, pruner: Pruner, spaces: Container[str], batches: Iterable[Tensor]
) -> dict[str, Moment]:
    """What a pruner needs to know of each group of linears of the dense model, keyed by the group's first linear.

    Args:
        model: plain model; its block norms are fused if its residual stream is to be rotated.
        spaces: names of the spaces that will be rotated, which decides how much must be gathered.
        batches: token ids, each (sequences, seq_len).
    """
    if "residual" in spaces:
        fuse_block_norms(model)
    return gather_moments(model, *linears_to_watch(model, block_linears(model.config), pruner, spaces), batches)


def linears_to_watch(
    model: nn.Module, linears: Iterable[BlockLinear], pruner: Pruner, spaces: Container[str]
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The first linear of each group, and the width of the diagonal blocks that the pruner needs of its input."""
    modules: dict[str, nn.Module] = {}
    widths: dict[str, int] = {}
    if pruner.needs == "nothing":
        return modules, widths
    for linear in linears:
        if linear.name != linear.group:
            continue
        module = modules[linear.name] = module_at(model, linear.name)
        if pruner.needs == "full":
            widths[linear.name] = module.in_features
        elif linear.spec.reads in spaces:
            widths[linear.name] = space_shape(model.config, linear.spec.reads)[2]
        else:
            widths[linear.name] = 1
    return modules, widths


@torch.no_grad()
def prune_model(
    model: nn.Module,
    pruner: Pruner,
    pattern: Pattern,
    batches: Sequence[Tensor] = (),
    rotations: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Moment] | None = None,
    *,
    layer_sparsity: LayerSparsity = "uniform",
    calibration_dtype: torch.dtype | None = None,
    progress: Callable[..., Any] = lambda items, description: items,
) -> None:
    """Prune every decoder linear of a plain model in place, after moving it into a rotated basis if one is given.

    Without `moments` blocks are pruned in order, each with statistics of what its pruned predecessors give it.

    Args:
        model: plain model. Without `rotations` it is not fused and not untied: it is the control.
        pruner, pattern: how.
        batches: calibration token ids, each (sequences, seq_len); read only if `moments` is None.
        rotations: of its spaces, or None.
        moments: statistics of the dense model gathered before, in the original basis (fused if the residual rotates).
        layer_sparsity: `uniform`, or `owl` to let blocks with many outliers keep more (unstructured patterns only).
        calibration_dtype: of the matrix products that give the statistics of a block; None is the model's own.
        progress: wraps the iteration over blocks, for a progress bar.

    Raises:
        InputError: a linear cannot take the pattern, or the pattern has no sparsity to share out.
    """
    check_pattern(model, pattern)
    check_layer_sparsity(pattern, layer_sparsity)
    rotations = rotations or {}
    if rotations:
        merge_rotations(model, rotations)
    if pattern.sparsity == 0:
        return
    linears = block_linears(model.config)
    patterns = [pattern] * len(module_at(model, family_of(model.config).blocks))
    if layer_sparsity == "owl":
        patterns = _outlier_patterns(model, pattern, batches)
    if moments is None:
        blocks = groupby(linears, key=lambda linear: linear.layer)
        replay = BlockReplay(model, batches, calibration_dtype) if pruner.needs != "nothing" else None
        for layer, members in progress([(layer, list(members)) for layer, members in blocks], "pruning block by block"):
            block_moments: dict[str, Moment] = {}
            if replay is not None:
                with watch_inputs(*linears_to_watch(model, members, pruner, ())) as sums:
                    replay.run(layer)
                block_moments = sums.means()
            _prune_linears(model, members, pruner, patterns, block_moments)
            if replay is not None:
                replay.advance(layer)
        return
    rotated = {
        linear.group: moments[linear.group].rotate(sides(rotations, linear)[0])
        for linear in linears
        if linear.name == linear.group and linear.group in moments
    }
    _prune_linears(model, linears, pruner, patterns, rotated)


def _prune_linears(
    model: nn.Module,
    linears: Iterable[BlockLinear],
    pruner: Pruner,
    patterns: Sequence[Pattern],
    moments: Mapping[str, Moment],
) -> None:
    for (layer, group), members in groupby(linears, key=lambda linear: (linear.layer, linear.group)):
        weights = [module_at(model, linear.name).weight for linear in members]
        found = pruner.prune_group(weights, moments.get(group), patterns[layer])
        for weight, (pruned, _) in zip(weights, found, strict=True):
            weight.copy_(pruned)


def check_layer_sparsity(pattern: Pattern, layer_sparsity: str) -> None:
    """Raise `InputError` if the layers cannot share the pattern out like that."""
    if layer_sparsity not in get_args(LayerSparsity):
        raise InputError(
            f"unknown layer_sparsity '{layer_sparsity}'; choose one of {', '.join(get_args(LayerSparsity))}"
        )
    if layer_sparsity == "owl":
        if not isinstance(pattern, Unstructured):
            raise InputError(f"layer_sparsity owl needs an unstructured pattern such as 0.5, not '{pattern}'")
        outlier_sparsities([], pattern.sparsity)


def _outlier_patterns(model: nn.Module, pattern: Pattern, batches: Sequence[Tensor]) -> list[Pattern]:
    """One pattern a block, by the outlier ratios of Wanda's saliencies in the dense model (OWL)."""
    assert isinstance(pattern, Unstructured)
    wanda = resolve_pruner("wanda")
    moments = gather_model_moments(model, wanda, (), batches)

    def saliency(linear: BlockLinear) -> Tensor:
        return wanda.saliency(module_at(model, linear.name).weight, moments[linear.group]).flatten()

    blocks = groupby(block_linears(model.config), key=lambda linear: linear.layer)
    saliencies = (torch.cat([saliency(linear) for linear in members]) for _, members in blocks)
    return [replace(pattern, sparsity=sparsity) for sparsity in outlier_sparsities(saliencies, pattern.sparsity)]


def sparsity_of(model: nn.Module) -> float:
    """Share of exact zeros in the decoder linears."""
    weights = [module.weight for module in linear_modules(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def parameter_count(model: Any) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
