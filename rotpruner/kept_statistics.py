"""Calibration statistics that stay in the cache, for runs of one model on one calibration that differ in the rest.

A file holds the blocks of every moment, float32 or float64, and is found again only for the same weights to the bit,
the same configuration, tokens, widths of blocks, number of ranks, device type and versions of torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rotpruner.distributed import Ranks
from rotpruner.embedded import cache_directory, locked
from rotpruner.identity import identity, tensors_digest
from rotpruner.statistics import Moment

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it whenever the same model and tokens would give other moments


def kept_moments(
    gather: Callable[[], dict[str, Moment]],
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    block_widths: Mapping[str, int],
    batches: Sequence[Tensor],
    ranks: Ranks,
) -> dict[str, Moment]:
    """What `gather` returns, from the cache if an earlier run has kept it there, else kept there now.

    All ranks make this call together, and gather together if the file is absent or damaged for one of them; the first
    rank writes it. Where it cannot be written whole, a warning says so and the moments are used all the same.

    Args:
        gather: computes the moments, which lie on the model's device.
        model, weights: whose statistics they are; the weights by name, sharded ones too.
        block_widths: of the moments, by their names.
        batches: token ids, each (sequences, seq_len).
        ranks: that share the work.

    Raises:
        InputError: the cache cannot be written to.
    """
    path = _path(model, weights, block_widths, batches, ranks)
    kept = _load(path, block_widths, model.device)
    if not ranks.any(torch.tensor([kept is None], device=model.device)).item():
        assert kept is not None
        return kept
    with locked(path):
        pass  # whether the cache can be written to is known before the work
    moments = gather()
    if ranks.rank == 0:
        _save(moments, path)
    return moments


def _path(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    block_widths: Mapping[str, int],
    batches: Sequence[Tensor],
    ranks: Ranks,
) -> Path:
    device = model.device.type
    key = {
        "format": _FORMAT,
        **identity(model, weights),
        "tokens": tensors_digest({str(number): batch for number, batch in enumerate(batches)}),
        "block_widths": dict(block_widths),
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        "ranks": ranks.size,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "statistics" / f"{digest}.safetensors"


def _save(moments: Mapping[str, Moment], path: Path) -> None:
    blocks = {name: moment.blocks.cpu().contiguous() for name, moment in moments.items()}
    scratch = path.with_suffix(".tmp")
    with locked(path):
        try:
            save_file(blocks, scratch, metadata={"sha256": tensors_digest(blocks)})
            os.replace(scratch, path)
        except (OSError, SafetensorError) as error:
            logger.warning("the calibration statistics are not kept, %s cannot be written: %s", path, error)
        finally:
            scratch.unlink(missing_ok=True)


def _load(path: Path, block_widths: Mapping[str, int], device: torch.device) -> dict[str, Moment] | None:
    """The kept moments on a device, or None if they are absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            digest = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if blocks.keys() != block_widths.keys() or digest != tensors_digest(blocks):
        return None
    return {name: Moment(blocks[name].to(device)) for name in block_widths}
