"""Make the residual stream basis-free: untie the head, fold each norm into the linears behind it.

RMSNorm(x) = x / rms(x) · g commutes with rotations only where g is constant (QuaRot, arXiv:2404.00456), and
LayerNorm(x) = (x − mean(x)) / std(x) · g + b with those that also fix the all-ones direction. So a linear
behind a norm takes W ← W diag(g) and b_W ← b_W + W b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import block_linears, family_of, module_at


def untie(model: nn.Module) -> bool:
    """Give the head its own copy of a tied embedding, and say so in the config. True if it was tied."""
    config: Any = model.config
    family = family_of(config)
    head, embedding = module_at(model, family.head), module_at(model, family.embeddings[0])
    tied = head.weight is embedding.weight
    if tied:
        trained = embedding.weight.requires_grad
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=trained)
    config.tie_word_embeddings = False
    return tied


@torch.no_grad()
def fuse_block_norms(model: nn.Module) -> None:
    """Fold the norms inside the decoder blocks: the same function, with gains of one and biases of zero.

    Products are taken in float64 and rounded once. A second call changes nothing.

    Raises:
        InputError: the final norm, which stays as it is here, could not be folded by `fuse_norms`.
    """
    family = family_of(model.config)
    _final_bias(model)
    norms: dict[str, Any] = {}
    for linear in block_linears(model.config):
        if linear.spec.norm is not None:
            path = f"{family.blocks}.{linear.layer}.{linear.spec.norm}"
            norm, reader = norms.setdefault(path, module_at(model, path)), module_at(model, linear.name)
            if norm_bias(norm) is not None:
                reader.bias.copy_(reader.bias.double() + reader.weight.double() @ norm.bias.double())
            _fold_gain(norm, reader, family.gain_offset)
    for norm in norms.values():
        _reset(norm, family.gain_offset)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Fold every norm: those of `fuse_block_norms`, and the final norm's gain g into an untied head.

    The head has no bias that could take up the final norm's: b stays there, as b ⊘ g.
    """
    family, bias = family_of(model.config), _final_bias(model)  # which may refuse: first
    untie(model)
    fuse_block_norms(model)
    norm = module_at(model, family.final_norm)
    _fold_gain(norm, module_at(model, family.head), family.gain_offset)
    _reset(norm, family.gain_offset, bias)


def norm_bias(norm: nn.Module) -> Any:
    """A norm's bias; RMS norms know none, layer norms may lack it."""
    return getattr(norm, "bias", None)


def _final_bias(model: nn.Module) -> Tensor | None:
    """b ⊘ g of the final norm in float64, None where it has no bias."""
    family = family_of(model.config)
    norm = module_at(model, family.final_norm)
    if norm_bias(norm) is None:
        return None
    gain, bias = norm.weight.double() + family.gain_offset, norm.bias.double()
    dead = gain == 0
    if (dead & (bias != 0)).any():
        raise InputError(
            f"{family.final_norm} has a gain of 0 where its bias is not 0, so the residual stream cannot be "
            "rotated; leave the space 'residual' out"
        )
    return torch.where(dead, 0.0, bias / gain)


def _fold_gain(norm: Any, reader: Any, gain_offset: float) -> None:
    """W ← W diag(g) for W (O, I), g (I,)."""
    if norm.weight is not None:
        reader.weight.copy_(reader.weight.double() * (norm.weight.double() + gain_offset))


def _reset(norm: Any, gain_offset: float, bias: Tensor | None = None) -> None:
    """Make the gain one, and the bias zero or as given."""
    if norm.weight is not None:
        norm.weight.fill_(1 - gain_offset)
    if norm_bias(norm) is not None:
        norm.bias.copy_(torch.zeros_like(norm.bias) if bias is None else bias)
