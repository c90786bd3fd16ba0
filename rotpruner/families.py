"""Model families, one table each: which linear reads and writes which space, and where the norms stand.

Everything else (fusion, calibration, rotation, pruning, export) asks the table. A family from outside
the package is one `Family` and one call of `register_family`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.orthogonal import Constraint

#: Places where a rotation may live. `mlp` has none but permutations: its activation function is elementwise.
SpaceName = Literal["residual", "value_heads", "query_key", "mlp"]
SPACES: tuple[SpaceName, ...] = ("residual", "value_heads", "query_key", "mlp")

#: Why a space does not exist: always, or for some configs (then None for the others).
Refusal = str | Callable[[Any], str | None]


@dataclass(frozen=True)
class LinearSpec:
    """A row of the table: one linear of a decoder block.

    Attributes:
        path: module path inside the block.
        reads: name of the space of its input.
        writes: name of the space of its output.
        norm: module path inside the block of the norm whose output it reads, if any. Linears with the
            same `reads` and `norm` read the same tensor and share its statistics.
    """

    path: str
    reads: str
    writes: str
    norm: str | None = None


@dataclass(frozen=True)
class Family:
    """How the modules of a model family touch its spaces.

    Attributes:
        model_types: values of `config.model_type`.
        linears: rows in the order in which data flows through a block.
        embeddings: module paths inside the causal language model, as all that follow.
        blocks: list of the decoder blocks.
        final_norm: between the last block and the head.
        head: linear that makes logits.
        gain_offset: what a norm adds to its weight to make its gain.
        constraints: for a space, which rotations leave the function alone; any where it is not named.
        refusals: for a space, why a model does not have it.
        unsliceable: why the residual stream cannot become narrower within the model's class, if so.
        after_head: (config, output of the head) → logits, where the head's output is not the logits.
    """

    model_types: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    gain_offset: float = 0.0
    constraints: Mapping[str, Constraint] = field(default_factory=lambda: {"query_key": "planes"})
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    unsliceable: str | None = None
    after_head: Callable[[Any, Tensor], Tensor] = lambda config, output: output

    def __post_init__(self) -> None:
        """Refuse a table that would compute another function, or miss a reader, without anyone seeing it.

        Raises:
            InputError: a name is no space's, a linear reads a space that none writes, one writes a space that none
                reads, or readers of one tensor stand apart.
        """
        reads, writes = ({getattr(spec, side) for spec in self.linears} for side in ("reads", "writes"))
        table = f"the table of {', '.join(self.model_types)}"
        if unknown := sorted({*reads, *writes, *self.constraints, *self.refusals} - {*SPACES}):
            raise InputError(f"{table} names the space {unknown[0]}, which is none of {', '.join(SPACES)}")
        if lost := sorted(reads - writes):
            raise InputError(
                f"{table} has a linear that reads {lost[0]}, which none writes: a rotation would stay there"
            )
        if lost := sorted(writes - reads - {"query_key"}):  # attention itself reads that one
            raise InputError(
                f"{table} has a linear that writes {lost[0]}, which none reads: a rotation would stay there"
            )
        groups = [key for key, _ in groupby((spec.reads, spec.norm) for spec in self.linears)]
        if apart := [key for key in groups if groups.count(key) > 1]:
            where = "without a norm" if apart[0][1] is None else f"after {apart[0][1]}"
            raise InputError(
                f"{table} has linears that read {apart[0][0]} {where} apart from each other: put rows "
                "that read one tensor next to each other, and give readers of others another norm"
            )


def _gated_decoder(mlp_norm: str) -> tuple[LinearSpec, ...]:
    return (
        LinearSpec("self_attn.q_proj", "residual", "query_key", norm="input_layernorm"),
        LinearSpec("self_attn.k_proj", "residual", "query_key", norm="input_layernorm"),
        LinearSpec("self_attn.v_proj", "residual", "value_heads", norm="input_layernorm"),
        LinearSpec("self_attn.o_proj", "value_heads", "residual"),
        LinearSpec("mlp.gate_proj", "residual", "mlp", norm=mlp_norm),
        LinearSpec("mlp.up_proj", "residual", "mlp", norm=mlp_norm),
        LinearSpec("mlp.down_proj", "mlp", "residual"),
    )


def _partly_rotary(config: Any) -> str | None:
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return None if share == 1 else f"rotary positions turn a share of {share:g} of each head only"


LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "smollm3"),
    linears=_gated_decoder("post_attention_layernorm"),
    refusals={"query_key": _partly_rotary},
)

_HEAD_NORMS = "each head's queries and keys pass through norms of their own"

QWEN3 = replace(LLAMA, model_types=("qwen3",), refusals={"query_key": _HEAD_NORMS})

GEMMA = replace(
    LLAMA,
    model_types=("gemma",),
    gain_offset=1.0,
    unsliceable="its embeddings are scaled by the root of hidden_size",
)


def _softcapped(config: Any, output: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return output if cap is None else cap * torch.tanh(output / cap)


_NORMED_WRITERS = "norms stand between the linears that write the residual stream and the stream"

GEMMA2 = replace(
    GEMMA,
    model_types=("gemma2",),
    linears=_gated_decoder("pre_feedforward_layernorm"),
    refusals={**GEMMA.refusals, "residual": _NORMED_WRITERS},
    after_head=_softcapped,
)

GEMMA3 = replace(GEMMA2, model_types=("gemma3_text",), refusals={"residual": _NORMED_WRITERS, "query_key": _HEAD_NORMS})


def _opt_residual(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "each norm stands after a sum of the residual stream, not in front of a linear"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"embeddings of width {config.word_embed_proj_dim} are projected to {config.hidden_size}"
    if config._remove_final_layer_norm:
        return "no norm stands between the stream and the head"
    if config.layer_norm_elementwise_affine and not config.enable_bias:
        return "the linears have no bias that could take up the norms' biases"
    return None


OPT = Family(
    model_types=("opt",),
    linears=(
        LinearSpec("self_attn.q_proj", "residual", "query_key", norm="self_attn_layer_norm"),
        LinearSpec("self_attn.k_proj", "residual", "query_key", norm="self_attn_layer_norm"),
        LinearSpec("self_attn.v_proj", "residual", "value_heads", norm="self_attn_layer_norm"),
        LinearSpec("self_attn.out_proj", "value_heads", "residual"),
        LinearSpec("fc1", "residual", "mlp", norm="final_layer_norm"),
        LinearSpec("fc2", "mlp", "residual"),
    ),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    blocks="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    constraints={"residual": "fixes_ones"},
    refusals={"residual": _opt_residual},
    unsliceable="its attention ties the width of its heads to hidden_size, and LayerNorm needs the all-ones direction",
)

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known under its model types; a later registration of a type wins."""
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


for _family in (LLAMA, QWEN3, GEMMA, GEMMA2, GEMMA3, OPT):
    register_family(_family)


def family_of(config: Any) -> Family:
    """The family of a `transformers` config.

    Raises:
        InputError: `config.model_type` has no table.
    """
    # A checkpoint with online rotations is of the same family, see `rotpruner.shortcuts`.
    model_type = config.model_type.removeprefix("rotated_")
    if model_type in _FAMILIES:
        return _FAMILIES[model_type]
    known = ", ".join(sorted(_FAMILIES))
    if reason := _unsuitable(config):
        raise InputError(f"model family '{config.model_type}' is refused: {reason}; choose one of {known}")
    raise InputError(
        f"unknown model family '{config.model_type}'; known are {known}; "
        "add one with rotpruner.families.register_family"
    )


def _unsuitable(config: Any) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, not a decoder"
    if any("expert" in name for name in config.to_dict()):
        return "it is a mixture of experts, which a table of linears does not describe"
    if config.get_text_config() is not config:
        return "it is multimodal; give its language model alone"
    return None


def _refusal(config: Any, space: str) -> str | None:
    if space == "residual" and getattr(config, "shortcuts", None):
        return "its stream changes basis on the way already"
    reason = family_of(config).refusals.get(space)
    return reason(config) if callable(reason) else reason


def available_spaces(config: Any) -> tuple[SpaceName, ...]:
    """The spaces that a model has."""
    return tuple(space for space in SPACES if _refusal(config, space) is None)


def check_space(config: Any, space: str) -> None:
    """Raise `InputError` if the model does not have the space, with the reason."""
    if space not in SPACES:
        raise InputError(f"unknown space '{space}'; choose from {', '.join(SPACES)}")
    if reason := _refusal(config, space):
        raise InputError(
            f"space '{space}' does not exist in this {config.model_type} model: {reason}; "
            f"it has {', '.join(available_spaces(config))}"
        )
