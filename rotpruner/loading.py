"""Models and tokenizers by name or path, checked before anything is done with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rotpruner import embedded
from rotpruner.allotment import Allotment, allot
from rotpruner.errors import InputError, explained
from rotpruner.families import family_of
from rotpruner.layout import check_described, linear_modules
from rotpruner.packed import is_packed, read_packed
from rotpruner.patterns import Pattern, Slice
from rotpruner.slicing import sliced_width

#: No checkpoint brings code along.
_OWN_CODE = {"trust_remote_code": False}


def _resolve(name: str) -> str:
    """Path or hub name that `from_pretrained` takes, for an embedded name, a directory or a hub name."""
    if name in embedded.MODELS:
        return str(embedded.model_directory(name))
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise InputError(f"model directory '{name}' has no config.json; give a directory in Hugging Face form")
        return str(path)
    if os.path.exists(path) or looks_local:
        raise InputError(
            f"model '{name}' is neither a directory, nor an embedded name ({', '.join(embedded.MODELS)}), "
            "nor a hub name (owner/name)"
        )
    return name


def _pretrained(loader: Any, name: str, **kwargs: Any) -> Any:
    source = _resolve(name)
    local = os.path.isdir(source)
    mend = (
        "see that its files are whole" if local else "check the name, the network and, if it is gated, `hf auth login`"
    )
    with explained(f"cannot load '{name}'", mend):
        return loader.from_pretrained(None if "state_dict" in kwargs else source, **kwargs)


def load_config(name: str) -> Any:
    """The `transformers` config of a model of a known family.

    Raises:
        InputError: nothing loadable has that name, its family has no table, or its weights are quantised.
    """
    config = _pretrained(AutoConfig, name, **_OWN_CODE)
    family_of(config)
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(f"'{name}' is quantised ({method}), and codes cannot be rotated; give the 16-bit checkpoint")
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises `InputError` if it cannot be loaded."""
    return _pretrained(AutoTokenizer, name, **_OWN_CODE)


def _packed_weights(directory: str, config: Any) -> dict[str, Any]:
    """What `from_pretrained` takes in place of a directory."""
    with torch.device("cpu"):  # whatever device is the default of the moment
        return {"config": config, "state_dict": read_packed(directory)}


def load_model(
    name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, its weights checked to be finite.

    Args:
        name: embedded name, local directory (packed ones too) or hub name.
        dtype: of the weights; None keeps the checkpoint's.
        device: where it goes; None is the CPU.

    Raises:
        InputError: it cannot be loaded, its family is unknown, or a weight is missing, NaN or infinite.
    """
    name = str(name)
    config, source = load_config(name), _resolve(name)
    weights = _packed_weights(source, config) if is_packed(source) else {}
    # The automatic class insists on a directory, the model's own does not.
    loader: Any = type(meta_model(config)) if weights else AutoModelForCausalLM
    settings = {"dtype": "auto" if dtype is None else dtype, "output_loading_info": True, **_OWN_CODE}
    model, found = _pretrained(loader, name, **settings, **weights)
    _check_complete(name, model, found)
    if weights and (Path(source) / "generation_config.json").is_file():
        model.generation_config = _pretrained(GenerationConfig, source)
    model.eval()
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"weight {parameter_name} of '{name}' holds NaN or infinity; repair the checkpoint")
    return model if device is None else model.to(device)


def _check_complete(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise `InputError` if a checkpoint lacks weights, which would be drawn at random, or its linears have more."""
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"'{name}' lacks {', '.join(missing[:3])}: no complete {type(model).__name__}")
    linears = linear_modules(model)
    if left_out := sorted(key for key in found["unexpected_keys"] if key.rpartition(".")[0] in linears):
        raise InputError(f"'{name}' has {', '.join(left_out[:3])}, which its config does not declare; mend config.json")


def meta_model(config: Any) -> PreTrainedModel:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_seq_len(config: Any, seq_len: int) -> None:
    """Raise `InputError` if the model has no positions for a sequence of that many tokens."""
    limit = config.max_position_embeddings
    if seq_len > limit:
        raise InputError(f"seq_len {seq_len} is longer than the model's {limit} positions; shorten it")


def check_pattern(model: nn.Module, pattern: Pattern | Slice | Allotment) -> None:
    """Raise `InputError` if the model (on the meta device will do) cannot take the pattern, or its table is wrong."""
    check_described(model)
    allotment = Allotment.of(pattern)
    if isinstance(allotment.pattern, Slice):
        sliced_width(model.config, allotment.pattern)
        return
    patterns = allot(model.config, allotment.pattern, allotment.exceptions)
    for name, linear in linear_modules(model).items():
        patterns[name].validate(name, linear.weight.shape)
