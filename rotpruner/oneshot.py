"""One-shot pruning of a plain model, in its own basis or in a rotated one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rotpruner.allotment import LayerSparsity, allot, check_allotment
from rotpruner.distributed import whole
from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.fusion import fuse_block_norms
from rotpruner.layout import BlockLinear, block_linears, by_block, by_group, linear_modules, module_at
from rotpruner.loading import check_pattern
from rotpruner.owl import outlier_sparsities
from rotpruner.patterns import NM, Pattern, Slice, Unstructured
from rotpruner.placements import space_shape, turns
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import Pruner, resolve_pruner
from rotpruner.pruners.base import Needs
from rotpruner.replay import BlockReplay, moments_by_block, visiting
from rotpruner.rotations import merge_rotations, rotated_moment
from rotpruner.slicing import residual_pca, residual_readers, slice_residual, sliced_width
from rotpruner.statistics import Moment, gather_moments, watch_inputs

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


@torch.no_grad()
def prune_model(
    model: nn.Module,
    pruner: Pruner,
    pattern: Pattern | Slice,
    batches: Sequence[Tensor] = (),
    rotations: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Moment] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    update: Pruner | None = None,
    layer_sparsity: LayerSparsity = "uniform",
    exceptions: Mapping[str, Pattern] = MappingProxyType({}),
    patterns: Mapping[str, Pattern] | None = None,
    calibration_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
) -> None:
    """Prune every decoder linear of a plain model in place, after moving it into a rotated basis if one is given.

    A `Slice` removes residual directions instead: those behind the first k of a given residual rotation, or those of
    least variance. Otherwise, without `moments`, blocks are pruned in order, each with statistics of what its pruned
    predecessors give it.

    Args:
        model: plain model. Without `rotations` it is not fused and not untied: it is the control.
        pruner, pattern: choose the masks.
        batches: calibration token ids, each (sequences, seq_len); with `moments`, only `update` and `owl` read them.
        rotations: of its spaces, or None.
        moments: statistics of the dense model gathered before, in the original basis (fused if the residual rotates).
        masks: of all decoder linears by name, each (O, I) bool, to be kept instead of choosing any.
        update: a pruner whose weight update follows under the masks that `pruner` chose, with statistics of what
            the pruned predecessors give, whatever chose the masks.
        layer_sparsity: `uniform`, or `owl` to let blocks with many outliers keep more (unstructured patterns only).
        exceptions: patterns of linears whose names match, see `rotpruner.allotment`.
        patterns: of all decoder linears by name, if the pattern has been shared out before.
        calibration_dtype: of the matrix products that give the statistics of a block; None is the model's own.
        device: where blocks are run and pruned, one at a time, while the rest of the model stays where it is; None
            leaves them there.
        progress: wraps the iteration over blocks, for a progress bar.

    Raises:
        InputError: a linear cannot take the pattern, the pattern has no sparsity to share out, statistics are needed
            and no batches are given, or a slice is given what is of masks.
    """
    check_pattern(model, pattern, exceptions)
    check_allotment(pattern, layer_sparsity, exceptions)
    check_update(update)
    rotations = rotations or {}
    if isinstance(pattern, Slice):
        if update is not None or masks is not None or patterns:
            raise InputError(f"pattern {pattern} removes directions: leave out update, masks and patterns of weights")
        if "residual" not in rotations:
            _check_batches(batches, f"pattern {pattern}")
        _slice(model, pattern, batches, rotations, calibration_dtype, device, progress)
        return
    # What is gathered of each block as its pruned predecessors leave it.
    needs = "nothing" if moments is not None else pruner.needs
    if update is not None:
        needs = max(needs, update.needs, key=get_args(Needs).index)
    if layer_sparsity == "owl" and patterns is None:
        _check_batches(batches, "layer_sparsity owl")
    if patterns is None:
        there = partial(moments_by_block, dtype=calibration_dtype, device=device, progress=progress)
        sharing = layer_sparsity, exceptions
        patterns = linear_patterns(model, pattern, *sharing, batches, there, fused="residual" in rotations)
    prunes = any(pattern.sparsity for pattern in patterns.values())
    if prunes and needs != "nothing":
        _check_batches(batches, type(update or pruner).__name__)
    if rotations:
        merge_rotations(model, rotations, device)
    if not prunes:
        return
    known = {
        linear.group: moment
        for linear in block_linears(model.config)
        if linear.leads_group and (moment := rotated_moment(model.config, rotations, moments or {}, linear)) is not None
    }
    replay = None if needs == "nothing" else BlockReplay(model, batches, calibration_dtype, device)
    for layer, members in progress(by_block(block_linears(model.config)), "pruning block by block"):
        with visiting(module_at(model, family_of(model.config).blocks)[layer], device):
            seen: dict[str, Moment] = {}
            if replay is not None:
                with watch_inputs(*linears_to_watch(model, members, needs, ())) as sums:
                    replay.pass_by(layer)
                seen = sums.means()
            statistics = seen if moments is None else known
            _prune_block(model, members, pruner, patterns, statistics, masks, update, seen)
            if replay is not None:
                replay.advance(layer)


def _check_batches(batches: Sequence[Tensor], reader: str) -> None:
    """Raise `InputError` if there are none for somebody to gather statistics from."""
    if not batches:
        raise InputError(f"{reader} needs statistics, and no calibration batches are given")


def _slice(
    model: nn.Module,
    pattern: Slice,
    batches: Sequence[Tensor],
    rotations: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device | None,
    progress: Progress,
) -> None:
    """Remove residual directions: the last ones of a given rotation, or those of least variance."""
    width = sliced_width(model.config, pattern)
    if "residual" not in rotations:
        fuse_block_norms(model)
        moments = moments_by_block(model, *residual_readers(model), batches, dtype, device, progress)
        rotations = {**rotations, "residual": residual_pca(model.config, moments)}
    merge_rotations(model, rotations, device)
    slice_residual(model, width)


def _prune_block(
    model: nn.Module,
    linears: Iterable[BlockLinear],
    pruner: Pruner,
    patterns: Mapping[str, Pattern],
    moments: Mapping[str, Moment],
    masks: Mapping[str, Tensor] | None,
    update: Pruner | None,
    seen: Mapping[str, Moment],
) -> None:
    """Prune the linears of a block by `moments`; then let `update` rebuild their outputs by what is `seen` now."""
    for pattern, members in _alike(linears, patterns):
        group = members[0].group
        weights = [module_at(model, linear.name).weight for linear in members]
        device = weights[0].device
        given = None if masks is None else [masks[linear.name].to(device) for linear in members]
        found = pruner.prune_group(weights, moments[group].to(device) if group in moments else None, pattern, given)
        if update is not None:
            found = update.prune_group(weights, seen[group].to(device), pattern, [mask for _, mask in found])
        for weight, (pruned, _) in zip(weights, found, strict=True):
            weight.copy_(pruned)


def _alike(
    linears: Iterable[BlockLinear], patterns: Mapping[str, Pattern]
) -> Iterator[tuple[Pattern, list[BlockLinear]]]:
    """The linears that lose weights, those together that read the same tensor and have the same pattern."""
    for members in by_group(linears):
        for pattern in dict.fromkeys(patterns[linear.name] for linear in members):
            if pattern.sparsity:
                yield pattern, [linear for linear in members if patterns[linear.name] == pattern]


def check_update(update: Pruner | None) -> None:
    """Raise `InputError` if a pruner whose update is to follow has none."""
    if update is not None and not update.rebuilds:
        raise InputError(f"{type(update).__name__} updates no weights; give sparsegpt or alps as the update")


def linear_patterns(
    model: nn.Module,
    pattern: Pattern,
    layer_sparsity: LayerSparsity,
    exceptions: Mapping[str, Pattern],
    batches: Sequence[Tensor],
    gather: Gather = gather_moments,
    fused: bool = False,
) -> dict[str, Pattern]:
    """The pattern of every decoder linear by name: the same for all blocks, or by the outlier ratios of Wanda's
    saliencies in the dense model (OWL), but for exceptions.

    Args:
        model: plain model in its own basis; a basis of its own would blur the outliers.
        pattern: of all blocks together.
        layer_sparsity: how they share it.
        exceptions: patterns of linears whose names match; what they lose or keep is not shared out again.
        batches: calibration token ids, each (sequences, seq_len); read for `owl` only.
        gather: as in `gather_model_moments`.
        fused: judge it with its block norms fused, as learning does where the residual stream rotates; norms with a
            bias make a difference.
    """
    config: Any = model.config
    if layer_sparsity == "uniform":
        return allot(config, pattern, exceptions)
    assert isinstance(pattern, Unstructured)
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


def sparsity_of(model: nn.Module) -> float:
    """Share of exact zeros in the decoder linears."""
    weights = [module.weight for module in linear_modules(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def pattern_of(model: nn.Module) -> str:
    """The strictest of 1:4, 2:4 and 4:8 that all decoder linears keep to, else their share of zeros, as in `0.5`."""
    weights = [module.weight for module in linear_modules(model).values()]
    for pattern in (NM(1, 4), NM(2, 4), NM(4, 8)):
        if all(map(pattern.holds, weights)):
            return str(pattern)
    return f"{sparsity_of(model):.2g}"


def parameter_count(model: Any) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
