"""Sparsity patterns: how many weights stay, and where. A mask is boolean, True = keep.

Shapes: O = output features, I = input features, G = groups of M neighbours in a row (I = G·M).
Every pattern keeps an exact number of weights, ties included: of equal scores the lowest index stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from rotpruner.errors import InputError

Scope = Literal["row", "layer"]

# Up to this M, counting pairwise wins in groups of M beats sorting them (2:4 sevenfold on a CPU).
_MAX_PAIRWISE_GROUP = 16


@runtime_checkable
class Pattern(Protocol):
    """What a pruner asks of a pattern."""

    @property
    def sparsity(self) -> float:
        """Share of weights removed, in [0, 1)."""

    def validate(self, name: str, shape: torch.Size) -> None:
        """Raise `InputError` if a weight called `name` of `shape` (O, I) cannot take this pattern."""

    def rivals(self, scores: Tensor) -> Tensor:
        """Scores (O, I) by the sets within which weights compete for the places of a mask: (…, members of a set)."""

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight (O, I) has the zeros that such a mask leaves."""

    def mask(self, saliency: Tensor) -> Tensor:
        """Keep the most salient weights: (O, I) float → (O, I) bool."""


@dataclass(frozen=True)
class NM:
    """At most `n` of every `m` consecutive input weights of a row stay, as in `2:4`."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InputError(f"pattern '{self}' keeps {self.n} of {self.m} weights; N:M needs 1 <= N <= M, as in 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def validate(self, name: str, shape: torch.Size) -> None:
        if shape[-1] % self.m:
            raise InputError(
                f"pattern '{self}' does not fit {name}: its input width {shape[-1]} is not divisible by "
                f"{self.m}; choose an M that divides it"
            )

    def rivals(self, scores: Tensor) -> Tensor:
        return rearrange(scores, "o (g m) -> o g m", m=self.m)

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight (O, I) has no more than N non-zero entries in any group."""
        return weight.shape[-1] % self.m == 0 and bool((self.rivals(weight != 0).sum(-1) <= self.n).all())

    def mask(self, saliency: Tensor) -> Tensor:
        groups = self.rivals(saliency)
        if self.m > _MAX_PAIRWISE_GROUP:
            return rearrange(keep_largest(groups, self.n), "o g m -> o (g m)")
        members = groups.unbind(-1)
        losses = [torch.zeros_like(members[0], dtype=torch.int8) for _ in members]
        for i, j in combinations(range(self.m), 2):
            earlier_wins = members[i] >= members[j]
            losses[j] += earlier_wins
            losses[i] += ~earlier_wins
        return rearrange(torch.stack(losses, -1) < self.n, "o g m -> o (g m)")


@dataclass(frozen=True)
class Unstructured:
    """The share `sparsity` of the weights goes, counted in each output row or over the whole matrix."""

    sparsity: float
    scope: Scope = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity {self.sparsity:g} is not in [0, 1); 0.5 removes half of the weights")
        if self.scope not in get_args(Scope):
            raise InputError(f"unknown scope '{self.scope}'; choose one of {', '.join(get_args(Scope))}")

    def __str__(self) -> str:
        return f"{self.sparsity:g}"

    def validate(self, name: str, shape: torch.Size) -> None:
        """Any matrix takes any sparsity."""

    def rivals(self, scores: Tensor) -> Tensor:
        return scores if self.scope == "row" else scores.reshape(1, -1)

    def holds(self, weight: Tensor) -> bool:
        """Whether as much of a weight (O, I) is zero, to a hundredth of it, by which OWL may vary."""
        zeros = self.rivals(weight == 0).double().sum(-1).mean().item()
        width = self.rivals(weight).shape[-1]
        return zeros >= round(self.sparsity * width) - 0.01 * width

    def mask(self, saliency: Tensor) -> Tensor:
        scores = self.rivals(saliency)
        kept = scores.shape[-1] - round(self.sparsity * scores.shape[-1])
        return keep_largest(scores, kept).view_as(saliency)


@dataclass(frozen=True)
class Slice:
    """Structured: the share `fraction` of the residual stream's directions goes, in every layer alike."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InputError(f"pattern '{self}' is not in (0, 1); slice:0.3 removes 30 % of the residual directions")

    def __str__(self) -> str:
        return f"slice:{self.fraction:g}"


def keep_largest(scores: Tensor, kept: int) -> Tensor:
    """Mask of exactly `kept` entries along the last dimension: those above the kept-th largest, then ties in order."""
    width = scores.shape[-1]
    if kept == width:
        return torch.ones_like(scores, dtype=torch.bool)
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Not `kthvalue`, which has no deterministic form on CUDA.
    threshold = scores.topk(kept, dim=-1).values[..., -1:]
    above, tied = scores > threshold, scores == threshold
    room = kept - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def parse_pattern(text: str | float, scope: Scope = "row") -> Pattern | Slice:
    """Read `N:M`, a sparsity in [0, 1) or `slice:FRACTION`.

    Args:
        text: `"2:4"`, `"0.5"`, `0.5` or `"slice:0.3"`.
        scope: where an unstructured sparsity is counted; N:M has a scope of its own and ignores it.

    Raises:
        InputError: for anything else.
    """
    if match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text)):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"\s*slice:(\d*\.?\d+)\s*", str(text)):
        return Slice(float(match[1]))
    try:
        sparsity = float(text)
    except ValueError:
        raise InputError(
            f"pattern '{text}' is neither N:M (as in 2:4), nor a sparsity in [0, 1) (as in 0.5), nor slice:0.3"
        ) from None
    if sparsity > 60:
        raise InputError(f'pattern {text} looks like an N:M that YAML read in base 60; quote it, as in "2:4"')
    return Unstructured(sparsity, scope)
