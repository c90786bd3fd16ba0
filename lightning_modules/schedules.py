"""Learning rate schedules, one step for each optimiser step."""

from __future__ import annotations

from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from lightning_modules.trainers import endless
from rotpruner.errors import InputError


def check_schedule(schedule: Any, module: LightningModule, warmup_steps: int = 0) -> None:
    """Raise `InputError` if a schedule needs to know the last step of a run that has none, or only ever warms up."""
    if warmup_steps and 0 < module.trainer.max_steps <= warmup_steps:
        raise InputError(
            f"warmup_steps {warmup_steps} leave none of the run's {module.trainer.max_steps} steps at the full rate; "
            "give fewer"
        )
    if schedule == "cosine" and endless(module):
        raise InputError(
            "lr_scheduler cosine falls to zero at the run's last step, and this run has none: set trainer.max_steps, "
            "or lr_scheduler to constant"
        )


def with_schedule(
    optimizer: Optimizer,
    schedule: LRSchedulerCallable | Literal["constant", "cosine"],
    trainer: Trainer,
    warmup_steps: int = 0,
) -> Any:
    """What `configure_optimizers` returns: `constant`, `cosine` to zero at the run's last step, or a scheduler.

    Before that, the first `warmup_steps` steps come up to its rate in equal parts.
    """
    if schedule == "constant" and not warmup_steps:
        return optimizer
    if schedule == "cosine":
        remaining = max(1, int(trainer.estimated_stepping_batches) - warmup_steps)
        scheduler: Any = CosineAnnealingLR(optimizer, remaining)
    else:
        scheduler = ConstantLR(optimizer, 1.0) if schedule == "constant" else schedule(optimizer)
    if warmup_steps:
        warmup = LinearLR(optimizer, 1 / (warmup_steps + 1), 1.0, warmup_steps)
        scheduler = SequentialLR(optimizer, [warmup, scheduler], [warmup_steps])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
