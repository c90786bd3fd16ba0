"""Perplexity of a model on texts given by name or path."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.texts import text_name, text_of
from rotpruner.artifacts import read_json, write_json
from rotpruner.cache import cache_path, locked
from rotpruner.errors import InputError
from rotpruner.identity import identity
from rotpruner.memory import home_of
from rotpruner.perplexity import perplexity_of_windows, windows
from rotpruner.progress import Progress

logger = logging.getLogger(__name__)

_FORMAT = 1  # of a kept perplexity: raise it whenever the same model and windows would give another value


def token_ids(source: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A test text, joined with blank lines and tokenised once without special tokens: (tokens,) int64."""
    text = text_of(source, "test")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def text_windows(
    sources: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, max_tokens: int | None
) -> dict[str, Tensor]:
    """Each text's first `max_tokens` tokens in non-overlapping windows (count, seq_len), by the text's name.

    Raises:
        InputError: a text cannot be read or does not fill a window, or two texts have the same name.
    """
    texts: dict[str, Tensor] = {}
    for source in sources:
        name = text_name(source)
        if name in texts:
            raise InputError(f"two texts are called '{name}'; rename one file")
        try:
            texts[name] = windows(token_ids(source, tokenizer), seq_len, max_tokens)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return texts


def perplexities(
    model: PreTrainedModel,
    texts: Mapping[str, Tensor],
    progress: Progress,
    keep: bool = False,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Perplexity of each text, given its windows; `progress` wraps the iteration over them, or over blocks.

    With a `device` that is not the model's, its blocks go there one at a time; or it goes as a whole, and stays there,
    if there is room (`rotpruner.memory.home_of`).

    With `keep`, which is for models that many runs are compared with, each value is measured once and stays in the
    cache. It is found again only for the same configuration and weights to the bit, the same windows, device type and
    versions of torch and transformers; what is damaged is measured again.
    """
    model_identity = identity(model) | {"device": (device or model.device).type} if keep else {}
    if device is not None:
        model.to(home_of(model, device))  # type: ignore[arg-type]
    found = {}
    for name, cut in texts.items():
        path = _cache_path(model_identity, cut) if keep else None
        value = _kept(path)
        if value is None:
            shown = f"perplexity on {name}"
            value = perplexity_of_windows(model, cut, device=device, progress=progress, description=shown)
            _keep(value, path)
        found[name] = value
    return found


def _cache_path(model_identity: dict[str, Any], cut: Tensor) -> Path:
    key = {
        "format": _FORMAT,
        **model_identity,
        "windows": list(cut.shape),
        "tokens": hashlib.sha256(cut.numpy().tobytes()).hexdigest(),
    }
    return cache_path("perplexity", key, ".json")


def _kept(path: Path | None) -> float | None:
    """The kept perplexity, or None if it is absent or damaged."""
    try:
        return None if path is None else float(read_json(path)["perplexity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(value: float, path: Path | None) -> None:
    if path is None:
        return
    try:
        with locked(path):
            write_json({"perplexity": value}, path)
    except (InputError, OSError) as error:  # it is only what another run would have been spared
        logger.warning("a reference's perplexity is not kept, %s cannot be written: %s", path, error)
