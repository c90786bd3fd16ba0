"""How concentrated importance is: what a basis can be judged by without running the model.

Importance is what removing a weight costs by a pruner's own score: W'² E[x'²] of Wanda, W'² / [H'⁻¹] of SparseGPT. The
fewer weights hold it, the less pruning takes away.
Shapes: O, I = outputs and inputs of a linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotpruner.patterns import Pattern


def entropy(importance: Tensor, dim: int) -> Tensor:
    """−Σ p log p along a dimension, in nats, of importance (O, I) ≥ 0 normalised there; the mean over the other one.

    (DenoiseRotator, 2025, arXiv:2505.23049.) Rows or columns without importance count as zero.
    """
    total = importance.sum(dim, keepdim=True)
    p = importance / torch.where(total > 0, total, 1.0)
    # Where p is 0 its logarithm must have a finite gradient.
    return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny)).sum(dim).mean()


def concentration_entropy(importance: Tensor, reads: bool, writes: bool) -> Tensor:
    """The sum of the entropies that a rotation can lower: along the inputs if what is read rotates, along the outputs
    if what is written does."""
    found = [entropy(importance, dim) for dim, rotates in ((1, reads), (0, writes)) if rotates]
    return torch.stack(found).sum() if found else importance.new_zeros(())


def lost_mass(importance: Tensor, pattern: Pattern) -> Tensor:
    """The share of importance (O, I) that a pattern's best mask removes; the mask counts as a constant."""
    kept = pattern.mask(importance.detach())
    total = importance.sum()
    return 1 - (importance * kept).sum() / torch.where(total > 0, total, 1.0)
