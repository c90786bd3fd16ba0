"""GPUs that a plan can be made for, by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rotpruner.precision import DtypeName, resolve_dtype

GIB, TERA, GIGA = 2**30, 1e12, 1e9


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
    "v100-32gb": Hardware(32 * GIB, 125 * TERA, 15.7 * TERA, 16 * GIGA, bfloat16=False),
    "rtx4090-24gb": Hardware(24 * GIB, 165 * TERA, 82.6 * TERA, 32 * GIGA),
    "l40s-48gb": Hardware(48 * GIB, 362 * TERA, 91.6 * TERA, 32 * GIGA),
    "a100-40gb": Hardware(40 * GIB, 312 * TERA, 19.5 * TERA, 32 * GIGA),
    "a100-80gb": Hardware(80 * GIB, 312 * TERA, 19.5 * TERA, 32 * GIGA),
    "h100-80gb": Hardware(80 * GIB, 989 * TERA, 67 * TERA, 64 * GIGA),
    "h200-141gb": Hardware(141 * GIB, 989 * TERA, 67 * TERA, 64 * GIGA),
}


def dtype_on(name: DtypeName, gpu: str) -> torch.dtype:
    """What `rotpruner.precision.resolve_dtype` would find on a GPU that is not here."""
    if name != "auto" or gpu == "cpu":
        return resolve_dtype(name, torch.device("cpu"))
    return torch.bfloat16 if GPUS[gpu].bfloat16 else torch.float32
