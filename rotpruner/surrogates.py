"""Mask surrogates: how the gradient passes the hard mask M (True = keep). Each is one function.

All but `gumbel` compute W' ⊙ M going forward; they differ in the gradient that they send to W', with g the gradient
at W' ⊙ M. The frozen weights stand still, so the gradient goes on to the rotations inside W'.

Shapes: O = output features, I = input features, G = groups of M neighbours in a row (I = G·M), K = choices of N of M.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rotpruner.allotment import Allotment
from rotpruner.errors import InputError
from rotpruner.objectives import Objective
from rotpruner.patterns import NM, Pattern, Slice
from rotpruner.pruners import Pruner

SurrogateName = Literal["constant", "straight_through", "sr_ste", "sigmoid", "gumbel"]

#: Choices of N of M for which `gumbel` holds a logit each: 2:4 has 6, 4:8 has 70, 8:16 has 12,870.
_MOST_CHOICES = 100


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


def sigmoid(weight: Tensor, mask: Tensor, saliency: Tensor, pattern: Pattern, temperature: float) -> Tensor:
    """The hard mask going forward, `soft_mask` for its gradient: g ⊙ M at W', and g ⊙ W' at the soft mask.

    The loss is thus that of the model which is pruned, at every temperature; a soft mask going forward would also leave
    weights of which each counts a part only, and rotations would learn for those.

    Args:
        weight, mask: (O, I).
        saliency: of the weight as it is now, (O, I), with the gradient that leads to the rotations.
        pattern: of the mask.
        temperature: see `soft_mask`.
    """
    soft = soft_mask(saliency, mask, pattern, temperature)
    # The second product is zero.
    return weight * mask + weight * (soft - soft.detach()).to(weight.dtype)


def soft_mask(saliency: Tensor, mask: Tensor, pattern: Pattern, temperature: float) -> Tensor:
    """σ((s − t) / (T s̄)) (O, I), the hard mask in the limit T → 0.

    The threshold t lies halfway between the least salient weight that the mask keeps and the most salient one that it
    removes, among each weight's rivals; it moves with them, so that rivals push each other out. The unit of the
    temperature T is the linear's mean saliency s̄, a constant to the gradient.
    """
    rivals, kept = pattern.rivals(saliency), pattern.rivals(mask)
    least = rivals.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    most = rivals.masked_fill(kept, -math.inf).amax(-1, keepdim=True)
    # Where all or none are kept there is one of the two.
    threshold = (torch.where(least.isinf(), most, least) + torch.where(most.isinf(), least, most)) / 2
    unit = temperature * saliency.detach().mean().clamp_min(torch.finfo(saliency.dtype).tiny)
    return ((rivals - threshold) / unit).sigmoid().reshape(saliency.shape)


def gumbel(weight: Tensor, logits: Tensor, noise: Tensor, pattern: NM, temperature: float) -> Tensor:
    """W' ⊙ Σ_k p_k S_k, with S_k the choices of N of M and p = softmax((logits + noise) / T) (Gumbel-softmax).

    (MaskLLM, Fang et al., 2024, arXiv:2409.17481, its differentiable mask sampling.) Each group of weights draws a mask
    from the categorical distribution of its logits; it hardens as T falls. The gradient is exact for the noise drawn.

    Args:
        weight: (O, I).
        logits: learned, (O, G, K).
        noise: Gumbel(0, 1), (O, G, K).
    """
    chances = ((logits + noise) / temperature).softmax(-1)
    return weight * (chances @ nm_choices(pattern).to(chances)).flatten(-2).to(weight.dtype)


def nm_choices(pattern: NM) -> Tensor:
    """The masks of one group, (K, M) float32: every choice of N of M in lexicographic order."""
    kept = list(combinations(range(pattern.m), pattern.n))
    return torch.zeros(len(kept), pattern.m).scatter_(1, torch.tensor(kept), 1.0)


def prior_logits(mask: Tensor, pattern: NM, strength: float) -> Tensor:
    """Logits (O, G, K) that prefer a mask (O, I): `strength` nats for each kept weight that a choice shares with it.

    (MaskLLM's mask prior, without its random part.)
    """
    groups = pattern.rivals(mask).float()
    return strength * groups @ nm_choices(pattern).to(groups).mT


def likeliest_mask(logits: Tensor, pattern: NM) -> Tensor:
    """The mask (O, I) bool of the largest logits (O, G, K)."""
    return nm_choices(pattern).bool().to(logits.device)[logits.argmax(-1)].flatten(-2)


class Kind(NamedTuple):
    """A surrogate's function and what it needs.

    Attributes:
        masked: (weight, mask, decay) → W' ⊙ M with its gradient; None of one that needs more, which `Relaxation` gives.
        anneals: it has a temperature.
        learns_masks: the pruner's masks are only where it begins.
        follows_saliency: it reads the saliency, in the rotations of every step.
        keeps_unmasked: its gradient reads the weights that the mask removes.
    """

    masked: Callable[[Tensor, Tensor, float], Tensor] | None = None
    anneals: bool = False
    learns_masks: bool = False
    follows_saliency: bool = False
    keeps_unmasked: bool = False


SURROGATES: dict[SurrogateName, Kind] = {
    "constant": Kind(constant),
    "straight_through": Kind(straight_through),
    "sr_ste": Kind(sr_ste, keeps_unmasked=True),
    "sigmoid": Kind(anneals=True, follows_saliency=True),
    "gumbel": Kind(anneals=True, learns_masks=True),
}


@dataclass(frozen=True)
class Surrogate:
    """A surrogate and its settings.

    Attributes:
        name: of the function; `gumbel` learns logits beside the rotations, of which the final masks are taken.
        decay: λ of `sr_ste`.
        temperature, final_temperature: of `sigmoid` and `gumbel` at the first and at the last step; geometric between.
        lr: of `gumbel`'s logits, instead of the optimiser's own.
        strength: of the pruner's first masks in `gumbel`'s logits, in nats per weight.
    """

    name: SurrogateName = "constant"
    decay: float = 2e-5
    temperature: float = 1.0
    final_temperature: float = 0.1
    lr: float = 0.05
    strength: float = 3.0

    def __post_init__(self) -> None:
        if self.name not in SURROGATES:
            raise InputError(f"unknown surrogate '{self.name}'; choose one of {', '.join(SURROGATES)}")
        for field in ("decay", "strength"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(f"surrogate {field} {getattr(self, field):g} is not a finite number >= 0")
        if not 0 < self.final_temperature <= self.temperature < math.inf:
            raise InputError(
                f"surrogate temperature {self.temperature:g} cannot fall to final_temperature "
                f"{self.final_temperature:g}; give positive numbers, the first not below the second"
            )
        if not 0 < self.lr < math.inf:
            raise InputError(f"surrogate lr {self.lr:g} is not a positive number")

    @property
    def anneals(self) -> bool:
        """See `Kind`."""
        return SURROGATES[self.name].anneals

    @property
    def learns_masks(self) -> bool:
        """See `Kind`."""
        return SURROGATES[self.name].learns_masks

    @property
    def follows_saliency(self) -> bool:
        """See `Kind`."""
        return SURROGATES[self.name].follows_saliency

    @property
    def keeps_unmasked(self) -> bool:
        """See `Kind`."""
        return SURROGATES[self.name].keeps_unmasked

    def temperature_at(self, step: int, steps: int) -> float:
        """The temperature of one of a run's steps, counted from 0."""
        progress = min(1.0, step / max(1, steps - 1))
        return self.temperature * (self.final_temperature / self.temperature) ** progress

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        """W' ⊙ M with the surrogate's gradient; both (O, I).

        Raises:
            InputError: it needs more than these two.
        """
        masked = SURROGATES[self.name].masked
        if masked is None:
            raise InputError(
                f"surrogate {self.name} needs more than weight and mask: call rotpruner.surrogates.{self.name}"
            )
        return masked(weight, mask, self.decay)


def check_surrogate(
    surrogate: Surrogate,
    allotment: Allotment,
    pruner: Pruner,
    objective: Objective,
) -> None:
    """Raise `InputError` if a surrogate does not go with the other settings of a fit."""
    pattern, exceptions = allotment.pattern, allotment.exceptions
    if isinstance(pattern, Slice) and surrogate.name != "constant":
        raise InputError(f"surrogate {surrogate.name} is of masks, and pattern {pattern} has none; set it to constant")
    if surrogate.follows_saliency:
        if pruner.rebuilds:
            raise InputError(
                f"surrogate {surrogate.name} follows the saliency that chooses the masks, and {type(pruner).__name__} "
                "chooses them while it updates the weights; use wanda, ria or magnitude"
            )
        if pruner.needs == "full":
            raise InputError(
                f"surrogate {surrogate.name} rotates only the diagonal of the statistics at every step, and "
                f"{type(pruner).__name__} reads all of them; use wanda, ria or magnitude"
            )
    if surrogate.learns_masks:
        if exceptions:
            raise InputError(
                f"surrogate {surrogate.name} learns masks of one pattern: leave out the exceptions "
                f"{', '.join(exceptions)}, or take another surrogate"
            )
        if not isinstance(pattern, NM):
            raise InputError(
                f"surrogate {surrogate.name} learns which N of M weights stay, and pattern {pattern} is not N:M; "
                "give one such as 2:4, or another surrogate"
            )
        if (choices := math.comb(pattern.m, pattern.n)) > _MOST_CHOICES:
            raise InputError(
                f"surrogate {surrogate.name} learns a logit for each choice, and {pattern} has {choices:,} choices a "
                "group; 2:4 has 6, 4:8 has 70"
            )
        if objective.lost_mass:
            raise InputError(
                f"surrogate {surrogate.name} learns which weights stay, and lost_mass is of those that the pruner "
                "would keep; set it to 0, or take another surrogate"
            )
        if not objective.runs_model:
            raise InputError(
                f"surrogate {surrogate.name} learns masks from the model's outputs, and no objective looks at them; "
                "give kl, cross_entropy or cosine a weight"
            )
