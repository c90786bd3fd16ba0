"""GPUs that a plan can be made for, by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rotpruner.precision import DtypeName, resolve_dtype

_GIB, _TERA, _GIGA = 2**30, 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """Memory in bytes, peak rates in operations a second and bytes a second from the host to it, by the makers' data
    sheets, without sparsity."""

    memory: float
    half: float
    single: float
    link: float
    bfloat16: bool = True  # whether it has instructions for it


GPUS = {
    "v100-32gb": Hardware(32 * _GIB, 125 * _TERA, 15.7 * _TERA, 16 * _GIGA, bfloat16=False),
    "rtx4090-24gb": Hardware(24 * _GIB, 165 * _TERA, 82.6 * _TERA, 32 * _GIGA),
    "l40s-48gb": Hardware(48 * _GIB, 362 * _TERA, 91.6 * _TERA, 32 * _GIGA),
    "a100-40gb": Hardware(40 * _GIB, 312 * _TERA, 19.5 * _TERA, 32 * _GIGA),
    "a100-80gb": Hardware(80 * _GIB, 312 * _TERA, 19.5 * _TERA, 32 * _GIGA),
    "h100-80gb": Hardware(80 * _GIB, 989 * _TERA, 67 * _TERA, 64 * _GIGA),
    "h200-141gb": Hardware(141 * _GIB, 989 * _TERA, 67 * _TERA, 64 * _GIGA),
}


def dtype_on(name: DtypeName, gpu: str) -> torch.dtype:
    """What `rotpruner.precision.resolve_dtype` would find on a GPU that is not here."""
    if name != "auto" or gpu == "cpu":
        return resolve_dtype(name, torch.device("cpu"))
    return torch.bfloat16 if GPUS[gpu].bfloat16 else torch.float32
