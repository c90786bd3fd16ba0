"""Calibration tokens for a fit, and the position in them."""

from functools import cached_property
from typing import Any

import lightning
import torch
from torch import Tensor

from datamodules.texts import check_text
from datamodules.tokens import calibration_tokens, check_sizes
from rotpruner.batches import CalibrationBatches
from rotpruner.errors import InputError
from rotpruner.loading import load_tokenizer


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
        check_sizes(num_sequences, seq_len, seed)
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
        self._saved: dict[str, Any] | None = None

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
        """The other ranks read the cache; every rank checks that it holds a batch for each of them."""
        self._batches = None  # of an earlier fit
        self._make_batches()

    def _make_batches(self) -> CalibrationBatches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return CalibrationBatches(self.tokens, self.batch_size, self.seed, rank, world_size)

    def train_dataloader(self) -> CalibrationBatches:
        """This rank's batches; where Lightning asks for them again, they go on."""
        saved = self._saved if self._batches is None else self._batches.state_dict()
        self._batches, self._saved = self._make_batches(), None
        if saved is not None:
            self._batches.load_state_dict(saved)
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
