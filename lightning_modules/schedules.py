"""Learning rate schedules, one step for each optimiser step."""

from __future__ import annotations

from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_modules.trainers import endless
from rotpruner.errors import InputError


def check_schedule(schedule: Any, module: LightningModule) -> None:
    """Raise `InputError` if a schedule needs to know the last step of a run that has none."""
    if schedule == "cosine" and endless(module):
        raise InputError(
            "lr_scheduler cosine falls to zero at the run's last step, and this run has none: set trainer.max_steps, "
            "or lr_scheduler to constant"
        )


def with_schedule(
    optimizer: Optimizer, schedule: LRSchedulerCallable | Literal["constant", "cosine"], trainer: Trainer
) -> Any:
    """What `configure_optimizers` returns: `constant`, `cosine` to zero at the run's last step, or a scheduler."""
    if schedule == "constant":
        return optimizer
    if schedule == "cosine":
        scheduler: Any = CosineAnnealingLR(optimizer, int(trainer.estimated_stepping_batches))
    else:
        scheduler = schedule(optimizer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
