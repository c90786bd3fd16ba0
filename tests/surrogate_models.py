"""What tests of surrogates share: exact tiny models under them, and derivatives to compare with."""

from __future__ import annotations

import torch
from conftest import tiny_llama
from tiny_models import exact, rotated_model

from rotpruner.rotated_model import RotatedModel


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def under(surrogate, **settings) -> RotatedModel:
    return rotated_model(exact(tiny_llama()), surrogate=surrogate, **settings)


def directional_derivative(loss, parameters, directions, step=1e-5):
    """Of `loss()` along directions of its parameters, by central differences."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(sign * step * direction)
            values.append(loss().item())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(sign * step * direction)
    return (values[0] - values[1]) / (2 * step)
