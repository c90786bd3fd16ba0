"""Text → cached token tensor → batches that are a pure function of the seed and of how many came before.

Shapes: N sequences, T tokens each (`seq_len`), B sequences a batch and rank.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.texts import check_text, hub_text, pieces, stream, text_identity
from rotpruner.embedded import cache_directory, locked
from rotpruner.errors import InputError
from rotpruner.loading import load_tokenizer

_FORMAT = 1  # of the cached tensor: raise it whenever the same arguments would give other tokens


def calibration_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    seq_len: int,
    seed: int,
    tokenizer_name: str,
) -> Tensor:
    """Windows of the text's tokens, (N, T) int64, from the cache if they are there.

    The documents are joined with blank lines, tokenised without special tokens and cut into windows that do
    not overlap. Which windows: the start of a seeded permutation of all of them; for a streamed hub data set,
    whose documents come shuffled by the seed, the first ones. `tokenizer_name` stands for the tokenizer in
    the cache's key only if it has no backend to hash. Too short a text raises InputError.
    """
    _check_sizes(num_sequences, seq_len, seed)
    key = {
        "format": _FORMAT,
        "text": text_identity(source, "calibration"),
        "tokenizer": _tokenizer_identity(tokenizer, tokenizer_name),
        "num_sequences": num_sequences,
        "seq_len": seq_len,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_directory() / "calibration" / f"{digest}.safetensors"
    shape, vocabulary = (num_sequences, seq_len), 1 + max(tokenizer.get_vocab().values())
    tokens = _load(path, shape, vocabulary)
    if tokens is None:
        with locked(path):
            tokens = _load(path, shape, vocabulary)  # somebody else may have built it while we waited
            if tokens is None:
                spool = path.with_suffix(".spool")  # we hold the lock: no other writer has it open
                try:
                    tokens = _windows(source, tokenizer, shape, seed, spool)
                finally:
                    spool.unlink(missing_ok=True)
                assert 0 <= tokens.min() <= tokens.max() < vocabulary
                _save(tokens, path)
    return tokens


def _check_sizes(num_sequences: int, seq_len: int, seed: int) -> None:
    bounds = {"num_sequences": (num_sequences, 1), "seq_len": (seq_len, 2), "seed": (seed, 0)}
    for name, (value, bound) in bounds.items():
        if value < bound:
            raise InputError(f"{name} {value} is too small: pass {bound} or more")


def _windows(source: str, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, int], seed: int, spool: Path) -> Tensor:
    """The chosen windows. All tokens of the text wait in the file `spool`, for the memory of one piece of it."""
    num_sequences, seq_len = shape
    hub = hub_text(source)
    streamed = hub is not None and not hub.whole
    count = 0
    with spool.open("wb") as file:
        for piece in pieces(stream(source, split="calibration", seed=seed)):
            ids = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
            array("i", ids).tofile(file)  # int32
            count += len(ids)
            if streamed and count >= num_sequences * seq_len:
                break
    total = count // seq_len
    if total < num_sequences:
        wanted = f"{num_sequences} are wanted: pass a longer text, a smaller seq_len or fewer num_sequences"
        raise InputError(f"text {source!r} holds {total} windows of {seq_len} tokens, {wanted}")
    windows = torch.from_file(str(spool), size=total * seq_len, dtype=torch.int32).view(total, seq_len)  # mapped
    order = torch.arange(total) if streamed else torch.randperm(total, generator=_generator("windows", seed))
    return windows[order[:num_sequences]].long()


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return name if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()


def _generator(*parts: object) -> torch.Generator:
    """A generator of its own for each tuple of parts, whatever the global random state is."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _save(tokens: Tensor, path: Path) -> None:
    scratch = path.with_suffix(".tmp")  # we hold the lock: no other writer has it open
    save_file({"tokens": tokens}, scratch, metadata={"sha256": _digest(tokens)})
    os.replace(scratch, path)


def _load(path: Path, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    """The cached tensor, or None if it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tokens, metadata = file.get_tensor("tokens"), file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    sound = tokens.dtype == torch.int64 and tokens.shape == shape
    sound = sound and metadata.get("sha256") == _digest(tokens)
    return tokens if sound and 0 <= tokens.min() <= tokens.max() < vocabulary else None


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
        order = torch.randperm(len(self.tokens), generator=_generator("batches", self.seed, epoch))
        index = order[step * self.global_batch :][: self.global_batch][self.rank :: self.world_size]
        return {"input_ids": self.tokens[index], "index": index}

    def state_dict(self) -> dict[str, int]:
        """The position, and what gives it its meaning; alike on all ranks."""
        setting = {"sequences": len(self.tokens), "global_batch": self.global_batch, "seed": self.seed}
        return {"position": self.position, **setting}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position. Another setting than the saved one raises InputError."""
        for name, value in self.state_dict().items():
            if name != "position" and state[name] != value:
                change = f"{name} {state[name]}, not {value}"
                raise InputError(f"the checkpoint's batches have {change}: resume with its own settings")
        self.position = state["position"]


class CalibrationDataModule(lightning.LightningDataModule):
    """Calibration sequences for a fit, tokenised once and cached.

    ```yaml
    data:
      calibration: wikipedia_calibration  # any name or path that `datamodules.texts` lists
      num_sequences: 480
      statistics_sequences: 128
      seq_len: 1024
      batch_size: 1  # `seed` and `model` are taken from the run's own
    ```

    Args:
        calibration: the text, a name or a path.
        num_sequences: how many windows of the text are learned from.
        seq_len: tokens in a window.
        batch_size: windows in a batch of one rank.
        seed: chooses the windows and the order of the batches.
        model: whose tokenizer is used: an embedded or hub name, or a local directory.
        statistics_sequences: how many of the windows, the first ones, give the pruner its statistics; None takes all.
    """

    def __init__(
        self,
        calibration: str = "wikipedia_calibration",
        num_sequences: int = 128,
        seq_len: int = 1024,
        batch_size: int = 1,
        seed: int = 0,
        model: str = "smollm2-135m",
        statistics_sequences: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_sequences, seq_len, seed)
        if statistics_sequences is not None and not 1 <= statistics_sequences <= num_sequences:
            raise InputError(
                f"statistics_sequences {statistics_sequences} is not between 1 and num_sequences {num_sequences}"
            )
        CalibrationBatches(torch.empty(num_sequences, 0), batch_size)  # refuses a batch_size that cannot be
        check_text(calibration)
        self.calibration, self.model = calibration, model
        self.num_sequences, self.seq_len = num_sequences, seq_len
        self.statistics_sequences = statistics_sequences or num_sequences
        self.batch_size, self.seed = batch_size, seed
        self._batches: CalibrationBatches | None = None
        self._saved: dict[str, int] | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """(num_sequences, seq_len) int64."""
        sizes = {"num_sequences": self.num_sequences, "seq_len": self.seq_len, "seed": self.seed}
        tokenizer = load_tokenizer(self.model)
        return calibration_tokens(self.calibration, tokenizer, **sizes, tokenizer_name=self.model)

    @property
    def statistics_tokens(self) -> Tensor:
        """(statistics_sequences, seq_len) int64: what the pruner sees."""
        return self.tokens[: self.statistics_sequences]

    def prepare_data(self) -> None:
        """One process a node fills the cache."""
        self.tokens  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        """The others read it, and all see that it holds a batch for each."""
        self._make_batches()

    def _make_batches(self) -> CalibrationBatches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return CalibrationBatches(self.tokens, self.batch_size, self.seed, rank, world_size)

    def train_dataloader(self) -> CalibrationBatches:
        """This rank's batches."""
        self._batches = self._make_batches()
        if self._saved is not None:
            self._batches.load_state_dict(self._saved)
            self._saved = None
        return self._batches

    @property
    def sequences_learned(self) -> int:
        """How many sequences all ranks together have been given so far, repeated ones counted each time."""
        return 0 if self._batches is None else self._batches.position * self._batches.global_batch

    # Lightning restores a loader's own state only when it resumes within an epoch, the data module's always.

    def state_dict(self) -> dict[str, Any]:
        """The batches' position."""
        return self._batches.state_dict() if self._batches is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the batches are made; some strategies read a checkpoint only after that."""
        if self._batches is None:
            self._saved = state_dict or None
        elif state_dict:
            self._batches.load_state_dict(state_dict)
