"""Packed checkpoints: of every weight with enough zeros, the values that stay and one bit a place.

One format for every pattern. A packed directory is an export's directory in which each `….safetensors` has
become `packed-….safetensors` and `packed_config.json` has joined. In the packed file a weight `name` of N
entries is `name:values` (kept,) in its own dtype, row by row, and `name:mask` (⌈N/8⌉,) uint8: bit i mod 8 of
byte i div 8 says whether entry i is kept. A weight is packed where that is smaller than the weight itself;
everything else is carried over as it is. Nothing is lost but the sign of zeros.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CHAT_TEMPLATE_DIR

from rotpruner.artifacts import new_directory, write_json
from rotpruner.errors import InputError

CONFIG = "packed_config.json"
_FORMAT = 1
_PREFIX = "packed-"
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack_mask(mask: Tensor) -> Tensor:
    """Booleans of any shape, N of them → (⌈N/8⌉,) uint8, the first in the lowest bit."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (bits.view(-1, 8) * _BITS).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: list[int]) -> Tensor:
    """What `pack_mask` has packed: (⌈N/8⌉,) uint8 → booleans of `shape`."""
    bits = (packed[:, None] & _BITS) != 0
    return bits.flatten()[: torch.Size(shape).numel()].view(shape)


def is_packed(directory: str | Path) -> bool:
    """Whether a directory holds a packed checkpoint."""
    return (Path(directory) / CONFIG).is_file()


def pack(directory: str | Path, output: str | Path) -> dict[str, Any]:
    """Write a packed copy of an exported checkpoint.

    Args:
        directory: with `config.json` and safetensors, sharded or not.
        output: directory to write; must not exist yet.

    Returns:
        Bytes of the packed weights `dense_bytes` before and `packed_bytes` after, their `ratio`, their number
        `weights`, and `output`.

    Raises:
        InputError: no such checkpoint, a damaged one, or no weight would become smaller; or `output` exists.
    """
    directory = Path(directory)
    sources = sorted(directory.glob("*.safetensors"))
    if is_packed(directory):
        raise InputError(f"'{directory}' is packed already; unpack it, or copy it")
    if not (directory / "config.json").is_file() or not sources:
        raise InputError(f"'{directory}' has no config.json with safetensors; give the directory of an export")
    files, dense_bytes, packed_bytes, weights = {}, 0, 0, 0
    with new_directory(output) as scratch:
        for source in sources:
            tensors, shapes = {}, {}
            with _opened(source) as opened:
                metadata = opened.metadata()
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    weight = opened.get_tensor(name)
                    kept = weight != 0
                    parts = {f"{name}:values": weight[kept], f"{name}:mask": pack_mask(kept)}
                    size = sum(part.nbytes for part in parts.values())
                    if weight.ndim < 2 or not weight.is_floating_point() or size >= weight.nbytes:
                        tensors[name] = weight
                        continue
                    tensors.update(parts)
                    shapes[name] = list(weight.shape)
                    dense_bytes, packed_bytes, weights = dense_bytes + weight.nbytes, packed_bytes + size, weights + 1
            target = scratch / f"{_PREFIX}{source.name}"
            save_file(tensors, target, metadata)
            files[source.name] = {"shapes": shapes, "sha256": _sha256(target)}
        if not weights:
            raise InputError(f"no weight of '{directory}' would become smaller; pack a model that was pruned")
        _copy_rest(directory, scratch)
        write_json({"format": _FORMAT, "files": files}, scratch / CONFIG)
    sizes = {"dense_bytes": dense_bytes, "packed_bytes": packed_bytes, "ratio": packed_bytes / dense_bytes}
    return {"output": str(output), "weights": weights, **sizes}


def unpack(directory: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the ordinary checkpoint that was packed; `transformers` loads it.

    Returns:
        `output` and the number of `weights` that were unpacked.

    Raises:
        InputError: no packed checkpoint, a damaged one, or `output` exists.
    """
    directory = Path(directory)
    files = _read_config(directory)
    with new_directory(output) as scratch:
        for name, entry in files.items():
            tensors, metadata = _read_file(directory, name, entry)
            save_file(tensors, scratch / name, metadata)
        _copy_rest(directory, scratch)
    return {"output": str(output), "weights": sum(len(entry["shapes"]) for entry in files.values())}


def read_packed(directory: str | Path) -> dict[str, Tensor]:
    """Every tensor of a packed checkpoint, dense, by name.

    Raises:
        InputError: no packed checkpoint, or a damaged one.
    """
    tensors: dict[str, Tensor] = {}
    for name, entry in _read_config(Path(directory)).items():
        tensors.update(_read_file(Path(directory), name, entry)[0])
    return tensors


def _copy_rest(directory: Path, output: Path) -> None:
    for path in directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != CONFIG:
            shutil.copyfile(path, output / path.name)
        elif path.name == CHAT_TEMPLATE_DIR:
            shutil.copytree(path, output / path.name)


def _read_config(directory: Path) -> dict[str, Any]:
    if not is_packed(directory):
        raise InputError(f"'{directory}' is not packed: it has no {CONFIG}")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != _FORMAT:
            raise InputError(f"'{directory}' is packed in format {config['format']}, not {_FORMAT}; pack it again")
        files = {str(name): {"shapes": dict(e["shapes"]), "sha256": e["sha256"]} for name, e in config["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(directory / CONFIG, error) from error
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _damaged(directory / CONFIG, f"'{name}' is no name of a file beside it")
    return files


def _read_file(directory: Path, name: str, entry: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    path = directory / f"{_PREFIX}{name}"
    if not path.is_file():
        raise InputError(f"'{directory}' lacks {path.name}; pack the model again")
    if _sha256(path) != entry["sha256"]:
        raise _damaged(path, "its checksum does not match")
    tensors = {}
    with _opened(path) as opened:
        names = set(opened.keys())
        try:
            for weight, shape in entry["shapes"].items():
                mask = unpack_mask(opened.get_tensor(f"{weight}:mask"), shape)
                values = opened.get_tensor(f"{weight}:values")
                tensors[weight] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)
                names -= {f"{weight}:mask", f"{weight}:values"}
        except (RuntimeError, TypeError) as error:
            raise _damaged(directory / CONFIG, error) from error
        tensors.update({each: opened.get_tensor(each) for each in names})
        return tensors, opened.metadata()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"'{path}' is damaged ({reason}); write it again from the model that it was made of")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
