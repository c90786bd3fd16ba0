"""Where learning starts, if calibration decides it: in principal directions, or in an order of features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rotpruner.distributed import Ranks, whole
from rotpruner.layout import BlockLinear, by_group, residual_boundaries
from rotpruner.orthogonal import is_order, permutation_matrix
from rotpruner.patterns import NM
from rotpruner.permutations import block_orders
from rotpruner.placements import site_at
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import Pruner
from rotpruner.rotations import RotationSet
from rotpruner.slicing import residual_pca
from rotpruner.statistics import Moment


def principal_start(config: Any, moments: Mapping[str, Moment], rotations: RotationSet, ranks: Ranks) -> RotationSet:
    """The same rotations, of which those of the residual stream turn it to its principal directions.

    Args:
        config: of the model.
        moments: of the linears that read the residual stream, in the original basis (fused).
        rotations: as they were.
        ranks: agree on what the first one finds; directions of equal variance may come out differently on each.
    """
    Q = rotations["residual"]
    found = residual_pca(config, moments, len(Q)).to(Q).contiguous()
    return {**rotations, "residual": ranks.broadcast(found, 0)}


@torch.no_grad()
def permuted_start(
    config: Any,
    weights: Mapping[BlockLinear, Tensor],
    moments: Mapping[str, Moment],
    pruner: Pruner,
    pattern: NM,
    rotations: RotationSet,
    ranks: Ranks,
    progress: Progress = unseen,
) -> RotationSet:
    """Orders of the features of every space, of which N:M keeps more than of the model's own; nothing else turns.

    Features that no linear reads, those of queries and keys and the end of the stream, stay as they were; so do those
    of blocks over which groups reach, because M does not divide their width.

    Args:
        config: of the model.
        weights: of all decoder linears, each (O, I), in the original basis (fused).
        moments: that the pruner needs, in the same basis.
        pruner, pattern: of what is kept.
        rotations: as they were; they give the spaces and the shapes.
        ranks: agree on what the first one finds.
        progress: wraps the iteration over places that have an order, for a progress bar.
    """
    found = {space: Q.clone() for space, Q in rotations.items()}
    ordered: list[tuple[Tensor, int, list[BlockLinear]]] = []
    for space, Q in found.items():
        readers: dict[int, list[BlockLinear]] = {}
        for place in weights:
            if place.spec.reads == space:
                readers.setdefault(_site(config, place, len(Q)), []).append(place)
        if Q.shape[-1] % pattern.m == 0:
            ordered += [(Q, site, places) for site, places in readers.items()]
    for Q, site, places in progress(ordered, "ordering features"):
        blocks, n = (1, Q.shape[-1]) if is_order(Q) else Q.shape[1:3]
        importances = _importances(places, weights, moments, pruner, Q.device)
        rows = sum(weights[place].numel() for place in places) // (blocks * n)
        orders = ranks.broadcast(block_orders(importances, rows, blocks, n, pattern), 0)
        Q[site] = orders[0] if is_order(Q) else permutation_matrix(orders)
    return found


def _importances(
    places: Iterable[BlockLinear],
    weights: Mapping[BlockLinear, Tensor],
    moments: Mapping[str, Moment],
    pruner: Pruner,
    device: torch.device,
) -> Iterator[Tensor]:
    for members in by_group(places):
        group = members[0].group
        moment = moments[group].apart() if group in moments else None
        for place in members:
            yield pruner.importance(whole(weights[place], device).float(), moment)


def _site(config: Any, place: BlockLinear, sites: int) -> int:
    if place.spec.reads != "residual":
        return place.layer
    return site_at(place.boundary, sites, residual_boundaries(config))
