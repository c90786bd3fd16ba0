"""On a GPU all tensors must be where they are needed; a device that only claims to exist tells those that are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils import backend_registration

from lightning_modules.rotation_module import RotationModule
from lightning_modules.trainers import check_trainer
from rotpruner.errors import InputError


@pytest.mark.skipif(
    not torch.cuda.is_available() and not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this release of torch knows no devices made in Python",
)
@pytest.mark.parametrize("which", ["learning", "not learning"])
def test_every_tensor_is_where_it_is_needed(which):
    program = Path(__file__).with_name("on_a_device.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", which, str(program)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


def test_devices_and_strategies_that_cannot_be_are_refused(monkeypatch):
    module = RotationModule.__new__(RotationModule)
    LightningModule.__init__(module)
    module._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    check_trainer(module)
    monkeypatch.setattr("lightning_modules.trainers.root_device", lambda module: torch.device("mps"))
    with pytest.raises(InputError, match="mps has no float64"):
        check_trainer(module)
    monkeypatch.setattr("lightning_modules.trainers.root_device", lambda module: torch.device("cpu"))
    monkeypatch.setattr(module._trainer.strategy, "__class__", FSDPStrategy)
    with pytest.raises(InputError, match="FSDPStrategy flattens"):
        check_trainer(module)
