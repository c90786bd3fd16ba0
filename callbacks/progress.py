"""Progress of a fit as a person wants it: steps of the whole run, the loss, the time left."""

from __future__ import annotations

import math
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from callbacks.steps import EverySteps
from callbacks.terminal import console

_LINES = 20  # that a run leaves in a log file, where a bar cannot be redrawn
_ENDLESS = 50  # steps between lines of a run that only time ends


class StepProgress(ProgressBar):
    """One bar over all optimiser steps on a terminal, a line now and then elsewhere.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.progress.StepProgress
    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._lines = EverySteps(1, "StepProgress")

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is about to be learned."""
        if self._enabled:
            module: Any = pl_module
            learned = module.trainable_parameters
            frozen = sum(parameter.numel() for parameter in module.parameters()) - learned
            console.print(f"{learned:,} parameters learn, {frozen:,} stay frozen")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide how often there is a line where no bar can be redrawn."""
        total = _total(trainer)
        self._lines = EverySteps(max(1, total // _LINES) if total else _ENDLESS, "StepProgress")
        self._lines.resume_at(trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar where it can be; only now, as a module's start of training may show bars of its own."""
        if not (self._enabled and console.is_terminal) or self._bar is not None:
            return
        self._bar = Progress(
            TextColumn("learning  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=_total(trainer), completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the loss and whatever else was logged for the bar."""
        if not self._enabled:
            return
        metrics = {name: value for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
        text = "  ".join(f"{name.removeprefix('train/')} {float(value):.4g}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=text)
        elif self._lines.is_due(trainer.global_step):
            of = f" of {total}" if (total := _total(trainer)) else ""
            console.print(f"step {trainer.global_step}{of}  {text}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal to whatever follows."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal to the error."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _total(trainer: Trainer) -> int | None:
    """Steps of the whole run; None if only time ends it."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) else int(steps)
