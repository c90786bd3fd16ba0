"""Models whose residual stream changes its basis on the way; it needs nothing but torch and transformers.

A decoder sublayer computes x + f(x). Where the stream is in the basis Q before it and in R after it, f writes in R
already and the residual connection carries T = QᵀR: x T + f(x). That is one (d, d) product a token, which no plain
checkpoint can hold; everything else is the ordinary model. This file lies beside such checkpoints, so that

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

loads them. `config.shortcuts` says where the products are: `blocks` is the path of the decoder blocks, `sublayers`
holds (first norm, last linear) of each sublayer of a block, `changes` the numbers of the sublayers, counted through the
model, that change the basis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


class Passage(nn.Module):
    """x + f(x) becomes something else after a sublayer f: its last linear writes that, less the x that is added to it.

    Hooks do it, so that any model can have it whose class knows nothing of it.
    """

    _stream: Tensor | None = None

    def after(self, stream: Tensor, output: Tensor) -> Tensor:
        """What is to be added to the stream x (…, d) instead of the output f(x) (…, d)."""
        raise NotImplementedError

    def attach(self, norm: nn.Module, writer: nn.Module) -> None:
        """Hook into a sublayer: its norm, which reads the stream, and the last of its linears, which writes it."""
        norm.register_forward_pre_hook(self._keep)
        writer.register_forward_hook(self._write)

    def _keep(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._stream = args[0]

    def _write(self, writer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        stream, self._stream = self._stream, None
        return output if stream is None else self.after(stream, output)


class Shortcut(Passage):
    """x T + f(x), with T (d, d) stored in the model."""

    def __init__(self, width: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, dtype=dtype))

    def after(self, stream: Tensor, output: Tensor) -> Tensor:
        """f(x) + x T − x."""
        return in_another_basis(stream, output, self.weight)


def in_another_basis(stream: Tensor, output: Tensor, T: Tensor) -> Tensor:
    """f(x) + x T − x, for the stream x and the output f(x) (…, d)."""
    return output + (stream @ T.to(stream.dtype) - stream)


def add_shortcuts(model: Any) -> None:
    """Give a model the shortcuts that its config names, their weights not filled in."""
    shortcuts = model.config.shortcuts
    blocks, sublayers = model.get_submodule(shortcuts["blocks"]), shortcuts["sublayers"]
    for number in shortcuts["changes"]:
        block, (norm, writer) = blocks[number // len(sublayers)], sublayers[number % len(sublayers)]
        if not hasattr(block, "shortcuts"):
            block.shortcuts = nn.ModuleDict()
        linear = block.get_submodule(writer)
        shortcut = Shortcut(linear.out_features, linear.weight.dtype).to(linear.weight.device)
        shortcut.attach(block.get_submodule(norm), linear)
        block.shortcuts[str(number % len(sublayers))] = shortcut


class Rotated:
    """Mixed into a causal language model: it has the shortcuts that its config names."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        add_shortcuts(self)


class RotatedLlamaConfig(LlamaConfig):
    """As `LlamaConfig`, with `shortcuts`."""

    model_type = "rotated_llama"


class RotatedLlamaForCausalLM(Rotated, LlamaForCausalLM):
    """As `LlamaForCausalLM`, with shortcuts."""

    config_class = RotatedLlamaConfig


class RotatedMistralConfig(MistralConfig):
    """As `MistralConfig`, with `shortcuts`."""

    model_type = "rotated_mistral"


class RotatedMistralForCausalLM(Rotated, MistralForCausalLM):
    """As `MistralForCausalLM`, with shortcuts."""

    config_class = RotatedMistralConfig


class RotatedQwen2Config(Qwen2Config):
    """As `Qwen2Config`, with `shortcuts`."""

    model_type = "rotated_qwen2"


class RotatedQwen2ForCausalLM(Rotated, Qwen2ForCausalLM):
    """As `Qwen2ForCausalLM`, with shortcuts."""

    config_class = RotatedQwen2Config


class RotatedQwen3Config(Qwen3Config):
    """As `Qwen3Config`, with `shortcuts`."""

    model_type = "rotated_qwen3"


class RotatedQwen3ForCausalLM(Rotated, Qwen3ForCausalLM):
    """As `Qwen3ForCausalLM`, with shortcuts."""

    config_class = RotatedQwen3Config


class RotatedSmolLM3Config(SmolLM3Config):
    """As `SmolLM3Config`, with `shortcuts`."""

    model_type = "rotated_smollm3"


class RotatedSmolLM3ForCausalLM(Rotated, SmolLM3ForCausalLM):
    """As `SmolLM3ForCausalLM`, with shortcuts."""

    config_class = RotatedSmolLM3Config


class RotatedGemmaConfig(GemmaConfig):
    """As `GemmaConfig`, with `shortcuts`."""

    model_type = "rotated_gemma"


class RotatedGemmaForCausalLM(Rotated, GemmaForCausalLM):
    """As `GemmaForCausalLM`, with shortcuts."""

    config_class = RotatedGemmaConfig


class RotatedOPTConfig(OPTConfig):
    """As `OPTConfig`, with `shortcuts`."""

    model_type = "rotated_opt"


class RotatedOPTForCausalLM(Rotated, OPTForCausalLM):
    """As `OPTForCausalLM`, with shortcuts."""

    config_class = RotatedOPTConfig
