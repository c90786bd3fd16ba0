"""Perplexity, the one measure: non-overlapping windows, float32 logits, float64 sums."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.precision import at_least_float32
from rotpruner.progress import Progress, unseen
from rotpruner.replay import final_states
from rotpruner.teacher import head_at


def windows(input_ids: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Cut ids (tokens,) into non-overlapping windows (count, seq_len); what does not fill one is dropped.

    Raises:
        InputError: `input_ids` has another shape, `seq_len` < 2, `max_tokens` < `seq_len`, or the text fills no window.
    """
    if input_ids.ndim != 1:
        raise InputError(f"input_ids of shape {tuple(input_ids.shape)} are not one text's (tokens,); take one row")
    if seq_len < 2:
        raise InputError(f"seq_len {seq_len} is too small; a window needs 2 tokens or more to have a target")
    if max_tokens is not None and max_tokens < seq_len:
        raise InputError(
            f"max_tokens {max_tokens} is less than one window of seq_len {seq_len}; give at least that, or leave it "
            "out to take the whole text"
        )
    used = input_ids[:max_tokens]
    count = len(used) // seq_len
    if count == 0:
        raise InputError(
            f"the text is too short: {len(used)} tokens do not fill one window of seq_len {seq_len}; "
            "give a longer text or a smaller seq_len"
        )
    return used[: count * seq_len].view(count, seq_len)


def summed_nll(logits: Tensor, input_ids: Tensor) -> tuple[Tensor, int]:
    """Sum of next-token negative log-likelihoods and their number, for logits (B, T, V) and ids (B, T).

    Cross-entropy in float32 (float64 for float64 logits), the sum in float64.
    """
    targets = input_ids[:, 1:]
    logits = logits[:, :-1].to(at_least_float32(logits.dtype))
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nll.double().sum(), targets.numel()


def perplexity(
    model: Any,
    input_ids: Tensor,
    *,
    seq_len: int = 1024,
    max_tokens: int | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
    description: str = "perplexity",
) -> float:
    """exp of the mean negative log-likelihood over `seq_len − 1` targets per window.

    Args:
        model: a causal language model in evaluation mode; without a device any callable of
            `input_ids` and `use_cache` does.
        input_ids: (tokens,), a text tokenised once without special tokens; a copy goes to the model.
        seq_len: tokens per window.
        max_tokens: use only the first tokens of the text.
        device: where the model is run one block at a time, while the rest of it and its states stay where they are.
            None, or where it is, runs it there as a whole.
        progress, description: wraps the iteration over windows or blocks, and what it is called.

    Raises:
        InputError: as `windows`.
    """
    cut = windows(input_ids, seq_len, max_tokens)
    return perplexity_of_windows(model, cut, device=device, progress=progress, description=description)


@torch.no_grad()
def perplexity_of_windows(
    model: Any,
    cut: Tensor,
    *,
    device: torch.device | None = None,
    progress: Progress = unseen,
    description: str = "perplexity",
) -> float:
    """`perplexity` of a text that is cut already: windows (count, seq_len)."""
    cut = cut.to(getattr(model, "device", cut.device))
    if device is None or device == cut.device:
        logits = (model(input_ids=window, use_cache=False).logits for window in progress(cut.split(1), description))
        return _perplexity(cut, logits)
    states = final_states(model, cut.split(1), device=device, progress=progress, description=description)
    with head_at(model, device) as head:
        return _perplexity(cut, (head(state.to(device)) for state in states))


def _perplexity(cut: Tensor, logits: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for window, found in zip(cut.split(1), logits, strict=True):
        nll, targets = summed_nll(found, window.to(found.device))
        total += nll.item()
        count += targets
    return of_mean(total / count)


def gap(ppl: float, dense: float) -> float:
    """G = ln ppl − ln ppl of the dense model, in nats per token; infinite perplexities have infinite gaps, or NaN."""
    return math.log(ppl) - math.log(dense)


def of_mean(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where that is too large for a float.

    Raises:
        InputError: it is NaN.
    """
    if math.isnan(nll):
        raise InputError("the model's logits are NaN: a weight is, or it overflows; load it in bfloat16 or float32")
    return math.inf if nll > 700 else math.exp(nll)
