"""Going on after an update: a dense model takes over the weights that a pruned one has kept.

An update of kept weights (`rotpruner.compensation`) makes up for the weights that are gone, and rotations that were
learned before it are no longer the best ones. To train them further, the model gets a weight that is, in the basis in
which it was pruned, what the pruned model keeps, and its own where that has zeros. Under the same mask it is the pruned
model; under others it lends what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.fusion import check_foldable, folded, reset_block_norms
from rotpruner.layout import BlockLinear, block_linears, module_at
from rotpruner.objectives import Objective
from rotpruner.orthogonal import is_order, rotate_weight
from rotpruner.patterns import Pattern, Slice
from rotpruner.pruners.magnitude import Magnitude
from rotpruner.rotations import check_rotation, sides
from rotpruner.surrogates import Surrogate

#: The least cosine between what is kept and the weights that it came of: SmolLM2's updates have left 0.92 and more.
_ALIKE = 0.5

#: Prunes a model that has taken over kept weights, under their masks: another pruner might fit a second time what an
#: update has fitted already.
MASKS_ONLY = Magnitude()


@torch.no_grad()
def take_kept_weights(model: nn.Module, pruned: nn.Module, rotations: Mapping[str, Tensor]) -> None:
    """Give a dense model, in its own basis, the weights that a pruned one has kept; in place.

    The norms of its blocks are fused if the residual stream rotates. Products are taken in float64, and every weight is
    rounded once.

    Args:
        model: dense.
        pruned: that came of it in the rotated basis; a weight that is zero there counts as pruned.
        rotations: of that basis.

    Raises:
        InputError: the pruned model did not come of this one, has no zeros, or its first block has little to do with
            this one in that basis; the model is as it was.
    """
    check_kept_weights(model.config, pruned.config)
    for space, Q in rotations.items():
        check_rotation(model.config, space, Q)
    places = block_linears(model.config)
    if not any((module_at(pruned, place.name).weight == 0).any() for place in places):
        raise InputError("no decoder weight of the pruned model is zero, so nothing tells what it has kept")
    turned = "residual" in rotations
    if turned:
        check_foldable(model)
    for place in places:
        if place.layer == 0:
            own, kept, _, _ = _side_by_side(model, pruned, rotations, place)
            _check_alike(own, kept, place.name)
    for place in places:
        module = module_at(model, place.name)
        own, kept, bias, undo = _side_by_side(model, pruned, rotations, place)
        module.weight.copy_(undo(torch.where(kept != 0, kept, own)))
        if bias is not None:
            module.bias.copy_(bias)
    if turned:
        reset_block_norms(model)


def _side_by_side(
    model: nn.Module, pruned: nn.Module, rotations: Mapping[str, Tensor], place: BlockLinear
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """A linear's own weight (O, I) in the rotated basis and the pruned one's, both float64; the own bias, and the way
    back from that basis."""
    weight, bias = folded(model, place, norms="residual" in rotations)
    device = weight.device
    reads, writes = (
        None if Q is None else Q.to(device) if is_order(Q) else Q.to(device, torch.float64)
        for Q in sides(model.config, rotations, place)
    )
    kept = module_at(pruned, place.name).weight.to(device, torch.float64)
    back = _back(reads), _back(writes)
    return rotate_weight(weight, reads, writes), kept, bias, lambda weight: rotate_weight(weight, *back)


def _check_alike(own: Tensor, kept: Tensor, name: str) -> None:
    # An update moves weights by a part of their size; those of another basis have nothing to do with each other.
    cosine = F.cosine_similarity(torch.where(kept != 0, own, 0).flatten(), kept.flatten(), dim=0).item()
    if not cosine > _ALIKE:
        raise InputError(
            f"{name} of the pruned model is not what pruning would leave of this model in these rotations (the cosine "
            f"is {cosine:.2f}); give the rotations and the export of one run of this model"
        )


def kept_masks(pruned: nn.Module, patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """What a pruned model keeps of each decoder linear, (O, I) bool by name.

    Args:
        pruned: plain model.
        patterns: by name; one of no sparsity gives back what was removed.

    Raises:
        InputError: a linear has another pattern.
    """
    masks = {}
    for name, pattern in patterns.items():
        weight = module_at(pruned, name).weight
        if not pattern.holds(weight):
            raise InputError(f"{name} of the pruned model does not keep to the pattern {pattern}; give its own")
        masks[name] = weight != 0 if pattern.sparsity else torch.ones_like(weight, dtype=torch.bool)
    return masks


def check_kept_weights(config: Any, pruned: Any) -> None:
    """Raise `InputError` if a pruned model, by its config, did not come of the model of another config."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in names:
        own, given = getattr(config, name, None), getattr(pruned, name, None)
        if own != given:
            raise InputError(
                f"the pruned model has a {name} of {given}, the model one of {own}; "
                "give the export of a fit or prune of this model"
            )


def check_takes_weights(
    option: str, surrogate: Surrogate, objective: Objective, pattern: Pattern | Slice, sharded: bool = False
) -> None:
    """Raise `InputError` if learning cannot continue from what a pruned model has kept, as an `option` asks for."""
    if surrogate.follows_saliency or objective.lost_mass:
        which = f"surrogate {surrogate.name}" if surrogate.follows_saliency else "objective lost_mass"
        raise InputError(f"{option} keeps the masks, and {which} is for those that change: take another one")
    if surrogate.learns_masks or isinstance(pattern, Slice):
        which = f"surrogate {surrogate.name}" if surrogate.learns_masks else f"pattern {pattern}"
        raise InputError(f"{option} keeps masks that a pruner has chosen, and {which} has none: give {option} null")
    if sharded:
        raise InputError(
            f"{option} changes whole weights, which ModelParallelStrategy shards: use ddp, or give {option} null"
        )


def _back(Q: Tensor | None) -> Tensor | None:
    """The rotation that undoes one."""
    if Q is None:
        return None
    return Q.argsort() if is_order(Q) else Q.mT
