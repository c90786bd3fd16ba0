"""Optimisation on the manifold of orthogonal matrices itself, instead of on skew parameters of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rotpruner.errors import InputError

#: Steps between projections back onto the manifold; rounding drifts off by about 1e-7 a step in float32.
_REPROJECT_EVERY = 20


class CayleySGD(Optimizer):
    """SGD with momentum along Cayley transforms (Li, Li & Todorovic, 2020, arXiv:2002.01113, algorithm 1).

    For each square orthogonal parameter Q (…, n, n) with gradient G and momentum M,

        M ← β M − G,    Ŵ = M Qᵀ − ½ Q (Qᵀ M Qᵀ),    W = Ŵ − Ŵᵀ,    M ← W Q,    Q ← Cayley(α W) Q,

    with Cayley(A) = (I − A/2)⁻¹ (I + A/2) solved rather than iterated. For `orthogonal_map: manifold`:

    ```yaml
    model:
      orthogonal_map: manifold
      optimizer: {class_path: rotpruner.optimizers.CayleySGD, init_args: {lr: 0.1, momentum: 0.9}}
    ```

    Args:
        params: parameters (…, n, n), each orthogonal.
        lr: α, at most 1 / ‖W‖∞ of each matrix (line 8 with q = ½, and the largest row sum for its norm).
        momentum: β.

    Raises:
        InputError: `lr` or `momentum` out of range, or a parameter that is not square.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.1, momentum: float = 0.9) -> None:
        if lr <= 0:
            raise InputError(f"lr {lr:g} of CayleySGD is not positive")
        if not 0 <= momentum < 1:
            raise InputError(f"momentum {momentum:g} of CayleySGD is not in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for Q in group["params"]:
                if Q.ndim < 2 or Q.shape[-1] != Q.shape[-2]:
                    raise InputError(
                        f"CayleySGD moves square orthogonal matrices, not a parameter of shape {tuple(Q.shape)}; "
                        "set orthogonal_map to manifold, or take torch.optim.SGD"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for Q in group["params"]:
                if Q.grad is not None:
                    self._move(Q, Q.grad, group["lr"], group["momentum"])
        return loss

    def _move(self, Q: Tensor, G: Tensor, lr: float, momentum: float) -> None:
        state = self.state[Q]
        count = state.get("step", 0) + 1
        M = -G if count == 1 else momentum * state["momentum"] - G
        MQ = M @ Q.mT
        W = MQ - 0.5 * Q @ (Q.mT @ MQ)
        W = W - W.mT
        state["step"], state["momentum"] = count, W @ Q
        norms = W.abs().sum(-1).amax(-1).clamp_min(1e-12)[..., None, None]
        A = W * torch.minimum(norms.reciprocal(), torch.full_like(norms, lr)) / 2
        identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        moved = torch.linalg.solve(identity - A, Q + A @ Q)
        Q.copy_(nearest_orthogonal(moved) if count % _REPROJECT_EVERY == 0 else moved)


def nearest_orthogonal(Q: Tensor) -> Tensor:
    """The orthogonal matrices (…, n, n) nearest to nearly orthogonal ones: one Newton-Schulz step, 3/2 Q − 1/2 Q Qᵀ Q.

    The error ε of QᵀQ = I becomes ¾ ε² (Higham, 2008, Functions of Matrices, section 8.3).
    """
    return 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)
