"""One-shot pruning of a plain model, in its own basis or in a rotated one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rotpruner.allotment import Allotment
from rotpruner.calibration import linear_patterns, linears_to_watch
from rotpruner.compensation import compensate
from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.fusion import fuse_block_norms
from rotpruner.layout import BlockLinear, block_linears, by_block, by_group, module_at
from rotpruner.loading import check_pattern
from rotpruner.patterns import Pattern, Slice
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import Pruner
from rotpruner.pruners.base import Needs
from rotpruner.replay import BlockReplay, moments_by_block, visiting
from rotpruner.rotations import RotationSet, merge_rotations, rotated_moment
from rotpruner.slicing import residual_pca, residual_readers, slice_residual, sliced_width
from rotpruner.statistics import Moment, watch_inputs


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


@torch.no_grad()
def prune_model(
    model: nn.Module,
    pruner: Pruner,
    pattern: Pattern | Slice | Allotment,
    batches: Sequence[Tensor] = (),
    rotations: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Moment] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    update: Pruner | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    calibration_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
) -> None:
    """Prune every decoder linear of a plain model in place, after moving it into a rotated basis if one is given.

    A `Slice` removes residual directions instead: those after the first k of a given residual rotation, or those of
    least variance. Otherwise, without `moments`, blocks are pruned in order, each with statistics of what its pruned
    predecessors give it.

    Args:
        model: plain model. Without `rotations` it is not fused and not untied: it is the control.
        pruner, pattern: choose the masks; an `Allotment` has other patterns for some of the linears.
        batches: calibration token ids, each (sequences, seq_len); with `moments`, only `update` and `owl` read them.
        rotations: of its spaces, or None.
        moments: statistics of the dense model gathered before, in the original basis (fused if the residual rotates).
        masks: of all decoder linears by name, each (O, I) bool, to be kept instead of choosing any.
        update: a pruner whose weight update follows under the masks that `pruner` chose, with statistics of what
            the pruned predecessors give, whatever chose the masks.
        patterns: of all decoder linears by name, if the pattern has been shared out before.
        calibration_dtype: of the matrix products that give the statistics of a block; None is the model's own.
        device: where blocks are run and pruned, one at a time, while the rest of the model stays where it is; None
            leaves them there.
        progress: wraps the iteration over blocks, for a progress bar.

    Raises:
        InputError: a linear cannot take the pattern, the pattern has no sparsity to share out, statistics are needed
            and no batches are given, or a slice is given what is of masks.
    """
    allotment = Allotment.of(pattern)
    pattern = allotment.pattern
    check_pattern(model, allotment)
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
    chosen = masks is not None and not pruner.rebuilds  # nobody looks at what is there
    needs = "nothing" if moments is not None or chosen else pruner.needs
    if update is not None:
        needs = max(needs, update.needs, key=get_args(Needs).index)
    if allotment.layer_sparsity == "owl" and patterns is None:
        _check_batches(batches, "layer_sparsity owl")
    if patterns is None:
        there = partial(moments_by_block, dtype=calibration_dtype, device=device, progress=progress)
        patterns = linear_patterns(model, allotment, batches, there, fused="residual" in rotations)
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


def prune_and_compensate(
    model: nn.Module,
    pruner: Pruner,
    pattern: Pattern | Slice | Allotment,
    batches: Sequence[Tensor],
    learned: Learned,
    sequences: int,
    dense: Callable[[], nn.Module],
    *,
    update: Pruner | None = None,
    calibration_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
) -> float | None:
    """`prune_model` as was learned, then `compensate` on the first batches, both in place.

    Args:
        model, pruner, pattern, batches, update, calibration_dtype, device, progress: as of `prune_model`.
        learned: how the model is pruned.
        sequences: of the batches, for the update of what is kept; 0 leaves that out.
        dense: loads the same model unpruned, for the update; it is moved by the rotations in place.

    Returns:
        The step length of the update; None without one.
    """
    running: dict[str, Any] = {"calibration_dtype": calibration_dtype, "device": device, "progress": progress}
    prune_model(model, pruner, pattern, batches, update=update, **learned._asdict(), **running)
    if not sequences:
        return None
    return compensate(model, dense(), batches[:sequences], rotations=learned.rotations, **running)


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
