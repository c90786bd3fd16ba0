"""How much of a model there is: zeros, the pattern that they keep to, parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from rotpruner.layout import linear_modules
from rotpruner.patterns import NM


def sparsity_of(model: nn.Module) -> float:
    """Share of exact zeros in the decoder linears."""
    weights = [module.weight for module in linear_modules(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def pattern_of(model: nn.Module) -> str:
    """The strictest of 1:4, 2:4 and 4:8 that all decoder linears keep to, else their share of zeros, as in `0.5`."""
    weights = [module.weight for module in linear_modules(model).values()]
    for pattern in (NM(1, 4), NM(2, 4), NM(4, 8)):
        if all(map(pattern.holds, weights)):
            return str(pattern)
    return f"{sparsity_of(model):.2g}"


def parameter_count(model: Any) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
