"""RIA: relative importance and activations (Zhang et al., 2024, "Plug-and-Play", OpenReview Tr0lPx9woF)."""

from __future__ import annotations

import torch
from torch import Tensor

from rotpruner.pruners.base import Pruner
from rotpruner.statistics import Moment


class RIA(Pruner):
    """Saliency (|W_ij| / Σ_k |W_ik| + |W_ij| / Σ_k |W_kj|) · ‖x_j‖₂ᵃ, with the root mean square for the norm.

    The sums make a weight's importance relative to its row and to its column, so that no channel is
    pruned whole.

    Args:
        exponent: a, the weight of the activations.
    """

    def __init__(self, exponent: float = 0.5) -> None:
        self.exponent = exponent

    def saliency(self, weight: Tensor, moment: Moment | None) -> Tensor:
        assert moment is not None
        size = weight.abs().float()
        # A row or column of zeros has importance 0, not 0/0; a dead input a gradient of 0, not of infinity.
        tiny = torch.finfo(size.dtype).tiny
        relative = size / size.sum(1, keepdim=True).clamp_min(tiny) + size / size.sum(0).clamp_min(tiny)
        return relative * moment.diagonal().float().clamp_min(tiny) ** (self.exponent / 2)
