"""What tells models apart: hashes of their weights and of everything else that decides what they compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotpruner.distributed import whole
from rotpruner.families import family_of
from rotpruner.layout import module_at


def fingerprint(model: nn.Module) -> str:
    """Tells models apart: a hash of the first embedding rows in bfloat16.

    Alike in the checkpoint's own dtype and all that hold its values or round to bfloat16; float16 may round otherwise.
    """
    embedding = module_at(model, family_of(model.config).embeddings[0]).weight
    rows = embedding[:256].detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and all bits of some tensors; sharded ones come together one at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What decides what a model computes, as JSON: architecture, weights to the bit, device type, versions of code.

    Args:
        weights: by name, where they are not those of the model's `state_dict`.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "class": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": tensors_digest(model.state_dict() if weights is None else weights),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
