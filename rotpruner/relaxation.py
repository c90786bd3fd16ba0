"""What the surrogates with a temperature need besides the rotations: the step of the moment, and logits that learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rotpruner.layout import BlockLinear
from rotpruner.patterns import NM, Pattern, Slice
from rotpruner.precision import at_least_float32
from rotpruner.pruners import Pruner
from rotpruner.rotations import Sites, sides
from rotpruner.seeds import generator_of
from rotpruner.statistics import Moment
from rotpruner.surrogates import Surrogate, gumbel, likeliest_mask, nm_choices, prior_logits, sigmoid


class Relaxation(nn.Module):
    """Passes each linear's mask through a surrogate, at the temperature of the moment.

    Args:
        config: of the model.
        surrogate: how.
        pruner, pattern: that choose the masks.
        weights: of the decoder linears by their places, (O, I) each.
        seed: of `gumbel`'s noise, which is a function of it, the step and the linear: alike on all ranks and after a
            resume, on one kind of device.
    """

    begun: Tensor

    def __init__(
        self,
        config: Any,
        surrogate: Surrogate,
        pruner: Pruner,
        pattern: Pattern | Slice,
        weights: Mapping[BlockLinear, Tensor],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.surrogate, self.pruner, self.pattern, self.seed = config, surrogate, pruner, pattern, seed
        self.numbers = {place.name: number for number, place in enumerate(weights)}
        self.places = list(weights)
        self.step, self.temperature = 0, surrogate.temperature
        self._softened = False
        self._moments: dict[str, Moment] = {}
        self._patterns: Mapping[str, Pattern] = {}
        self.logits = nn.ParameterList()
        if surrogate.learns_masks:
            assert isinstance(pattern, NM)
            choices = len(nm_choices(pattern))
            for weight in weights.values():
                shape = (weight.shape[0], weight.shape[1] // pattern.m, choices)
                dtype = at_least_float32(weight.dtype)
                self.logits.append(nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device)))
            #: Whether the logits have got their start from the pruner's masks.
            self.register_buffer("begun", torch.tensor(False))

    def advance(self, step: int, steps: int) -> None:
        """Go to a step of a run, counted from 0: it decides the temperature and the noise."""
        self.step, self.temperature = step, self.surrogate.temperature_at(step, steps)

    def enter(
        self, rotations: Sites, moments: Mapping[str, Moment], patterns: Mapping[str, Pattern], softened: bool
    ) -> None:
        """Before the model runs: in these rotations, through the surrogate or with hard masks as in evaluation.

        `sigmoid` gets the rotated diagonals of the statistics here, once for all linears that read one input.
        """
        self._softened, self._moments, self._patterns = softened, {}, patterns
        if not (softened and self.surrogate.follows_saliency):
            return
        for place in self.places:
            if place.leads_group and place.group in moments:
                reads = sides(self.config, rotations, place)[0]
                # Made again in the backward pass, which is cheap: its factors are as large as the rotation.
                diagonal = checkpoint(_rotated_diagonal, moments[place.group], reads, use_reentrant=False)
                self._moments[place.group] = Moment(diagonal[:, None, None])

    def leave(self) -> None:
        """Let go of the last step's graph."""
        self._moments = {}

    def masked(self, place: BlockLinear, weight: Tensor, mask: Tensor) -> Tensor:
        """W' (O, I) of a linear under its mask (O, I)."""
        if not self.surrogate.anneals:
            return self.surrogate(weight, mask)
        if not self._softened:
            return weight * mask
        if self.surrogate.follows_saliency:
            if not self._patterns[place.name].sparsity:
                return weight  # none of it can go, so no threshold is near
            saliency = self.pruner.saliency(weight, self._moments.get(place.group))
            return sigmoid(weight, mask, saliency, self._patterns[place.name], self.temperature)
        assert isinstance(self.pattern, NM)
        logits = self.logits[self.numbers[place.name]]
        return gumbel(weight, logits, self.noise(place, logits), self.pattern, self.temperature)

    def noise(self, place: BlockLinear, logits: Tensor) -> Tensor:
        """Gumbel(0, 1) noise of the current step for a linear's logits (O, G, K): −log of exponential noise."""
        generator = generator_of(self.seed, self.step, place.name, device=logits.device)
        drawn = torch.empty_like(logits, requires_grad=False).exponential_(generator=generator)
        return drawn.clamp_min_(torch.finfo(drawn.dtype).tiny).log_().neg_()

    # -- masks that are learned ------------------------------------------------------------------

    @property
    def learns_masks(self) -> bool:
        """Whether masks are the logits' by now, no longer the pruner's."""
        return self.surrogate.learns_masks and bool(self.begun)

    @torch.no_grad()
    def begin(self, masks: Sequence[Tensor]) -> None:
        """Start the logits, if there are any, from the pruner's masks (O, I) of all linears; once in a run."""
        if not self.surrogate.learns_masks or self.learns_masks:
            return
        assert isinstance(self.pattern, NM)
        for logits, mask in zip(self.logits, masks, strict=True):
            logits.copy_(prior_logits(mask, self.pattern, self.surrogate.strength))
        self.begun.fill_(True)

    @torch.no_grad()
    def masks(self) -> list[Tensor]:
        """The masks (O, I) that the logits prefer, of all linears."""
        assert isinstance(self.pattern, NM)
        return [likeliest_mask(logits, self.pattern) for logits in self.logits]


def _rotated_diagonal(moment: Moment, reads: Tensor | None) -> Tensor:
    return moment.rotate(reads).diagonal()
