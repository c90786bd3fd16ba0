"""Wanda: weights times the norm of their inputs (Sun et al., 2024, arXiv:2306.11695, equation 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from rotpruner.pruners.base import Pruner
from rotpruner.statistics import Moment


class Wanda(Pruner):
    """Saliency |W_ij| · ‖x_j‖₂, with the root mean square in place of the norm: one factor for all, same masks."""

    def saliency(self, weight: Tensor, moment: Moment | None) -> Tensor:
        assert moment is not None
        # A dead input has a gradient of 0, not of infinity.
        return weight.abs().float() * moment.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
