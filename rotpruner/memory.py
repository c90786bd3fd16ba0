"""What memory there is: freed blocks that the C library has not given back, and room on a GPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

#: What a pass block by block holds at most, in tensors as large as the final states of its tokens: what goes into and
#: comes out of a block; for the update of kept weights, of two models' blocks, and what goes into the linears inside of
#: one, the last of its MLP the widest.
_STATES, _STATES_OF_UPDATE = 4, 24


def home_of(model: nn.Module, device: torch.device, calibrated: int = 0, fitted: int = 0) -> torch.device:
    """Where a model waits whose blocks run on a device: there as well, if that is a GPU with room, else where it is.

    Args:
        model: as it came, on the CPU.
        device: where its blocks run.
        calibrated: tokens that it is pruned with, if it is; their states wait with it, and another copy of it.
        fitted: tokens that kept weights are then fitted on, if they are, with four other copies of the model.

    Returns:
        The device, if all of it would take less than half of the GPU's free memory, or of this process's share where
        `ROTPRUNER_JOBS` says how many there are.
    """
    here = next(model.parameters()).device
    if device.type != "cuda":
        return here
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    copies = 5 if fitted else 2 if calibrated else 1
    states = max(_STATES * calibrated, _STATES_OF_UPDATE * fitted) * next(model.parameters()).element_size()
    states *= getattr(model, "config").hidden_size  # noqa: B009 - nn.Module knows no config
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held for this process to use
    jobs = int(os.environ.get("ROTPRUNER_JOBS", 1))
    return device if copies * weights + states < free / jobs / 2 else here


def release_freed(device: torch.device) -> None:
    """Give freed main memory back to the system, before something large is allocated that would come on top of it.

    glibc keeps freed blocks of up to 32 MB, a decoder block's activations among them: half a model's worth stays
    resident after a forward pass. Does nothing for another device, or with another C library. Takes milliseconds.
    """
    if device.type == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """`malloc_trim(3)` of the process's own C library, where it has one."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
