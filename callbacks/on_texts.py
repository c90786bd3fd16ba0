"""A callback that evaluates on test texts."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.evaluation import text_windows
from datamodules.texts import check_text
from rotpruner.loading import check_seq_len, load_config, load_tokenizer


class OnTexts(Callback):
    """Looks at its texts before anything long begins.

    Args:
        texts: names or paths.
        seq_len: tokens per window.
        max_tokens: the first tokens of each text that are used; None takes all.
    """

    def __init__(self, texts: list[str], seq_len: int, max_tokens: int | None) -> None:
        for text in texts:
            check_text(text)
        self.texts, self.seq_len, self.max_tokens = texts, seq_len, max_tokens
        self._windows: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check it before the model's weights are loaded."""
        self.check(pl_module)

    def check(self, module: Any) -> None:
        """Raise `InputError` if it does not go with a run of this module."""
        check_seq_len(load_config(module.model_name), self.seq_len)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the texts on every rank, so that all of them stop at a bad one."""
        tokenizer = load_tokenizer(pl_module.model_name)  # type: ignore[arg-type]
        self._windows = text_windows(self.texts, tokenizer, self.seq_len, self.max_tokens)
