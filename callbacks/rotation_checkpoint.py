"""Checkpoints from which a run goes on, and the rotations of the moment in a form that every command reads."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from callbacks.steps import EverySteps
from callbacks.terminal import console
from rotpruner.distributed import whole
from rotpruner.errors import InputError
from rotpruner.rotation_artifact import Rotations

#: What a shell reports of a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint from which a run directory's run goes on, a file or a directory of shards."""
    for name in ("last.ckpt", "previous.ckpt"):
        if (run / "checkpoints" / name).exists():
            return run / "checkpoints" / name
    return None


def _replace(new: Path, target: Path, previous: Path) -> None:
    """Put a file or directory in another's place; at every moment one of the two is whole, under one of the names."""
    if target.is_dir() or (target.exists() and new.is_dir()):
        _remove(previous)
        os.replace(target, previous)
    os.replace(new, target)
    _remove(previous)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RotationCheckpoint(Checkpoint):
    """Every `every_n_steps` steps, at the last and on SIGTERM, write `checkpoints/last.ckpt` and `rotations/` if any.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.rotation_checkpoint.RotationCheckpoint
          init_args: {every_n_steps: 25}
    ```

    The checkpoint holds all that a resume needs: of a fit no base weights, of a recovery the whole model. The former
    one is replaced only once the new one is whole. SIGTERM, to one process or to all, ends the run after the step that
    it is in: with status 143, as a scheduler expects it of a job that it may put back into its queue. The last step is
    that of `max_steps` or `max_epochs`; a run that time ends may lose what came after its last checkpoint.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        self._steps = EverySteps(every_n_steps, "RotationCheckpoint")
        self._terminated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only take note of SIGTERM: Lightning's own handler speaks to the other ranks out of turn.

        The trainer puts back the handler that it found when training is over.
        """
        self._steps.resume_at(trainer.global_step)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._take_note)

    def _take_note(self, signum: int, frame: Any) -> None:
        self._terminated = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of a step, never between batches whose gradients accumulate."""
        step = trainer.global_step
        if not self._steps.advance(step):
            return
        ranks: Any = pl_module.ranks
        ending = bool(ranks.any(torch.tensor(self._terminated, device=pl_module.device)))
        if ending or step % self._steps.every_n_steps == 0 or step == trainer.estimated_stepping_batches:
            self._save(trainer, pl_module)
        if ending:
            if trainer.is_global_zero:
                console.print(f"SIGTERM: saved step {step}; run the same command again to resume")
            # One status for the job: launchers kill the rest where any other process fails.
            raise SystemExit(TERMINATED if trainer.is_global_zero else 0)

    def _save(self, trainer: Trainer, module: Any) -> None:
        learned = [whole(parameter) for parameter in module.parameters() if parameter.requires_grad]
        if not all(values.isfinite().all() for values in learned):  # the last good checkpoint stays
            raise InputError(
                f"what was learned is NaN or infinite at step {trainer.global_step}: learning has diverged; lower the "
                "optimizer's lr, in another --trainer.default_root_dir"
            )
        run = Path(trainer.default_root_dir)
        checkpoints = run / "checkpoints"
        scratch = checkpoints / ".last.ckpt.tmp"
        if trainer.is_global_zero:
            _remove(scratch)
        trainer.save_checkpoint(scratch, weights_only=False)
        rotations = module.rotated.rotations() if hasattr(module, "rotated") else None
        if trainer.is_global_zero:
            _replace(scratch, checkpoints / "last.ckpt", checkpoints / "previous.ckpt")
            if rotations is not None:
                Rotations.of(rotations, module.rotated.base).save_pretrained(run / "rotations", replace=True)
