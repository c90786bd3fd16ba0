"""Magnitude pruning: small weights go (Han et al., 2015, arXiv:1506.02626)."""

from __future__ import annotations

from torch import Tensor

from rotpruner.pruners.base import Pruner
from rotpruner.statistics import Moment


class Magnitude(Pruner):
    """Saliency |W_ij|; looks at no data."""

    needs = "nothing"

    def saliency(self, weight: Tensor, moment: Moment | None) -> Tensor:
        return weight.abs().float()
