"""Mask surrogates: how the gradient passes the hard mask M (True = keep). Each is one function.

All compute W' ⊙ M going forward; they differ in the gradient that they send to W', with g the gradient
at W' ⊙ M. The frozen weights stand still, so the gradient goes on to the rotations inside W'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotpruner.errors import InputError


def constant(weight: Tensor, mask: Tensor, decay: float = 0.0) -> Tensor:
    """The mask is a constant: the gradient is g ⊙ M."""
    return weight * mask


def straight_through(weight: Tensor, mask: Tensor, decay: float = 0.0) -> Tensor:
    """The mask is invisible to the gradient: it is g (Bengio et al., 2013, arXiv:1308.3432)."""
    return _MaskedForward.apply(weight, mask, 0.0)


def sr_ste(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Straight-through plus a pull of the pruned weights to zero: g + λ (1 − M) ⊙ W'.

    (Zhou et al., 2021, arXiv:2102.04010, equation 9.) With frozen weights that is straight-through plus
    the penalty λ/2 ‖(1 − M) ⊙ W'‖² on the rotations; λ = `decay` counts once per backward pass.
    """
    return _MaskedForward.apply(weight, mask, decay)


class _MaskedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.decay = decay
        if decay:
            ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            gradient = gradient + ctx.decay * weight.masked_fill(mask, 0)
        return gradient, None, None


SURROGATES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "constant": constant,
    "straight_through": straight_through,
    "sr_ste": sr_ste,
}


@dataclass(frozen=True)
class Surrogate:
    """A surrogate and its setting.

    Attributes:
        name: a key of `SURROGATES`.
        decay: λ of `sr_ste`; the others ignore it.
    """

    name: str = "constant"
    decay: float = 2e-5

    def __post_init__(self) -> None:
        if self.name not in SURROGATES:
            raise InputError(f"unknown surrogate '{self.name}'; choose one of {', '.join(SURROGATES)}")
        if self.decay < 0:
            raise InputError(f"surrogate decay {self.decay:g} is negative; give 0 or more")

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        """W' ⊙ M with this surrogate's gradient; both (O, I)."""
        return SURROGATES[self.name](weight, mask, self.decay)
