"""Perplexity once more, from nothing but transformers and the definition."""

from __future__ import annotations

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def independent_perplexity(directory, text: str, window: int, tokens: int) -> float:
    """Of a checkpoint in float32, on the first `tokens` of a text, which windows must fill."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False).input_ids[:tokens]
    total = 0.0
    for start in range(0, tokens, window):
        chunk = torch.tensor(ids[start : start + window])
        log_p = model(chunk[None]).logits[0, :-1].double().log_softmax(-1)
        total -= log_p.gather(1, chunk[1:, None]).sum().item()
    return math.exp(total / (tokens - tokens // window))
