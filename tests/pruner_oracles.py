"""Pruners as their papers' equations have them: float64, dense, one row and column at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rotpruner.patterns import NM, Pattern, Unstructured


def damped(H: Tensor) -> Tensor:
    H = H.double()
    return H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def largest(scores: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest of each row, one row at a time."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        for column in sorted(range(len(values)), key=lambda index: (-values[index], index))[:kept]:
            mask[row, column] = True
    return mask


def oracle_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    if isinstance(pattern, NM):
        return largest(scores.reshape(-1, pattern.m), pattern.n).view_as(scores)
    assert isinstance(pattern, Unstructured)
    flat = scores if pattern.scope == "row" else scores.reshape(1, -1)
    return largest(flat, flat.shape[1] - round(pattern.sparsity * flat.shape[1])).view_as(scores)


def wanda_oracle(W: Tensor, H: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    mask = oracle_mask(W.double().abs() * H.double().diagonal().sqrt(), pattern)
    return W.double() * mask, mask


def ria_oracle(W: Tensor, H: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    size, norms = W.double().abs(), H.double().diagonal().sqrt()
    scores = torch.zeros_like(size)
    for i in range(len(size)):
        for j in range(size.shape[1]):
            scores[i, j] = (size[i, j] / size[i].sum() + size[i, j] / size[:, j].sum()) * norms[j] ** 0.5
    mask = oracle_mask(scores, pattern)
    return W.double() * mask, mask


def sparsegpt_oracle(
    W: Tensor, H: Tensor, pattern: Pattern, mask: Tensor | None = None, block: int = 128
) -> tuple[Tensor, Tensor]:
    """SparseGPT with the inverse Hessian of the remaining columns in full, and every update at once."""
    W, width = W.double().clone(), W.shape[1]
    inverses = [torch.linalg.inv(damped(H))]
    for j in range(width - 1):  # equation 4: eliminate j from H⁻¹
        A = inverses[-1]
        inverses.append(A - torch.outer(A[:, j], A[j]) / A[j, j])
    diagonal = torch.stack([A[j, j] for j, A in enumerate(inverses)])
    chosen = torch.ones_like(W, dtype=torch.bool) if mask is None else mask
    size = pattern.m if isinstance(pattern, NM) else block
    for j, A in enumerate(inverses):
        if mask is None and j % size == 0:
            stop = min(j + size, width)
            scores = W[:, j:stop] ** 2 / diagonal[j:stop]
            if isinstance(pattern, NM):
                chosen[:, j:stop] = largest(scores, pattern.n)
            else:
                flat = scores if pattern.scope == "row" else scores.reshape(1, -1)
                each = 1 if pattern.scope == "row" else len(W)
                removed = round(pattern.sparsity * each * stop) - round(pattern.sparsity * each * j)
                chosen[:, j:stop] = largest(flat, flat.shape[1] - removed).view_as(scores)
        error = W[:, j] * ~chosen[:, j] / A[j, j]
        W[:, j:] -= torch.outer(error, A[j, j:])
        W[:, j] *= chosen[:, j]
    return W, chosen


def alps_oracle(W: Tensor, H: Tensor, pattern: Pattern, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ADMM with a dense solve a step, then least squares on each row's kept weights."""
    H = damped(H)
    norms = H.diagonal().sqrt()
    H, dense = H / torch.outer(norms, norms), W.double() * norms
    identity = torch.eye(len(H), dtype=torch.float64)
    if mask is None:
        mask, penalty, V = oracle_mask(dense.abs(), pattern), 0.1, torch.zeros_like(dense)
        D, before = dense * mask, mask
        for step in range(1, 301):
            right = (dense @ H - V + penalty * D).mT
            current = torch.linalg.solve(H + penalty * identity, right).mT
            mask = oracle_mask((current + V / penalty).abs(), pattern)
            D = (current + V / penalty) * mask
            V = V + penalty * (current - D)
            if step % 3 == 0:
                changed, kept = (mask ^ before).sum().item(), mask.sum().item()
                if changed == 0:
                    break
                penalty *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
                before = mask
    best = torch.zeros_like(dense)
    for row, stays in enumerate(mask):
        best[row, stays] = torch.linalg.solve(H[stays][:, stays], (dense[row] @ H)[stays])
    return best / norms, mask


ORACLES = {"wanda": wanda_oracle, "ria": ria_oracle, "sparsegpt": sparsegpt_oracle, "alps": alps_oracle}
