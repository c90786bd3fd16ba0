"""Slicing: remove directions of the residual stream (SliceGPT, Ashkboos et al., 2024, arXiv:2401.15024).

Shapes: d = width of the residual stream, k = directions that stay. In the rotated basis the first k stay,
so that x ↦ x Q[:, :k] is all of it. RMSNorm of k features instead of d, of which d − k are zero, is √(k/d)
times too small; the readers after it take the factor √(d/k), and ε becomes ε·d/k. One rotation for the
whole stream leaves an ordinary model of a smaller `hidden_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.errors import InputError
from rotpruner.families import check_space, family_of
from rotpruner.layout import block_linears, module_at, residual_boundaries
from rotpruner.patterns import Slice
from rotpruner.placements import head_dim, site_at
from rotpruner.rotations import RotationSet
from rotpruner.shortcuts import shortcuts_of
from rotpruner.statistics import Moment


def sliced_width(config: Any, pattern: Slice) -> int:
    """k for a model: the multiple of its number of heads (configs insist on one) nearest to (1 − fraction)·d.

    Raises:
        InputError: the model's class cannot be sliced, or nothing or everything would be removed.
    """
    check_space(config, "residual")
    if reason := family_of(config).unsliceable:
        raise InputError(f"pattern '{pattern}' leaves no plain {config.model_type} model: {reason}")
    d, step = config.hidden_size, config.num_attention_heads
    width = round((1 - pattern.fraction) * d / step) * step
    if not 0 < width < d:
        raise InputError(
            f"pattern '{pattern}' would keep {width} of {d} directions; the width must be a multiple of the {step} "
            "heads and smaller than before: choose another fraction"
        )
    return width


def residual_readers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The first linear of each group that reads the residual stream, and the width d of the blocks to gather for it.

    Block norms are to be fused first: what the groups read is the normed stream then.
    """
    config: Any = model.config
    places = [place for place in block_linears(config) if place.spec.reads == "residual" and place.leads_group]
    linears = {place.name: module_at(model, place.name) for place in places}
    return linears, dict.fromkeys(linears, config.hidden_size)


def residual_pca(config: Any, moments: Mapping[str, Moment], sites: int = 1) -> Tensor:
    """The principal directions of the residual stream: (sites, 1, d, d) float32.

    Columns by falling variance; of each, the largest entry is positive. A site's are those of all the norms alike
    that read it; the end of the stream alone, which no block reads, takes those before it.

    Args:
        config: of the model.
        moments: of the linears that read the residual stream, in the original basis (fused).
        sites: bases that the stream goes through.
    """
    boundaries = residual_boundaries(config)
    groups: dict[int, list[str]] = {}
    for place in block_linears(config):
        if place.spec.reads == "residual" and place.leads_group:
            groups.setdefault(site_at(place.boundary, sites, boundaries), []).append(place.name)
    found = []
    for _, names in sorted(groups.items()):
        mean = torch.zeros_like(moments[names[0]].full(), dtype=torch.float64)
        for name in names:  # one in float64 at a time: all would take twice the memory of the moments
            mean += moments[name].full().double() / len(names)
        found.append(principal_directions(mean))
    return torch.stack([found[min(site, len(found) - 1)] for site in range(sites)])[:, None]


def principal_directions(H: Tensor) -> Tensor:
    """Eigenvectors (d, d) float32 of a second moment H (d, d), columns by falling eigenvalue.

    Raises:
        InputError: H is not finite.
    """
    if not H.isfinite().all():
        raise InputError("the second moment of the residual stream is not finite; check the model and its dtype")
    Q = torch.linalg.eigh(H.double()).eigenvectors.flip(-1)
    largest = Q.gather(0, Q.abs().argmax(0, keepdim=True))
    return (Q * largest.sign()).float()


def project(rotations: RotationSet, width: int) -> RotationSet:
    """The same rotations, of which the residual one sends every direction after the first `width` to zero."""
    Q = rotations["residual"]
    kept = torch.arange(Q.shape[-1], device=Q.device) < width
    return {**rotations, "residual": Q * kept}


@torch.no_grad()
def slice_residual(model: nn.Module, width: int) -> None:
    """Keep the first `width` directions of a model whose norms are fused (as `merge_rotations` does), in place.

    The config is made to say so: a saved model loads as an ordinary one of its class. It has one ε for all norms; those
    of Qwen3's queries and keys, which stay as wide, get the scaled one too once the model is loaded again.
    """
    config: Any = model.config
    family, d = family_of(config), config.hidden_size
    gain = (d / width) ** 0.5
    norms = {family.final_norm}
    for place in block_linears(config):
        linear = module_at(model, place.name)
        if place.spec.reads == "residual":
            _resize(linear, linear.weight[:, :width] * gain)
            norms.add(f"{family.blocks}.{place.layer}.{place.spec.norm}")
        if place.spec.writes == "residual":
            _resize(linear, linear.weight[:width], None if linear.bias is None else linear.bias[:width])
    head = module_at(model, family.head)
    _resize(head, head.weight[:, :width] * gain, head.bias)
    for shortcut in shortcuts_of(model):
        shortcut.weight = _parameter(shortcut.weight[:width, :width])
    for path in family.embeddings:
        embedding = module_at(model, path)
        embedding.weight, embedding.embedding_dim = _parameter(embedding.weight[:, :width]), width
    for path in norms:
        norm = module_at(model, path)
        norm.weight = _parameter(norm.weight[:width])
        norm.variance_epsilon *= d / width
    config.hidden_size, config.head_dim = width, head_dim(config)
    config.rms_norm_eps *= d / width


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=False)


def _resize(linear: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    linear.out_features, linear.in_features = weight.shape
    linear.weight = _parameter(weight)
    if linear.bias is not None and bias is not None:
        linear.bias = _parameter(bias)
