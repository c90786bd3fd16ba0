"""Channel permutations for N:M: which features share a group of M, so that more of what matters may stay.

N:M keeps N of every M neighbours, so which features are neighbours decides how much importance goes; their
order changes nothing else. As in RIA (Zhang et al., 2024, section 3.2, after Pool and Yu, 2021), features are dealt out
by their sums first, then reassigned, one a group at a time, by an optimal assignment.

Shapes: R = rows, of all linears that read the features; C = features; G = C / M groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rotpruner.patterns import NM

#: Rows that an order is judged by, evenly spaced among all: enough to tell features apart, and soon done.
MOST_ROWS = 8192

#: Groups among which one assignment deals features out. Its cost grows with their cube: a LLaMA-3-8B has 3,584.
MOST_GROUPS = 512


def channel_permutation(importance: Tensor, pattern: NM, rounds: int = 5) -> Tensor:
    """The order (C,) int64 of features in which N:M keeps more importance; the new feature j is the old `order[j]`.

    Take one feature out of each group. With t(r, g) the N-th largest importance of what is left of group g in row r, a
    feature c that joins the group adds max(t(r, g), s(r, c)) to a sum that does not depend on c. Since
    2 max(t, s) = t + s + |t − s|, the best assignment of the features that were taken out is the one with the largest
    sum of L1 distances between them and the thresholds. So no step loses importance. Where there are more groups than
    one assignment can take, each is among every k-th of them.

    Args:
        importance: of every weight, (R, C), nonnegative.
        pattern: N of M, with M a divisor of C.
        rounds: at most that many times, one feature of every place in the groups is assigned anew.
    """
    groups = importance.sum(0).argsort(descending=True, stable=True).view(pattern.m, -1).mT.contiguous()
    if pattern.sparsity == 0:
        return groups.flatten()
    kept = _kept(importance, groups, pattern)
    parts = -(-len(groups) // MOST_GROUPS)
    for _ in range(rounds):
        for part in range(parts):
            _reassign(importance, groups[part::parts], pattern)
        before, kept = kept, _kept(importance, groups, pattern)
        if kept <= before * (1 + 1e-6):
            break
    return groups.flatten()


def _reassign(importance: Tensor, groups: Tensor, pattern: NM) -> None:
    """Deal one feature of every place in some groups (G, M) out anew among them, in place."""
    for place in range(pattern.m):
        others = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
        thresholds = importance[:, others].topk(pattern.n, dim=-1).values[..., -1]
        moved = groups[:, place].clone()
        gain = torch.cdist(thresholds.mT, importance[:, moved].mT, p=1)
        _, chosen = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
        groups[:, place] = moved[torch.from_numpy(chosen).to(moved.device)]


def _kept(importance: Tensor, groups: Tensor, pattern: NM) -> float:
    return importance[:, groups].topk(pattern.n, dim=-1).values.double().sum().item()


def block_orders(importances: Iterable[Tensor], rows: int, blocks: int, n: int, pattern: NM) -> Tensor:
    """An order of the features of each block of a space, (B, n) int64, by all linears that read it together.

    Args:
        importances: of their weights, each (O, R·B·n), one after the other, of which few rows are kept; each counts
            alike, whatever its scale. Every block serves R neighbouring heads.
        rows: Σ O·R, of all of them.
        blocks, n: B blocks of width n, which M divides.
        pattern: N:M.
    """
    stride = -(-rows // MOST_ROWS)
    kept, first = [], 0
    for importance in importances:
        total = importance.sum().clamp_min(torch.finfo(importance.dtype).tiny)  # a linear of zeros has no importance
        own = rearrange(importance / total, "o (b r n) -> b (o r) n", b=blocks, n=n)
        kept.append(own[:, first::stride].contiguous())  # not a view, which would hold them all
        first = (first - own.shape[1]) % stride
        del importance, own  # before the next is made
    return torch.stack([channel_permutation(own.float(), pattern) for own in torch.cat(kept, dim=1)])
