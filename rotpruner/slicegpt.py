"""SliceGPT's own placement, to compare with: a PCA basis before every norm (Ashkboos et al., 2024, arXiv:2401.15024).

Shapes: d = width of the residual stream, k = directions that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rotpruner.families import family_of
from rotpruner.fusion import fuse_norms
from rotpruner.layout import block_linears, module_at, residual_sublayers
from rotpruner.modeling_rotated import Passage
from rotpruner.progress import Progress, unseen
from rotpruner.replay import BlockReplay, visiting
from rotpruner.slicing import principal_directions
from rotpruner.statistics import MomentSums, watch_inputs


@torch.no_grad()
def slice_per_block(
    model: nn.Module,
    width: int,
    batches: Sequence[Tensor],
    calibration_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
) -> tuple[int, int]:
    """SliceGPT's own placement: a PCA basis before every norm, each from what the sliced predecessors give.

    No plain checkpoint can hold it, because each residual connection would need a k × k product to change
    basis. The model stays as wide as it was and projects its stream instead, xQ[:, :k]Q[:, :k]ᵀ, which
    computes the same function: it can be evaluated, not exported.

    Args:
        model: plain model, changed in place.
        width: k.
        batches: calibration token ids, each (sequences, seq_len).
        calibration_dtype: of the products that give the statistics, as in `BlockReplay`; None is the model's own.
        device: where blocks are run, one at a time; None leaves them where they are.
        progress: wraps the iteration over blocks.

    Returns:
        Parameters of the model that SliceGPT would run, its 2·L shortcut matrices (k, k) included, and the operations
        that these take a token.
    """
    fuse_norms(model)
    config: Any = model.config
    family, sublayers, d = family_of(config), residual_sublayers(config), config.hidden_size
    replay = BlockReplay(model, batches, calibration_dtype, device)
    for layer, block in enumerate(progress(list(replay.blocks), "PCA block by block")):
        with visiting(block, device):
            for previous, sublayer in zip([None, *sublayers], sublayers, strict=False):
                reader = next(spec.path for spec in family.linears if spec.norm == sublayer.norm)
                with watch_inputs({reader: block.get_submodule(reader)}, {reader: d}) as sums:
                    replay.pass_by(layer)
                P = _projection(sums.means()[reader].full(), width)
                if previous is None:
                    _project_input(block, P)
                else:
                    _Projection(P).attach(*(block.get_submodule(path) for path in previous))
            replay.advance(layer)
    sums = MomentSums()
    for states in replay.states:
        sums.add("final", F.rms_norm(states.float(), (d,)), d)
    _project_input(module_at(model, family.final_norm), _projection(sums.means()["final"].full(), width))
    online = 2 * config.num_hidden_layers * width**2
    return _sliced_parameters(model, width) + online, 2 * online


def _projection(H: Tensor, width: int) -> Tensor:
    Q = principal_directions(H)[:, :width]
    return Q @ Q.mT


def _project_input(module: nn.Module, P: Tensor) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] @ P.to(args[0]), *args[1:]))


class _Projection(Passage):
    """(x + f(x)) P."""

    def __init__(self, P: Tensor) -> None:
        super().__init__()
        self._P = P

    def after(self, stream: Tensor, output: Tensor) -> Tensor:
        return ((stream + output).to(self._P.dtype) @ self._P.to(stream.device) - stream).to(output.dtype)


def _sliced_parameters(model: nn.Module, width: int) -> int:
    """Parameters of a fused model once `slice_residual` has been at it."""
    config: Any = model.config
    family, places = family_of(config), block_linears(config)
    lost = 1 + sum(module_at(model, path).weight.shape[0] for path in (*family.embeddings, family.head))
    lost += len({(place.layer, place.spec.norm) for place in places if place.spec.norm is not None})
    for place in places:
        linear = module_at(model, place.name)
        if place.spec.reads == "residual":
            lost += linear.out_features
        if place.spec.writes == "residual":
            lost += linear.in_features + (linear.bias is not None)
    return sum(parameter.numel() for parameter in model.parameters()) - lost * (config.hidden_size - width)
