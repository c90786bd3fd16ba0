"""Which floating-point type a device multiplies fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from rotpruner.errors import InputError

DtypeName = Literal["auto", "bfloat16", "float16", "float32", "float64"]


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """A dtype by its name; `auto` is `fast_dtype` of the device.

    Raises:
        InputError: no such name.
    """
    if name not in get_args(DtypeName):
        raise InputError(f"unknown dtype '{name}'; choose one of {', '.join(get_args(DtypeName))}")
    return fast_dtype(device) if name == "auto" else getattr(torch, name)


def autocast_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to give autocast for products in `dtype`; None, no autocast, unless it has 16 bits."""
    return dtype if dtype.itemsize < 4 else None


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for its products, else float32.

    Without them it is emulated: on a CPU that knows AVX2 only, products take seven times as long as those of float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Older releases of torch do not say; float32 is the safe choice.
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32
