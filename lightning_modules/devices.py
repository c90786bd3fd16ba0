"""Where and how a module will run."""

from __future__ import annotations

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from rotpruner.errors import InputError


def root_device(module: LightningModule) -> torch.device:
    """The device that a module's trainer has chosen for it; without a trainer the one that it is on."""
    return module.device if module._trainer is None else module.trainer.strategy.root_device


def check_trainer(module: LightningModule) -> None:
    """Raise `InputError` if a module's trainer has a device or a strategy on which this code does not compute."""
    device, strategy = root_device(module), module.trainer.strategy
    if device.type == "mps":
        raise InputError("accelerator mps has no float64, in which errors are measured: set trainer.accelerator to cpu")
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise InputError(
            f"{type(strategy).__name__} would flatten the weights that rotations are multiplied with: take ddp, or "
            "lightning.pytorch.strategies.ModelParallelStrategy"
        )


def endless(module: LightningModule) -> bool:
    """Whether neither steps nor epochs limit a module's training."""
    return module.trainer.max_steps == module.trainer.max_epochs == -1
