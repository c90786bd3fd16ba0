"""What is written to disk: rotations, exported models and JSON, each under a temporary name first, then renamed.

Rotations are a directory of `rotations.safetensors` (the matrices Q in float32, by space) and
`rotation_config.json` (the model they were learned on). Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotpruner.errors import InputError
from rotpruner.families import family_of, module_at
from rotpruner.rotations import RotationSet, check_rotation

_FORMAT = 1


@contextmanager
def new_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A directory that appears under `path` only when the block has ended well.

    Raises:
        InputError: `path` exists and is not an empty directory, and `replace` is false.
    """
    path = Path(path)
    check_new_directory(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        if path.exists():
            shutil.rmtree(path)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_new_directory(path: str | Path, replace: bool = False) -> None:
    """Raise `InputError` if `path` holds something already and is not to be replaced."""
    path = Path(path)
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"output '{path}' exists already; choose another directory or remove it")


def write_bytes(content: bytes, path: str | Path) -> None:
    """Write a file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file in UTF-8, whole or not at all."""
    write_bytes(text.encode(), path)


def write_json(value: Any, path: str | Path) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(json.dumps(value, indent=2) + "\n", path)


def fingerprint(model: nn.Module) -> str:
    """Tells models apart, whatever dtype they are loaded in: a hash of the first embedding rows in bfloat16."""
    embedding = module_at(model, family_of(model.config).embeddings[0]).weight
    rows = embedding[:256].detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def save_rotations(
    rotations: Mapping[str, Tensor], model: nn.Module, directory: str | Path, replace: bool = False
) -> None:
    """Write the rotations of a model (in its own basis still) to a directory."""
    model_config: Any = model.config
    config = {
        "format": _FORMAT,
        "model_type": model_config.model_type,
        "model_fingerprint": fingerprint(model),
        "spaces": {space: list(Q.shape) for space, Q in rotations.items()},
    }
    with new_directory(directory, replace) as scratch:
        tensors = {space: Q.detach().to("cpu", torch.float32).contiguous() for space, Q in rotations.items()}
        save_file(tensors, scratch / "rotations.safetensors")
        write_json(config, scratch / "rotation_config.json")


def read_rotations(directory: str | Path, model_config: Any) -> tuple[RotationSet, dict[str, Any]]:
    """Read rotations and their config, and check that they are whole, orthogonal and of this model's shape.

    Raises:
        InputError: missing or damaged files, or the rotations of another kind of model.
    """
    directory = Path(directory)
    config_path, tensors_path = directory / "rotation_config.json", directory / "rotations.safetensors"
    for path in (config_path, tensors_path):
        if not path.is_file():
            raise InputError(f"no rotations at '{directory}': {path.name} is missing; give a directory that has it")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        rotations = load_file(tensors_path)
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"rotations at '{directory}' are damaged ({error}); save them again") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise InputError(f"rotations at '{directory}' are not of format {_FORMAT}; save them with this version")
    if config.get("model_type") != model_config.model_type:
        raise InputError(
            f"rotations at '{directory}' were learned on another model, a {config.get('model_type')}; "
            "give the model that they were learned on"
        )
    for space, Q in rotations.items():
        try:
            check_rotation(model_config, space, Q)
        except InputError as error:
            raise InputError(f"rotations at '{directory}' do not fit: {error}") from None
    return rotations, config


def load_rotations(directory: str | Path, model: nn.Module) -> RotationSet:
    """Read rotations and check that they are whole, orthogonal and of this very model.

    Raises:
        InputError: as `read_rotations`, or they were learned on other weights.
    """
    rotations, config = read_rotations(directory, model.config)
    if config.get("model_fingerprint") != fingerprint(model):
        raise InputError(
            f"rotations at '{directory}' were learned on another model of the same type; "
            "give the model that they were learned on"
        )
    return rotations


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    replace: bool = False,
) -> None:
    """Write an ordinary checkpoint that plain `transformers` loads."""
    with new_directory(directory, replace) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
