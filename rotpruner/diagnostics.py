"""What a pruned model looks like inside: each linear's sparsity and error, and the saliency kept in either basis.

Shapes: a decoder linear's weight W (O, I), its pruned form Ŵ (O, I), the second moment of its input H (I, I).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from rotpruner.artifacts import write_bytes, write_json
from rotpruner.basis import grouped
from rotpruner.distributed import whole
from rotpruner.families import family_of
from rotpruner.fusion import fuse_block_norms
from rotpruner.layout import BlockLinear, block_linears, by_group, module_at
from rotpruner.orthogonal import rotate_weight
from rotpruner.patterns import Pattern
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import Pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import rotated_moment, sides
from rotpruner.statistics import Moment

#: Files of a run directory.
LAYERS, HEAT_MAP = "layers.json", "heatmap.safetensors"

_CELLS = 96  # of a heat map, at most, in each direction


def kept_mass(saliency: Tensor, mask: Tensor) -> float:
    """The share of the total saliency (O, I) that stays under a mask (O, I), in [0, 1]; 1 where there is none."""
    total = saliency.double().sum()
    return (saliency.double().mul(mask).sum() / total).item() if total else 1.0


def relative_error(weight: Tensor, pruned: Tensor, moment: Moment | None) -> float:
    """√(E‖(W − Ŵ) x‖² / E‖W x‖²), the relative error of a linear's output.

    Features of different diagonal blocks of the moment count as uncorrelated; without a moment, all features
    as uncorrelated and of one size, which is the relative error of the weights.

    Args:
        weight, pruned: W and Ŵ (O, I), in one basis.
        moment: of the input, in the same basis; its blocks are (B, n, n), B·n = I.
    """

    def energy(W: Tensor) -> Tensor:
        if moment is None:
            return W.square().sum()
        H = moment.derive("seen", Moment.seen_blocks)  # for both energies, and for all linears of a group
        heads = W.to(H.dtype).unflatten(-1, (len(H), -1)).transpose(0, 1)  # (B, O, n)
        return ((heads @ H) * heads).sum()

    weight, pruned = weight.float(), pruned.float()
    total = energy(weight)
    return (energy(weight - pruned) / total).clamp_min(0).sqrt().item() if total else 0.0


def pooled_rms(weight: Tensor) -> Tensor:
    """Root mean square over cells of a weight (O, I), relative to that of the whole: (≤ 96, ≤ 96) float32."""
    rows, columns = weight.shape
    squares = F.adaptive_avg_pool2d(weight.float().square()[None], (min(rows, _CELLS), min(columns, _CELLS)))[0]
    return (squares / squares.mean()).sqrt()


@torch.no_grad()
def layer_table(
    model: nn.Module,
    pruned: nn.Module,
    rotations: Mapping[str, Tensor],
    moments: Mapping[str, Moment],
    pruner: Pruner,
    patterns: Mapping[str, Pattern],
    progress: Progress = unseen,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """One row a decoder linear: how sparse it is, how wrong its output, and how much saliency each basis keeps.

    Args:
        model: dense model in its own basis; its block norms are folded here if the residual stream rotates.
        pruned: what came of it in the rotated basis. It may be narrower: what is missing counts as pruned.
        rotations: that it was pruned in.
        moments: of the dense model in its own basis, by group, as `gather_model_moments` returns them.
        pruner: as it was pruned.
        patterns: by name, as it was pruned; none for a slice, which has no masks, so no kept mass and no error.
        progress: wraps the iteration over groups of linears, for a progress bar.
        device: where one linear after the other is looked at; None is where the model is.

    Returns:
        `[{"name", "layer", "weights": count, "sparsity", "error", "kept_mass": {"own", "learned"} or None}, …]` in
        data-flow order; sparsities, errors and masses are shares of one.
    """
    if "residual" in rotations:
        fuse_block_norms(model)
    there = device or module_at(model, family_of(model.config).head).weight.device
    rotations = {space: Q.to(there) for space, Q in rotations.items()}
    rows = []
    for members in progress(by_group(block_linears(model.config)), "layer diagnostics"):
        # Once for the group, whose linears share what a pruner derives from it.
        known = {group: moment.to(there) for group, moment in _apart(moments, members[0].group).items()}
        moment, turned = known.get(members[0].group), rotated_moment(model.config, rotations, known, members[0])
        for place in members:
            weight, found = (module_at(each, place.name).weight.to(there) for each in (model, pruned))
            weight = weight.float()
            row: dict[str, Any] = {
                "name": place.name,
                "layer": place.layer,
                "weights": weight.numel(),
                "sparsity": 1 - int((found != 0).sum()) / weight.numel(),
                "error": None,
                "kept_mass": None,
            }
            if patterns:
                rotated = rotate_weight(weight, *sides(model.config, rotations, place))
                row["error"] = relative_error(rotated, found, turned)
                own, learned = pruner.saliency(weight, moment), pruner.saliency(rotated, turned)
                row["kept_mass"] = {
                    "own": kept_mass(own, patterns[place.name].mask(own)),
                    "learned": kept_mass(learned, found != 0),  # masks may be learned, or found during an update
                }
            rows.append(row)
    return rows


@torch.no_grad()
def masked_share(rotated: RotatedModel) -> list[dict[str, Any]]:
    """One row a decoder linear, of the current masks in the current rotations, while it learns.

    It rotates and scores every weight: as dear as a refresh of the masks, but where the saliency of a pruner that
    rebuilds weights inverts each H, of which a refresh needs less. Sharded weights come together one at a
    time, so all ranks must ask at the same time; all get the same answer.

    Returns:
        `[{"name", "layer", "weights": count, "sparsity", "kept_mass"}, …]` in data-flow order, shares of one;
        nothing for linears without masks.
    """
    rotations = {space: Q.detach() for space, Q in rotated.rotations().items()}
    config, rows = rotated.base.config, []
    for linears in grouped(rotated.linears):
        known = _apart(rotated.moments, linears[0].place.group)
        turned = rotated_moment(config, rotations, known, linears[0].place)
        for linear in linears:
            mask = linear.mask
            if mask is None:
                continue
            weight = rotate_weight(whole(linear.weight, mask.device), *sides(config, rotations, linear.place))
            saliency = rotated.pruner.saliency(weight, turned)
            row = {"name": linear.place.name, "layer": linear.place.layer, "weights": mask.numel()}
            rows.append({**row, "sparsity": 1 - mask.double().mean().item(), "kept_mass": kept_mass(saliency, mask)})
    return rows


def _apart(moments: Mapping[str, Moment], group: str) -> dict[str, Moment]:
    return {group: moments[group].apart()} if group in moments else {}


def block_means(rows: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> dict[int, float]:
    """The mean of a value over each block's weights, from rows with `layer` and `weights` in data-flow order."""
    means = {}
    for layer, members in groupby(rows, key=lambda row: row["layer"]):
        block = list(members)
        means[layer] = sum(value(row) * row["weights"] for row in block) / sum(row["weights"] for row in block)
    return means


@torch.no_grad()
def heat_maps(model: nn.Module, rotations: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The magnitudes of one linear's weights in both bases: (its name, {"own", "learned": (rows, columns) float32}).

    The linear is the first of the middle block that reads or writes a rotated space; `model` is dense, its block
    norms folded if the residual stream rotates.
    """
    linears = block_linears(model.config)

    def rotates(place: BlockLinear) -> bool:
        middle = place.layer == linears[-1].layer // 2
        return middle and any(Q is not None for Q in sides(model.config, rotations, place))

    place = next(filter(rotates, linears))
    weight = module_at(model, place.name).weight.float()
    return place.name, {
        "own": pooled_rms(weight),
        "learned": pooled_rms(rotate_weight(weight, *sides(model.config, rotations, place))),
    }


def write_diagnostics(
    run: Path,
    model: nn.Module,
    pruned: nn.Module,
    rotations: Mapping[str, Tensor],
    moments: Mapping[str, Moment],
    pruner: Pruner,
    patterns: Mapping[str, Pattern],
    progress: Progress = unseen,
    device: torch.device | None = None,
) -> None:
    """Write `layers.json` and `heatmap.safetensors` into a run directory; the arguments are those of `layer_table`."""
    rows = layer_table(model, pruned, rotations, moments, pruner, patterns, progress, device)
    name, maps = heat_maps(model, rotations)
    write_bytes(save({basis: found.contiguous() for basis, found in maps.items()}, {"linear": name}), run / HEAT_MAP)
    write_json({"linears": rows}, run / LAYERS)
