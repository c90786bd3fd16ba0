"""Memory that has been freed, and that the C library has not given back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch


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
