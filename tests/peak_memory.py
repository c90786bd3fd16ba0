"""Run as a program: train a few steps and print the peak of resident memory above what imports take, in bytes.

`python tests/peak_memory.py RUN_DIRECTORY '{"model": {…}, "data": {…}, "steps": 3}'`, on Linux. Large blocks of memory
should go back to the system at once: set MALLOC_ARENA_MAX=1 and MALLOC_MMAP_THRESHOLD_=65536.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer

from callbacks.repruning import Repruning
from datamodules.calibration import CalibrationDataModule
from lightning_modules.rotation_module import RotationModule
from rotpruner.loading import load_tokenizer

needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of pages")


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` (the peak) of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


class Peaks(Callback):
    """The peak of each phase; resets the kernel's mark in between."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def mark(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks.get(phase, 0), resident("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")

    def on_fit_start(self, trainer, pl_module) -> None:
        self.mark("load")

    def on_train_start(self, trainer, pl_module) -> None:
        self.mark("calibrate")

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.mark("train")


def main(run: str, settings: dict) -> dict[str, int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = settings["model"]["model"]
    data = CalibrationDataModule(**settings["data"], model=name)
    load_tokenizer(name)
    data.prepare_data()
    peaks = Peaks()
    trainer = Trainer(
        default_root_dir=run,
        max_steps=settings["steps"],
        accelerator="cpu",
        logger=False,
        callbacks=[peaks, Repruning(1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = RotationModule(**settings["model"])
    (torch.ones(8, 8) @ torch.ones(8, 8)).sum()  # libraries that load at the first product
    before = resident("VmRSS")
    peaks.mark("start")
    trainer.fit(module, data)
    found = {phase: peak - before for phase, peak in peaks.peaks.items() if phase != "start"}
    return {"peak": max(found.values()), **found, "imports": before}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
