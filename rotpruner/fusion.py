"""Make the residual stream basis-free: untie the head, fold each norm's gain into the linears behind it.

RMSNorm(x) = x / rms(x) · g commutes with rotations only where g is constant (QuaRot, arXiv:2404.00456).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotpruner.families import block_linears, family_of


def untie(model: nn.Module) -> bool:
    """Give the head its own copy of a tied embedding, and say so in the config. True if it was tied."""
    family = family_of(model.config)
    head = model.get_submodule(family.head)
    embedding = model.get_submodule(family.embeddings[0])
    tied = head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False
    return tied


@torch.no_grad()
def fuse_block_norms(model: nn.Module) -> None:
    """Fold the gains inside the decoder blocks; the model computes the same function with gains of one.

    Products are taken in float64 and rounded once. A second call changes nothing.
    """
    family = family_of(model.config)
    for linear in block_linears(model.config):
        if linear.spec.norm is not None:
            norm = model.get_submodule(f"{family.blocks}.{linear.layer}.{linear.spec.norm}")
            _fold(norm.weight, model.get_submodule(linear.name))
    for layer in range(model.config.num_hidden_layers):
        for path in dict.fromkeys(spec.norm for spec in family.linears if spec.norm):
            model.get_submodule(f"{family.blocks}.{layer}.{path}").weight.fill_(1)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Fold every gain: those of `fuse_block_norms`, and the final norm's into an untied head."""
    untie(model)
    fuse_block_norms(model)
    family = family_of(model.config)
    final_norm = model.get_submodule(family.final_norm)
    _fold(final_norm.weight, model.get_submodule(family.head))
    final_norm.weight.fill_(1)


def _fold(gain: Tensor, reader: nn.Module) -> None:
    """W ← W diag(g) for W (O, I), g (I,)."""
    reader.weight.copy_(reader.weight.double() * gain.double())
