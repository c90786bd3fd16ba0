"""SparseGPT: prune column by column, later columns make up (Frantar & Alistarh, 2023, arXiv:2301.00774).

Shapes: O = output features, I = input features. Weights are held transposed, (I, O), so that a column of
the paper's W is contiguous.

The paper eliminates columns with the upper Cholesky factor U of H⁻¹ = UᵀU: column j is pruned to
q_j = m_j w_j, its error e_j = (w_j − q_j) / U_jj, and every later column k loses e_j U_jk. Over all columns
that is Q = Ŵ − E U. With R = U⁻¹, hence H = R Rᵀ, and D = Ŵ − Q what has been taken away, E = D R. So the
loop meets, where a is the first column of the group G whose mask is chosen together,

    column j:   w_j = ŵ_j + A_j / R_jj,           A_j = Σ_{i<j} D_i R_ij,    1 / U_jj = R_jj
    group G:    w_G = Ŵ_G + A_G (R_GG)⁻¹,         A_G = Σ_{i<a} D_i R_iG

R alone is enough: one Cholesky factorisation in place of the paper's two and an inversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.patterns import NM, Pattern, Unstructured, keep_largest
from rotpruner.precision import at_least_float32
from rotpruner.pruners.reconstruction import ReconstructionPruner, upper_factor
from rotpruner.statistics import Moment

#: Below this many columns, a loop over them costs less than halving further.
_LEAF = 8

#: Chooses a mask: scores (columns, O) of the columns from `start` on → bool of the same shape.
Choose = Callable[[Tensor, int], Tensor]


class SparseGPT(ReconstructionPruner):
    """Saliency w² / [H⁻¹]_jj; the kept weights make up for the removed ones.

    `saliency` scores the untouched weight. `mask` and `prune` score columns as the elimination reaches
    them: N:M group by group, unstructured patterns `mask_block` columns at a time.

    Args:
        damping: λ = damping · mean(diag H) is added to H's diagonal, ten times more while H stays singular.
        mask_block: columns whose unstructured mask is chosen at once, from one sparsity.

    Raises:
        InputError: `damping` or `mask_block` is not positive.
    """

    def __init__(self, damping: float = 0.01, mask_block: int = 128) -> None:
        super().__init__(damping)
        if mask_block < 1:
            raise InputError(f"mask_block {mask_block} must be at least 1")
        self.mask_block = mask_block

    @torch.no_grad()
    def prune(
        self, weight: Tensor, moment: Moment | None, pattern: Pattern, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert moment is not None
        dtype = at_least_float32(weight.dtype)
        R = upper_factor(moment, self.damping, dtype)
        unit, choose = self._selection(pattern, weight.device)
        if mask is None and choose is None:
            mask = pattern.mask(self.saliency(weight, moment))
        if mask is not None:
            unit, choose = 1, None
        pruned, kept = _eliminate(weight.mT.to(dtype).contiguous(), R, unit, choose, None if mask is None else mask.mT)
        return pruned.mT.to(weight.dtype, memory_format=torch.contiguous_format), kept.mT.contiguous()

    def prune_group(
        self,
        weights: Sequence[Tensor],
        moment: Moment | None,
        pattern: Pattern,
        masks: Sequence[Tensor] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        row_local = isinstance(pattern, NM) or (isinstance(pattern, Unstructured) and pattern.scope == "row")
        if masks is None and not row_local:
            return super().prune_group(weights, moment, pattern)
        # Rows do not see each other: one pass over the columns serves them all.
        heights = [len(weight) for weight in weights]
        mask = None if masks is None else torch.cat(list(masks))
        pruned, kept = self.prune(torch.cat(list(weights)), moment, pattern, mask)
        return list(zip(pruned.split(heights), kept.split(heights), strict=True))

    def _selection(self, pattern: Pattern, device: torch.device) -> tuple[int, Choose | None]:
        """How many columns to choose a mask for at once, and how; None for a pattern that must see them all."""
        if isinstance(pattern, NM):
            return pattern.m, _group_choice(pattern, device)
        if not isinstance(pattern, Unstructured):
            return 1, None

        def choose(scores: Tensor, start: int) -> Tensor:
            columns, rows = scores.shape
            flat = scores.mT if pattern.scope == "row" else scores.mT.reshape(1, -1)
            # Differences of one rounded running total: the blocks' counts add up to the pattern's.
            size = 1 if pattern.scope == "row" else rows
            due = [round(pattern.sparsity * size * stop) for stop in (start, start + columns)]
            return keep_largest(flat, flat.shape[1] - (due[1] - due[0])).view(rows, columns).mT

        return self.mask_block, choose


def _group_choice(pattern: NM, device: torch.device) -> Choose:
    """The mask of `pattern` for one group at a time, a third of the time of `NM.mask`.

    Of each pair (i, k), i < k, i wins if s_i ≥ s_k. Index i is the second of i pairs, so it wins
    Σ_{pairs (i, ·)} [s_i ≥ s_k] − Σ_{pairs (·, i)} [s_k ≥ s_i] + i of its M − 1 pairs.
    """
    members = torch.arange(pattern.m, device=device)[:, None]
    first, second = torch.triu_indices(pattern.m, pattern.m, offset=1, device=device)
    signs = (members == first).float() - (members == second).float()

    def choose(scores: Tensor, start: int) -> Tensor:
        wins = signs @ (scores[first] >= scores[second]).float() + members
        return wins >= pattern.m - pattern.n

    return choose


def _eliminate(W: Tensor, R: Tensor, unit: int, choose: Choose | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prune the columns in order: (weights (I, O) with zeros outside the mask, mask (I, O) bool).

    Halves the columns down to a few, so that almost all arithmetic is in a few large matrix products.

    Args:
        W: transposed weight ŵ, (I, O), contiguous.
        R: upper factor of the damped Hessian, (I, I).
        unit, choose: chooses the mask of `unit` columns when the elimination reaches them; or
        mask: keeps these weights, (I, O) bool.
    """
    precision = R.diagonal()
    S = R.mT.contiguous()
    A = torch.zeros_like(W)
    D = torch.empty_like(W)
    kept = torch.empty_like(W, dtype=torch.bool)
    step = torch.empty_like(W)  # m_j / R_jj
    chosen = 0

    def settle(start: int, stop: int, kept_here: Tensor) -> None:
        kept[start:stop] = kept_here
        torch.div(kept_here, precision[start:stop, None], out=step[start:stop])
        torch.mul(W[start:stop], ~kept_here, out=D[start:stop])

    def eliminate(start: int, stop: int) -> None:
        """Columns start … stop − 1; A already holds what the columns before `start` do to them."""
        nonlocal chosen
        if start == chosen and choose is not None:
            chosen = min(start + unit, len(W))
            G = slice(start, chosen)
            reached = W[G] + torch.linalg.solve_triangular(S[G, G], A[G], upper=False)
            settle(start, chosen, choose((reached * precision[G, None]).abs_(), start))
        if stop - start <= _LEAF and stop <= chosen:
            for j in range(start, stop):
                if j > start:
                    A[j].addmv_(D[start:j].mT, S[j, start:j])
                D[j].addcmul_(A[j], step[j], value=-1)
            return
        half = (stop - start) // 2
        # Columns that choose together must have seen the same columns.
        middle = start + (-(-half // unit) * unit if stop - start > unit else half)
        eliminate(start, middle)
        A[middle:stop].addmm_(S[middle:stop, start:middle], D[start:middle])
        eliminate(middle, stop)

    if mask is not None:
        chosen = len(W)
        settle(0, chosen, mask)
    eliminate(0, len(W))
    return W - D, kept
