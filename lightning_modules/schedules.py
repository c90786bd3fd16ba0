"""Learning rate schedules, one step for each optimiser step."""

from __future__ import annotations

from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR


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
