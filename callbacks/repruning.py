"""Re-apply the pruner while the rotations move."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from callbacks.steps import EverySteps, log_at


class Repruning(Callback):
    """Choose the masks anew every `every_n_steps` optimiser steps, in the rotations of that moment.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.repruning.Repruning
          init_args: {every_n_steps: 5}
    ```

    Logs `masks/flipped`, the share of mask entries that changed, and `rotations/orthogonality_error`.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        self._steps = EverySteps(every_n_steps, "Repruning")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Once a step, also when gradients of several batches accumulate; the module has chosen those of the first."""
        # Without `resume_at`: the turn of a checkpoint's own step comes after it.
        if self._steps.is_due(trainer.global_step):
            module: Any = pl_module
            flipped = module.rotated.refresh_masks()
            found = {"masks/flipped": flipped, "rotations/orthogonality_error": module.orthogonality_error()}
            log_at(trainer, found, trainer.global_step)
