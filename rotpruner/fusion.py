"""Make the residual stream basis-free: untie the head, fold each norm into the linears after it.

RMSNorm(x) = x / rms(x) · g commutes with rotations only where g is constant (QuaRot, arXiv:2404.00456), and
LayerNorm(x) = (x − mean(x)) / std(x) · g + b with those that also fix the all-ones direction. So a linear
after a norm takes W ← W diag(g) and b_W ← b_W + W b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.layout import BlockLinear, block_linears, module_at


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
        InputError: a norm cannot be folded, or the final one, which stays as it is here, could not be by `fuse_norms`.
    """
    check_foldable(model)
    for linear in block_linears(model.config):
        if linear.spec.norm is not None:
            module = module_at(model, linear.name)
            weight, bias = folded(model, linear)
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
    reset_block_norms(model)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Fold every norm: those of `fuse_block_norms`, and the final norm's gain g into an untied head.

    The head has no bias that could take up the final norm's: b stays there, as b ⊘ g.
    """
    check_foldable(model)  # which may refuse: first
    bias = final_bias(model)
    untie(model)
    fuse_block_norms(model)
    module_at(model, family_of(model.config).head).weight.copy_(folded_head(model))
    reset_final_norm(model, bias)


def check_foldable(model: nn.Module) -> None:
    """Raise `InputError` if a norm cannot be folded into what reads it; nothing is changed."""
    final_bias(model)
    for linear in block_linears(model.config):
        norm = _norm_before(model, linear)
        if norm is not None and _norm_bias(norm) is not None and module_at(model, linear.name).bias is None:
            raise InputError(
                f"{linear.name} has no bias that could take up that of the norm in front of it, so the residual stream "
                "cannot be rotated or sliced; give the family a refusal of the space 'residual'"
            )


def folded(model: nn.Module, linear: BlockLinear, norms: bool = True) -> tuple[Tensor, Tensor | None]:
    """Weight (O, I) and bias (O,) of a decoder linear in float64, if `norms` with that in front of it folded in."""
    module = module_at(model, linear.name)
    weight, bias = module.weight.double(), None if module.bias is None else module.bias.double()
    norm = _norm_before(model, linear) if norms else None
    if norm is not None and _norm_bias(norm) is not None:
        assert bias is not None, "check_foldable"
        # A weight that is offloaded is elsewhere.
        bias = bias.to(weight.device) + weight @ norm.bias.to(weight.device, torch.float64)
    return weight if norm is None else _scaled(weight, norm, family_of(model.config).gain_offset), bias


def folded_head(model: nn.Module) -> Tensor:
    """The head's weight (V, d) with the final norm's gain folded in; float64."""
    family = family_of(model.config)
    head, norm = module_at(model, family.head), module_at(model, family.final_norm)
    return _scaled(head.weight.double(), norm, family.gain_offset)


def reset_block_norms(model: nn.Module) -> None:
    """Gains of one and biases of zero, inside the blocks."""
    for linear in block_linears(model.config):
        norm = _norm_before(model, linear)
        if norm is not None:
            _reset(norm, family_of(model.config).gain_offset)


def reset_final_norm(model: nn.Module, bias: Tensor | None) -> None:
    """A gain of one, and a bias (d,) if there is any."""
    family = family_of(model.config)
    _reset(module_at(model, family.final_norm), family.gain_offset, bias)


def final_bias(model: nn.Module) -> Tensor | None:
    """What stays of the final norm's bias b once its gain g is in the head, which has none: b ⊘ g (d,) in float64.

    Raises:
        InputError: a gain of 0 where the bias is not 0.
    """
    family = family_of(model.config)
    norm = module_at(model, family.final_norm)
    if _norm_bias(norm) is None:
        return None
    gain, bias = norm.weight.double() + family.gain_offset, norm.bias.double()
    dead = gain == 0
    if (dead & (bias != 0)).any():
        raise InputError(
            f"{family.final_norm} has a gain of 0 where its bias is not 0, so the residual stream cannot be "
            "rotated; leave the space 'residual' out"
        )
    return torch.where(dead, 0.0, bias / gain)


def _norm_bias(norm: nn.Module) -> Any:
    """A norm's bias; RMS norms know none, layer norms may lack it."""
    return getattr(norm, "bias", None)


def _norm_before(model: nn.Module, linear: BlockLinear) -> Any:
    if linear.spec.norm is None:
        return None
    return module_at(model, f"{family_of(model.config).blocks}.{linear.layer}.{linear.spec.norm}")


def _scaled(weight: Tensor, norm: Any, gain_offset: float) -> Tensor:
    """W diag(g) for W (O, I), g (I,), where W is."""
    return weight if norm.weight is None else weight * (norm.weight.double() + gain_offset).to(weight.device)


def _reset(norm: Any, gain_offset: float, bias: Tensor | None = None) -> None:
    """Make the gain one, and the bias zero or as given."""
    if norm.weight is not None:
        norm.weight.fill_(1 - gain_offset)
    if _norm_bias(norm) is not None:
        norm.bias.copy_(torch.zeros_like(norm.bias) if bias is None else bias)
