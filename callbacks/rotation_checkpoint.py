"""Checkpoints from which a run goes on, and the rotations of the moment in a form that every command reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from rotpruner.artifacts import save_rotations
from rotpruner.errors import InputError


class RotationCheckpoint(Checkpoint):
    """Every `every_n_steps` steps and at the last, write `checkpoints/last.ckpt` and `rotations/`.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.rotation_checkpoint.RotationCheckpoint
          init_args: {every_n_steps: 25}
    ```

    The checkpoint holds all that a resume needs and no base weights; the file before it is replaced only
    once the new one is whole.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        if every_n_steps < 1:
            raise InputError(f"every_n_steps {every_n_steps} of RotationCheckpoint is not positive; give 1 or more")
        self.every_n_steps = every_n_steps
        self._last = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of a step, once."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if not due or step == self._last:
            return
        self._last = step
        run = Path(trainer.default_root_dir)
        trainer.save_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=False)
        if trainer.is_global_zero:
            rotations = pl_module.rotated.rotations()  # type: ignore[operator, union-attr]
            save_rotations(rotations, pl_module.rotated.base, run / "rotations", replace=True)  # type: ignore
