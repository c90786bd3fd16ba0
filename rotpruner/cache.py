"""The user's cache: files are found again by what they were made of, written by one process at a time, and whole.

Tensors carry their checksum, so that a damaged file counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotpruner.artifacts import replaced
from rotpruner.errors import InputError
from rotpruner.identity import tensors_digest


def cache_directory() -> Path:
    """`$ROTPRUNER_CACHE`, or `rotpruner` in the user's cache directory. Not created here."""
    if chosen := os.environ.get("ROTPRUNER_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "rotpruner"


def cache_path(kind: str, key: Mapping[str, Any], suffix: str = ".safetensors") -> Path:
    """Where something of a kind is kept that `key`, plain JSON, tells from everything else."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_directory() / kind / f"{digest}{suffix}"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time builds `target`, a file or directory of the cache; its parent is made here.

    Raises:
        InputError: nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock").acquire()
    except OSError as error:
        where = f"cannot write to the cache {target.parent} ({error.strerror})"
        raise InputError(f"{where}: set ROTPRUNER_CACHE to a writable directory") from error
    with lock:
        yield


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of tensors whole or not at all; the caller holds its lock."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replaced(path) as scratch:
        save_file(tensors, scratch, metadata={"sha256": tensors_digest(tensors)})


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, on the CPU, or None if it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            digest = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return tensors if digest == tensors_digest(tensors) else None
