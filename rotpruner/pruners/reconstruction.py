"""What those share that rebuild a linear's output: the damped Hessian, its factor, the OBS saliency, least squares.

Shapes: O = output features, I = input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.patterns import Pattern
from rotpruner.precision import at_least_float32
from rotpruner.pruners.base import Pruner
from rotpruner.statistics import Moment

#: How often the damping may grow tenfold before the Hessian is refused.
_ATTEMPTS = 6

#: Conjugate gradients stop when every row's gradient is this small against its first, at W = 0.
_TOLERANCE = 1e-4


class ReconstructionPruner(Pruner):
    """Chooses the mask while it updates the weights; its saliency is that of the untouched weight.

    Args:
        damping: λ = damping · mean(diag H) is added to H's diagonal.
    """

    needs = "full"
    rebuilds = True

    def __init__(self, damping: float) -> None:
        if damping <= 0:
            raise InputError(f"damping {damping:g} is not positive; 0.01 is usual")
        self.damping = damping

    def saliency(self, weight: Tensor, moment: Moment | None) -> Tensor:
        return obs_saliency(weight, moment, self.damping)

    def importance(self, weight: Tensor, moment: Moment | None) -> Tensor:
        return self.saliency(weight, moment)  # a squared error already

    def mask(self, weight: Tensor, moment: Moment | None, pattern: Pattern) -> Tensor:
        return self.prune(weight, moment, pattern)[1]


def damped_hessian(moment: Moment, damping: float, dtype: torch.dtype) -> Tensor:
    """H + damping · mean(diag H) · I, (I, I). A dead input's row holds nothing else, so it sees no other input.

    Raises:
        InputError: H is not finite.
    """
    H = moment.full().to(dtype)
    mean = H.diagonal().mean()
    if not H.isfinite().all():
        raise InputError("the second moment of a linear's input is not finite; check the model and its dtype")
    # Without any activation the weights themselves must decide: the identity does that.
    return H + torch.diag(torch.where(mean > 0, damping * mean, 1.0).expand(len(H)))


def upper_factor(moment: Moment, damping: float, dtype: torch.dtype) -> Tensor:
    """Upper R (I, I) with R Rᵀ the damped Hessian; linears that read one moment share it.

    Raises:
        InputError: H is not finite, or no covariance at all.
    """
    return moment.derive(("upper_factor", damping, dtype), lambda moment: _factor(moment, damping, dtype))


def _factor(moment: Moment, damping: float, dtype: torch.dtype) -> Tensor:
    for attempt in range(_ATTEMPTS):
        H = damped_hessian(moment, damping * 10**attempt, dtype)
        # Reversing both axes turns LAPACK's lower factor into the upper one.
        L, failure = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failure:
            return L.flip(0, 1)
    raise InputError(
        f"the second moment of a linear's {len(H)} inputs is not positive semidefinite, even with "
        f"{damping * 10 ** (_ATTEMPTS - 1):g} of its mean diagonal added; gather it in float32 or float64"
    )


def obs_saliency(weight: Tensor, moment: Moment | None, damping: float) -> Tensor:
    """w² / [H⁻¹]_jj (O, I): the loss of removing one weight (equation 3 of SparseGPT; Hassibi & Stork, 1992)."""
    assert moment is not None
    W = weight.to(at_least_float32(weight.dtype))

    def inverse(moment: Moment) -> Tensor:
        R = _factor(moment, damping, W.dtype)
        U = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
        return U.mT @ U

    # The damping is a multiple of the identity, the same in every basis.
    return (W.square() / moment.inverse((damping, W.dtype), inverse).diagonal()).float()


def normalise(H: Tensor) -> tuple[Tensor, Tensor]:
    """√diag H, (I,), and H with diagonal 1, (I, I)."""
    norms = H.diagonal().sqrt()
    return norms, H / norms / norms[:, None]


def conjugate_gradients(start: Tensor, target: Tensor, H: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Lower tr(W H Wᵀ) − 2 tr(B Wᵀ) over the weights in the mask, every row its own problem.

    (Algorithm 2 of ALPS, Meng et al., 2024, arXiv:2406.07831, for which B = Ŵ H.)

    Args:
        start: first W, (O, I), zero outside the mask.
        target: B, (O, I).
        H: (I, I), with diagonal 1, which makes that its own Jacobi preconditioner.
        mask: (O, I) bool.
        steps: at most.
    """
    enough = _TOLERANCE**2 * (target * mask).square().sum(1, keepdim=True)
    W = start
    direction = residual = (target - W @ H) * mask
    size = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        if (size <= enough).all():
            break
        image = direction @ H
        # A solved row has neither size nor curvature, and stays.
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, size / curvature, 0)
        W = W + length * direction
        residual = residual - length * image * mask
        previous, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(previous > 0, size / previous, 0) * direction
    return W
