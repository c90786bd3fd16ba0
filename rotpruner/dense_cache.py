"""What a dense model gives on calibration text, kept in the cache for runs of that model on that text.

A file holds the blocks of every moment, or the final states of one sequence, and is found again only for the same
weights to the bit, the same configuration, tokens, number of ranks, device type, dtype of products and versions of
torch and transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from rotpruner.cache import cache_path, load_tensors, locked, save_tensors
from rotpruner.distributed import Ranks
from rotpruner.errors import InputError
from rotpruner.identity import identity, tensors_digest
from rotpruner.statistics import Moment

logger = logging.getLogger(__name__)

_FORMAT = 2  # raise it whenever the same model and tokens would give something else


class DenseCache:
    """The moments and final states that one model's earlier runs have left.

    Where something cannot be written whole, a warning says so, and nothing more is written.

    Args:
        model, weights: whose they are; the weights by name, sharded ones too.
        ranks: that run the model together.
    """

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Tensor], ranks: Ranks) -> None:
        self._ranks, self._device = ranks, model.device
        self._model = {"format": _FORMAT, **identity(model, weights), "ranks": ranks.size}
        self._gave_up = False

    def moments(
        self, gather: Callable[[], dict[str, Moment]], block_widths: Mapping[str, int], batches: Sequence[Tensor]
    ) -> dict[str, Moment]:
        """What `gather` returns, from the cache if it is there, else left there now.

        All ranks make this call together, and gather together if the file is absent or damaged for one of them; the
        first rank writes it.

        Args:
            gather: computes the moments, which lie on the model's device.
            block_widths: of the moments, by their names.
            batches: token ids, each (sequences, seq_len).

        Raises:
            InputError: the cache cannot be written to.
        """
        tokens = {str(number): batch for number, batch in enumerate(batches)}
        path = self._path("statistics", tokens, block_widths=dict(block_widths))
        kept = load_tensors(path)
        absent = kept is None or kept.keys() != block_widths.keys()
        if not self._ranks.any(torch.tensor([absent], device=self._device)).item():
            assert kept is not None
            return {name: Moment(kept[name].to(self._device)) for name in block_widths}
        with locked(path.parent):
            pass  # whether the cache can be written to is known before the work
        moments = gather()
        if self._ranks.rank == 0:
            self._save({name: moment.blocks for name, moment in moments.items()}, path)
        return moments

    def states(self, input_ids: Tensor) -> Tensor | None:
        """The final hidden states (seq_len, d) of one sequence (seq_len,), on the CPU, if they are there."""
        kept = load_tensors(self._path("states", {"ids": input_ids}))
        return None if kept is None else kept["states"]

    def keep_states(self, input_ids: Tensor, states: Tensor) -> None:
        """Leave the final hidden states (seq_len, d) of one sequence (seq_len,) there."""
        self._save({"states": states}, self._path("states", {"ids": input_ids}))

    def _path(self, kind: str, tokens: Mapping[str, Tensor], **more: Any) -> Path:
        device = self._device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        key = {**self._model, "autocast": autocast, "tokens": tensors_digest(tokens), **more}
        return cache_path(kind, key)

    def _save(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        if self._gave_up:
            return
        try:
            with locked(path.parent):
                save_tensors(tensors, path)
        except (InputError, OSError, SafetensorError) as error:
            self._gave_up = True
            logger.warning("what the dense model gave is not kept, %s cannot be written: %s", path, error)
