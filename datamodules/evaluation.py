"""Perplexity of a model on texts given by name or path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.texts import text_name, text_of
from rotpruner.errors import InputError
from rotpruner.perplexity import perplexity, windows


def token_ids(source: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A test text, joined with blank lines and tokenised once without special tokens: (tokens,) int64."""
    text = text_of(source, "test")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def tokenize_texts(
    sources: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, max_tokens: int | None
) -> dict[str, Tensor]:
    """Each text's tokens, by the text's name.

    Raises:
        InputError: a text cannot be read or does not fill a window, or two texts have the same name.
    """
    texts: dict[str, Tensor] = {}
    for source in sources:
        name = text_name(source)
        if name in texts:
            raise InputError(f"two texts are called '{name}'; rename one file")
        texts[name] = token_ids(source, tokenizer)
        try:
            windows(texts[name], seq_len, max_tokens)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return texts


def perplexities(
    model: PreTrainedModel,
    texts: dict[str, Tensor],
    seq_len: int,
    max_tokens: int | None,
    progress: Callable[..., Any],
) -> dict[str, float]:
    """Perplexity of each tokenised text; `progress(windows, description)` wraps the iteration."""
    found = {}
    for name, ids in texts.items():
        show = partial(progress, description=f"perplexity on {name}")
        found[name] = perplexity(model, ids.to(model.device), seq_len=seq_len, max_tokens=max_tokens, progress=show)
    return found
