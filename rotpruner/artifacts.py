"""What is written to disk: exported models, text and JSON, each under a temporary name first, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotpruner.errors import InputError
from rotpruner.shortcuts import exportable

_WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}

#: Bytes of a directory's name: file systems take 255, and a temporary name has some more.
_LONGEST = 230


@contextmanager
def new_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A directory that appears under `path` only when the block has ended well.

    Raises:
        InputError: `path` cannot be made, or is not an empty directory and `replace` is false.
    """
    path = Path(path).resolve()  # links stay, and what they lead to is made or replaced
    check_new_directory(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    former = scratch.with_name(f"{scratch.name}.former")
    try:
        scratch.chmod(0o755)
        yield scratch
        if path.exists():
            os.replace(path, former)
        os.replace(scratch, path)
    finally:
        if former.exists() and not path.exists():
            os.replace(former, path)
        for directory in (scratch, former):
            shutil.rmtree(directory, ignore_errors=True)


def check_new_directory(path: str | Path, replace: bool = False) -> None:
    """Raise `InputError` if `path` cannot be made, or holds something already and is not to be replaced."""
    path = Path(path).resolve()
    if os.path.ismount(path) or path == Path.cwd():  # which cannot be renamed, or not without harm
        raise InputError(f"output '{path}' is a mount point or the current directory; choose a new directory in it")
    if len(os.fsencode(path.name)) > _LONGEST:
        raise InputError(f"output '{path.name}' is longer than {_LONGEST} bytes; choose a shorter name")
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"output '{path}' exists already; choose another directory or remove it")
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"output '{path}' cannot be made in '{above}'; choose another directory")


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` only when the block has ended well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(content: bytes, path: str | Path) -> None:
    """Write a file, whole or not at all."""
    with replaced(path) as scratch:
        scratch.write_bytes(content)


def write_text(text: str, path: str | Path) -> None:
    """Write a file in UTF-8, whole or not at all; bytes of names that are no UTF-8 are spelt out."""
    write_bytes(text.encode(errors="backslashreplace"), path)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no numbers that are not finite, which become the strings of `_WORDS`."""

    def spelled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spelled(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [spelled(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps(spelled(value), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """What `to_json` was given, tuples as lists and the strings of `_WORDS` as numbers; or any other JSON."""

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: read(item) for key, item in value.items()}
        if isinstance(value, list):
            return [read(item) for item in value]
        return _WORDS.get(value, value) if isinstance(value, str) else value

    return read(json.loads(text))


def write_json(value: Any, path: str | Path) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(to_json(value, indent=2) + "\n", path)


def read_json(path: str | Path) -> Any:
    """What `write_json` has written."""
    return from_json(Path(path).read_text(encoding="utf-8"))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    replace: bool = False,
) -> None:
    """Write a checkpoint that plain `transformers` loads; with `trust_remote_code` if it has online rotations."""
    exported = exportable(model)
    with new_directory(directory, replace) as scratch:
        exported.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _spell_for_version_4(scratch)


def _spell_for_version_4(checkpoint: Path) -> None:
    """Add the names that transformers 4 knows, and programs that bring it along; version 5 reads both.

    Version 4 takes no notice of `rope_parameters`, and without a word its default for `rope_theta`; of tokenizers it
    does not know the class, and fails at a list of `extra_special_tokens`.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config.get("dtype")
    rope = config.get("rope_parameters") or {}
    turning = rope.get("full_attention", rope)
    if "rope_theta" in turning:
        scaling = {name: value for name, value in turning.items() if name != "rope_theta"}
        config["rope_theta"] = turning["rope_theta"]
        if "partial_rotary_factor" in scaling:
            config["partial_rotary_factor"] = scaling["partial_rotary_factor"]
        if scaling.get("rope_type", "default") != "default":
            config["rope_scaling"] = scaling
        if "sliding_attention" in rope:
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    write_text(json.dumps(config, indent=2), checkpoint / "config.json")
    path = checkpoint / "tokenizer_config.json"
    if path.is_file():  # some tokenizers, such as Mistral's own, are saved in other forms
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        write_text(json.dumps(settings, indent=2), path)
