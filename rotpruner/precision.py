"""Floating-point types: by name, wide enough, fast on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from rotpruner.errors import InputError

#: Not float16, in which the gradients of a mean over tokens vanish unless they are scaled.
DtypeName = Literal["auto", "bfloat16", "float32", "float64"]


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """A dtype by its name; `auto` is `fast_dtype` of the device.

    Raises:
        InputError: no such name.
    """
    if name not in get_args(DtypeName):
        raise InputError(f"unknown dtype '{name}'; choose one of {', '.join(get_args(DtypeName))}")
    return fast_dtype(device) if name == "auto" else getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as configs and results have it."""
    return str(dtype).removeprefix("torch.")


def check_device(device: torch.device) -> None:
    """Raise `InputError` if a device lacks a dtype that is needed."""
    if device.type == "mps":
        raise InputError("mps has no float64, in which rotations are checked and errors measured: use the cpu")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 if it is narrower."""
    return torch.promote_types(dtype, torch.float32)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, and no buffers: rotary frequencies lose their phases in 16 bits."""
    for parameter in model.parameters():  # tied ones come once
        parameter.data = parameter.data.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """A context in which matrix products on a device are taken in `dtype`; off, as for None, unless it has 16 bits."""
    narrow = dtype is not None and dtype.itemsize < 4
    return torch.autocast(device.type, dtype=dtype if narrow else None, enabled=narrow)


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
