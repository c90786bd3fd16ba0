"""Where a module will run."""

from __future__ import annotations

import torch
from lightning import LightningModule


def root_device(module: LightningModule) -> torch.device:
    """The device that a module's trainer has chosen for it; without a trainer the one that it is on."""
    return module.device if module._trainer is None else module.trainer.strategy.root_device
