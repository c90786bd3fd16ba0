"""What a trainer must be for these modules."""

from __future__ import annotations

from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_modules.devices import root_device
from rotpruner.errors import InputError


def check_trainer(module: LightningModule) -> None:
    """Raise `InputError` if a module's trainer has a device, a precision or a strategy that this code does not know."""
    device, strategy = root_device(module), module.trainer.strategy
    if device.type == "mps":
        raise InputError("accelerator mps has no float64, in which errors are measured: set trainer.accelerator to cpu")
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise InputError(
            f"{type(strategy).__name__} flattens the weight matrices that rotations multiply: use ddp, or "
            "lightning.pytorch.strategies.ModelParallelStrategy"
        )
    if module.trainer.precision != "32-true":
        raise InputError(
            f"trainer.precision {module.trainer.precision} would cast what is learned, which stays in float32: leave "
            "it out, and say in which dtype to compute with model.base_dtype (fit) or model.compute_dtype (recover)"
        )


def endless(module: LightningModule) -> bool:
    """Whether neither steps nor epochs limit a module's training."""
    return module.trainer.max_steps == module.trainer.max_epochs == -1
