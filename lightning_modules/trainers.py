"""What a trainer must be for these modules, and what it is told of a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from lightning_modules.devices import root_device
from rotpruner.errors import InputError
from rotpruner.precision import check_device


def check_trainer(module: LightningModule) -> None:
    """Raise `InputError` if a module's trainer has a device, a precision or a strategy that this code does not know, or
    would write over what the module reads."""
    run = Path(module.trainer.default_root_dir)
    read = [getattr(module, name, None) for name in ("model_name", "teacher", "init_rotations", "init_weights")]
    for written in (run / "export", run / "rotations"):
        for name in map(str, filter(None, read)):
            if Path(name).expanduser().resolve() == written.resolve():
                raise InputError(
                    f"'{name}', which this run reads, would be replaced by what it writes to '{written}'; choose "
                    "another --trainer.default_root_dir"
                )
    device, strategy = root_device(module), module.trainer.strategy
    check_device(device)
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


def logged(module: LightningModule, losses: Mapping[str, Tensor]) -> Tensor:
    """The `loss` among the core's losses of a batch, all of which are logged under `train/`, as means over ranks."""
    values = {f"train/{name}": value.detach() for name, value in losses.items()}
    module.log_dict(values, prog_bar=True, sync_dist=True)
    return losses["loss"]


def endless(module: LightningModule) -> bool:
    """Whether neither steps nor epochs limit a module's training."""
    return module.trainer.max_steps == module.trainer.max_epochs == -1
