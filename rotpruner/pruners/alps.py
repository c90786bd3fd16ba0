"""ALPS: masks by ADMM, weights by conjugate gradients (Meng et al., NeurIPS 2024, arXiv:2406.07831).

Shapes: O = output features, I = input features.

The problem is min_W tr((W − Ŵ) H (W − Ŵ)ᵀ) with W in the pattern. It is solved in inputs of unit size:
with n = √diag H, W n replaces W and H / (n nᵀ) replaces H (section 3.3), so that the projection onto the
pattern keeps the largest |W_ij| n_j, as Wanda would, and diag H = 1 is its own Jacobi preconditioner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotpruner.patterns import Pattern
from rotpruner.precision import at_least_float32
from rotpruner.pruners.reconstruction import ReconstructionPruner, conjugate_gradients, damped_hessian, normalise
from rotpruner.statistics import Moment

#: ρ of the first step, and the number of steps between two looks at the support (section 3.2).
_FIRST_PENALTY = 0.1
_STEPS_PER_PENALTY = 3

#: (least share of the support that has changed, growth of ρ): the first row that fits holds.
_PENALTY_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


class ALPS(ReconstructionPruner):
    """ADMM finds the mask, conjugate gradients the best weights under it.

    `saliency` is SparseGPT's: ADMM has no scores of its own.

    Args:
        damping: λ = damping · mean(diag H) is added to H's diagonal.
        max_steps: ADMM steps at most; it stops as soon as the mask stands still.
        refinements: steps of conjugate gradients on the kept weights at most.
    """

    def __init__(self, damping: float = 0.01, max_steps: int = 300, refinements: int = 30) -> None:
        super().__init__(damping)
        self.max_steps, self.refinements = max_steps, refinements

    @torch.no_grad()
    def prune(
        self, weight: Tensor, moment: Moment | None, pattern: Pattern, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert moment is not None
        dtype = at_least_float32(weight.dtype)
        key = (self.damping, dtype)
        norms, H = moment.derive(("normalised", *key), lambda moment: normalise(damped_hessian(moment, *key)))
        dense = weight.to(dtype) * norms
        if mask is None:
            eigen = moment.derive(("eigen", *key), lambda _: _eigen(H))
            start, mask = admm(dense, eigen, pattern, self.max_steps)
        else:
            start = dense * mask
        pruned = conjugate_gradients(start, dense @ H, H, mask, self.refinements)
        return (pruned / norms).to(weight.dtype), mask


def _eigen(H: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (I,) and eigenvectors (I, I): float64 arithmetic, since the masks feel float32's rounding."""
    values, vectors = torch.linalg.eigh(H.double())
    return values.to(H.dtype), vectors.to(H.dtype)


def admm(dense: Tensor, eigen: tuple[Tensor, Tensor], pattern: Pattern, max_steps: int) -> tuple[Tensor, Tensor]:
    """Weights that lie in the pattern and their mask, both (O, I), for normalised inputs (algorithm 1).

    With W the weights, D their copy in the pattern and V the multiplier of W = D, a step is

        W ← (Ŵ H − V + ρ D) (H + ρ I)⁻¹,    D ← P(W + V / ρ),    V ← V + ρ (W − D).

    W is computed as Ŵ + (ρ (D − Ŵ) − V) (H + ρ I)⁻¹, which is the same and loses no digits to Ŵ H.

    Args:
        dense: Ŵ, (O, I).
        eigen: eigenvalues (I,) and eigenvectors (I, I) of H, whose diagonal is 1; a new ρ costs one product.
        pattern: P keeps its largest weights.
        max_steps: steps at most.
    """
    values, vectors = eigen
    V = torch.zeros_like(dense)
    settled = mask = pattern.mask(dense.abs())
    D = dense * mask
    penalty = _FIRST_PENALTY
    for step in range(max_steps):
        if step % _STEPS_PER_PENALTY == 0:
            inverse = (vectors / (values + penalty)) @ vectors.mT
        W = dense + (penalty * (D - dense) - V) @ inverse
        shifted = W + V / penalty
        mask = pattern.mask(shifted.abs())
        D = shifted * mask
        V = penalty * (shifted - D)
        if (step + 1) % _STEPS_PER_PENALTY == 0:
            changed = (mask != settled).sum().item()
            if not changed:
                break
            share = changed / mask.sum().item()
            penalty *= next(growth for least, growth in _PENALTY_GROWTH if share >= least)
            settled = mask
    return D, mask
