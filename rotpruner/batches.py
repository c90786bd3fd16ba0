"""Which windows of a text are learned from, and in which order: functions of the seed, and of how many came before.

Shapes: N sequences, T tokens each (`seq_len`), B sequences a batch and rank.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.identity import tensors_digest
from rotpruner.seeds import generator_of


def permutation(count: int, *parts: object) -> Tensor:
    """The order (count,) int64, on the CPU, that belongs to some parts such as a seed."""
    return torch.randperm(count, generator=generator_of(*parts), device="cpu")  # whatever the default device is


def chosen_windows(windows: Tensor, num_sequences: int, seed: int) -> Tensor:
    """The start (N, T) of a seeded permutation of the windows of a text, of which there are at least so many."""
    return windows[permutation(len(windows), "windows", seed)[:num_sequences]]


class CalibrationBatches:
    """Endless passes over the sequences; each `iter` hands out `len(self)` batches, one epoch's worth.

    The n-th batch ever handed out is a pure function of (seed, n): every epoch is a fresh permutation of the
    rows, cut into global batches of `batch_size * world_size`, the rest dropped; each rank takes a strided
    share. An `iter` goes on where the last one stopped, so an epoch cut short (Lightning's
    `limit_train_batches`) and a resumed one alike give the batches that an uninterrupted run would see.
    """

    def __init__(self, tokens: Tensor, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """`tokens` is (N, T) int64; `batch_size` counts one rank's rows."""
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} is too small: pass 1 or more")
        if batch_size * world_size > len(tokens):
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            mend = "pass a smaller batch_size or more num_sequences"
            raise InputError(f"batch_size {batch_size}{ranks} is more than {len(tokens)} sequences: {mend}")
        self.tokens = tokens
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.global_batch = batch_size * world_size
        self.position = 0  # batches handed out since the beginning

    def __len__(self) -> int:
        return len(self.tokens) // self.global_batch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(len(self)):
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    def batch(self, position: int) -> dict[str, Tensor]:
        """`input_ids` (B, T) and `index` (B,), the row numbers, of this rank's share of a batch."""
        epoch, step = divmod(position, len(self))
        order = permutation(len(self.tokens), "batches", self.seed, epoch)
        index = order[step * self.global_batch :][: self.global_batch][self.rank :: self.world_size]
        return {"input_ids": self.tokens[index], "index": index}

    def state_dict(self) -> dict[str, Any]:
        """The position, and what gives it its meaning; alike on all ranks."""
        setting = {"sequences": len(self.tokens), "global_batch": self.global_batch, "seed": self.seed}
        return {"position": self.position, **setting, "tokens": self._digest}

    @cached_property
    def _digest(self) -> str:
        return tensors_digest({"tokens": self.tokens})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a saved position. Raises InputError if the settings or the tokens differ from the saved ones."""
        for name in ("sequences", "global_batch", "seed"):
            value = self.state_dict()[name]
            if state[name] != value:
                change = f"{name} {state[name]}, not {value}"
                raise InputError(f"the checkpoint's batches have {change}: resume with its own settings")
        if state.get("tokens", self._digest) != self._digest:  # those of earlier versions do not say
            raise InputError(
                "the checkpoint's batches have other tokens: the calibration text has changed. Resume with the text "
                "that it began with, or start over in another directory"
            )
        self.position = state["position"]
