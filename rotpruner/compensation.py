"""A closed-form weight update under given masks: the kept weights make up for what the others have done so far.

Block by block, the weights that read the stream are fitted to the outputs of the dense model's linears, those that
write it to the dense model's stream itself, so that each sublayer also takes back what its predecessors have missed.
Both are least squares over the kept weights of a row, in statistics of what the updated predecessors give (as GPTAQ
does for quantisation, Li et al., 2025, arXiv:2504.02692). All of it together overshoots: rotations were learned for
the errors that the masks leave, and a calibration text is short. So the updates are taken as a direction, W + α ΔW,
and a line search on sequences that were not fitted finds the α at which the pruned model is nearest to the dense one.

Shapes: O = output features, I = input features, T = tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import available_spaces
from rotpruner.layout import BlockLinear, Sublayer, block_linears, by_block, by_group, module_at, residual_sublayers
from rotpruner.objectives import Objective
from rotpruner.patterns import Pattern, Slice
from rotpruner.precision import at_least_float32
from rotpruner.progress import Progress, unseen
from rotpruner.pruners.reconstruction import conjugate_gradients, damped_hessian, normalise
from rotpruner.replay import BlockReplay, final_states, visiting
from rotpruner.rotations import RotationSet, merge_rotations
from rotpruner.statistics import Moment
from rotpruner.teacher import head_at

#: The share of the sequences that is kept from the fit, for the line search. They cost little beside those that are
#: fitted, and the pruned model is more sensitive to the step length than four sequences can tell.
_HELD_OUT = 1 / 3

#: λ = damping · mean(diag H) holds a row's weights near those that it has.
_DAMPING = 0.01

#: Steps of conjugate gradients at most.
_REFINEMENTS = 30


@torch.no_grad()
def compensate(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Sequence[Tensor],
    *,
    rotations: RotationSet | None = None,
    calibration_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
) -> float:
    """Update the decoder weights of a pruned model that are not zero, in place.

    Args:
        pruned: plain model whose decoder linears hold zeros.
        dense: the same model before.
        batches: two or more of calibration token ids, each (sequences, seq_len); the last third finds the step length.
        rotations: that `pruned` has been moved by; `dense` is moved likewise, in place. None: both have the same basis.
        calibration_dtype: of the matrix products of the two models, as in `BlockReplay`; None is their own.
        device: where blocks are run and updated, one of each model at a time; None leaves them where they are.
        progress: wraps the iteration over blocks.

    Returns:
        The step length α; 0 if no update brings the pruned model nearer to the dense one.

    Raises:
        InputError: fewer than two batches.
    """
    if len(batches) < 2:
        raise InputError(f"{len(batches)} batches: an update needs one to fit and one to try, give 2 or more")
    if rotations is not None:
        merge_rotations(dense, rotations, device)
    tried = max(1, int(_HELD_OUT * len(batches)))
    fitted, held_out = batches[:-tried], batches[-tried:]
    linears = {place.name: module_at(pruned, place.name) for place in block_linears(pruned.config)}
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    _fit(pruned, dense, fitted, _DAMPING, calibration_dtype, device, progress)
    updates = {name: linear.weight - before[name] for name, linear in linears.items()}

    distance = _distance_to(dense, held_out, calibration_dtype, device)

    def go(length: float) -> None:
        for name, linear in linears.items():
            linear.weight.copy_(before[name] + length * updates[name])

    def distance_at(length: float) -> float:
        go(length)
        return distance(pruned)

    best = line_search(distance_at)
    go(best)
    return best


def check_compensation(sequences: int, available: int | None, pattern: Pattern | Slice) -> None:
    """Raise `InputError` if kept weights cannot be updated on so many of the available sequences; 0 is no update."""
    if sequences == 0:
        return
    if isinstance(pattern, Slice):
        raise InputError(f"pattern {pattern} removes directions and leaves no masks to keep: leave compensate out")
    if sequences < 2:
        raise InputError(
            f"compensate {sequences}: an update needs a sequence to fit and one to try, give 2 or more, or 0"
        )
    if available is not None and sequences > available:
        raise InputError(f"compensate {sequences} is more than the {available} calibration sequences; give fewer")


def line_search(loss: Callable[[float], float]) -> float:
    """The step length in [0, 1] of least loss among 0, ½, 1 and the vertex of the parabola through these three."""
    losses = {length: loss(length) for length in (0.0, 0.5, 1.0)}
    start, middle, end = losses.values()
    curvature = 2 * (start + end - 2 * middle)
    if curvature > 0:
        vertex = (3 * start + end - 4 * middle) / (2 * curvature)
        if 0 < vertex < 1:
            losses[vertex] = loss(vertex)
    return min(losses, key=losses.__getitem__)


def _distance_to(
    dense: Any, batches: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device | None
) -> Callable[[Any], float]:
    """Mean KL divergence of a model from the dense one, in nats per token of the batches."""
    objective = Objective(kl=1.0)
    expected = final_states(dense, batches, dtype, device)

    def distance(model: Any) -> float:
        total = 0.0
        found = final_states(model, batches, dtype, device)  # first: a tied head takes the embedding with it
        with head_at(model, device) as head, head_at(dense, device) as dense_head:
            for item in zip(found, expected, batches, strict=True):
                states, teacher, ids = (tensor.to(device or tensor.device) for tensor in item)
                total += objective(states, teacher, ids, head, dense_head)["kl"].item()
        return total / len(batches)

    return distance


@dataclass(frozen=True)
class _Group:
    """Linears of a block that read the same tensor.

    Attributes:
        places: of the linears.
        writes: whether the one linear writes the stream, plainly, so that it can take back what the stream lacks.
        next_norm: path of the norm that reads the stream next; None is the next block's.
    """

    places: list[BlockLinear]
    writes: bool
    next_norm: str | None

    def watched(self, model: nn.Module) -> list[nn.Module]:
        """What must be seen of it: its input and, if there is one, the norm that follows."""
        names = [self.places[0].name, *([self.next_norm] if self.next_norm else [])]
        return [module_at(model, name) for name in names]


def _groups(config: Any, members: Sequence[BlockLinear]) -> list[_Group]:
    """The groups of a block, in data-flow order."""
    # A stream that changes basis on the way has no space any more, but is written as plainly as before.
    plain = "residual" in available_spaces(config) or bool(getattr(config, "shortcuts", None))
    sublayers = residual_sublayers(config)
    norms: dict[str, str | None] = {
        sublayer.writer: following.norm for sublayer, following in pairwise([*sublayers, Sublayer("", "")])
    }
    found = []
    for places in by_group(members):
        spec, block = places[0].spec, places[0].name.removesuffix(places[0].spec.path)
        writes = plain and spec.writes == "residual"
        norm = norms.get(spec.path) if writes else None
        found.append(_Group(places, writes, block + norm if norm else None))
    return found


def _fit(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Sequence[Tensor],
    damping: float,
    dtype: torch.dtype | None,
    device: torch.device | None,
    progress: Progress,
) -> None:
    """One pass through the blocks; every group of linears sees what its updated predecessors give."""
    config: Any = pruned.config
    dense_replay, pruned_replay = (BlockReplay(model, batches, dtype, device) for model in (dense, pruned))
    for layer, members in progress(by_block(block_linears(config)), "updating block by block"):
        with visiting(dense_replay.blocks[layer], device), visiting(pruned_replay.blocks[layer], device):
            groups = _groups(config, members)
            modules = [module for group in groups for module in group.watched(dense)]
            # What the dense block's modules get, in the same order, and its output.
            expected = list(dense_replay.watch(layer, modules, with_output=True))
            first = 0
            for group in groups:
                own = group.watched(pruned)
                found = pruned_replay.watch(layer, own, with_output=group.writes and group.next_norm is None)
                last = first + 1 if group.next_norm else -1
                pairs = ((items[first], items[last]) for items in expected)
                _fit_group(pruned, dense, group, zip(pairs, found, strict=True), damping)
                first += len(own)
            dense_replay.states = [items[-1] for items in expected]
            pruned_replay.advance(layer)


def _fit_group(
    pruned: nn.Module,
    dense: nn.Module,
    group: _Group,
    batches: Iterable[tuple[tuple[Tensor, Tensor], list[Tensor]]],
    damping: float,
) -> None:
    """Least squares for one group, with x̃ the inputs of the pruned model and x those of the dense one.

    Readers: min ‖V x̃ − W x‖², hence B = W E[x x̃ᵀ]. Writers, whose sum with the stream is s̃ and should be s:
    min ‖V x̃ − (V₀ x̃ + s − s̃)‖², hence B = V₀ E[x̃ x̃ᵀ] + E[(s − s̃) x̃ᵀ].

    Args:
        batches: ((x, s), [x̃, s̃]), each (sequences, seq_len, features); s and s̃ are used for writers only.
    """
    linears = [module_at(pruned, place.name) for place in group.places]
    dtype = at_least_float32(linears[0].weight.dtype)
    V = torch.cat([linear.weight for linear in linears]).to(dtype)
    H = cross = torch.zeros((), device=V.device)
    tokens = 0
    for (x, s), found in batches:
        # Moved before they are cast: their own dtype may be half as wide.
        x_pruned = found[0].to(V.device).flatten(0, -2).to(V)
        H = H + x_pruned.mT @ x_pruned
        wanted = s.to(V.device) - found[-1].to(V.device) if group.writes else x.to(V.device)
        cross = cross + wanted.flatten(0, -2).to(V).mT @ x_pruned
        tokens += len(x_pruned)
    H, cross = H / tokens, cross / tokens
    if group.writes:
        B = V @ H + cross
    else:
        B = torch.cat([module_at(dense, place.name).weight for place in group.places]).to(dtype) @ cross
    damped = damped_hessian(Moment(H[None]), damping, H.dtype)
    norms, unit = normalise(damped)
    B = B + V * (damped - H).diagonal()  # the damping pulls to the weights as they are
    fitted = conjugate_gradients(V * norms, B / norms, unit, V != 0, _REFINEMENTS) / norms
    for linear, weight in zip(linears, fitted.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight.copy_(weight)
