"""Re-apply the pruner while the rotations move."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from rotpruner.errors import InputError


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
        if every_n_steps < 1:
            raise InputError(f"every_n_steps {every_n_steps} of Repruning is not positive; give 1 or more")
        self.every_n_steps = every_n_steps
        self._last = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Once a step, also when gradients of several batches accumulate; the module has chosen those of the first."""
        step = trainer.global_step
        if step > 0 and step % self.every_n_steps == 0 and step != self._last:
            self._last = step
            flipped = pl_module.rotated.refresh_masks()  # type: ignore[operator, union-attr]
            error = pl_module.orthogonality_error()  # type: ignore[operator]
            pl_module.log_dict({"masks/flipped": flipped, "rotations/orthogonality_error": error})
