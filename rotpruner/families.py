"""Model families, one table each: which linear reads and writes which space, and where the norms stand.

Everything else (fusion, calibration, rotation, pruning, export) asks the table. A family from outside
the package is one `Family` and one call of `register_family`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from rotpruner.errors import InputError

#: Places where a rotation may live. `mlp` has no continuous one: its activation function is elementwise.
SpaceName = Literal["residual", "value_heads"]
SPACES: tuple[SpaceName, ...] = ("residual", "value_heads")


@dataclass(frozen=True)
class LinearSpec:
    """A row of the table: one linear of a decoder block.

    Attributes:
        path: module path inside the block.
        reads, writes: names of the spaces of its input and output.
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
        embeddings, blocks, final_norm, head: module paths inside the causal language model.
        refusals: for a space, a function of the config that gives the reason why this model does not
            have it, or None.
    """

    model_types: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    refusals: Mapping[str, Callable[[Any], str | None]] = field(default_factory=dict)


_GATED_DECODER = (
    LinearSpec("self_attn.q_proj", "residual", "query_key", norm="input_layernorm"),
    LinearSpec("self_attn.k_proj", "residual", "query_key", norm="input_layernorm"),
    LinearSpec("self_attn.v_proj", "residual", "value_heads", norm="input_layernorm"),
    LinearSpec("self_attn.o_proj", "value_heads", "residual"),
    LinearSpec("mlp.gate_proj", "residual", "mlp", norm="post_attention_layernorm"),
    LinearSpec("mlp.up_proj", "residual", "mlp", norm="post_attention_layernorm"),
    LinearSpec("mlp.down_proj", "mlp", "residual"),
)

LLAMA = Family(model_types=("llama", "mistral"), linears=_GATED_DECODER)

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known under its model types; a later registration of a type wins."""
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


register_family(LLAMA)


def family_of(config: Any) -> Family:
    """The family of a `transformers` config.

    Raises:
        InputError: `config.model_type` has no table.
    """
    try:
        return _FAMILIES[config.model_type]
    except KeyError:
        raise InputError(
            f"unknown model family '{config.model_type}'; known are {', '.join(sorted(_FAMILIES))}; "
            "add one with rotpruner.families.register_family"
        ) from None


def check_space(config: Any, space: str) -> None:
    """Raise `InputError` if the model does not have the space, with the reason."""
    if space not in SPACES:
        raise InputError(f"unknown space '{space}'; choose from {', '.join(SPACES)}")
    refusal = family_of(config).refusals.get(space)
    if refusal and (reason := refusal(config)):
        raise InputError(f"space '{space}' does not exist in this {config.model_type} model: {reason}")


@dataclass(frozen=True)
class BlockLinear:
    """One linear of one decoder block, by its place in the model.

    Attributes:
        name: module path in the model.
        layer: index of the block.
        spec: its row in the family's table.
        group: name of the first linear that reads the same tensor.
    """

    name: str
    layer: int
    spec: LinearSpec
    group: str


def block_linears(config: Any) -> list[BlockLinear]:
    """Every decoder linear of a model, in data-flow order."""
    family = family_of(config)
    found = []
    for layer in range(config.num_hidden_layers):
        prefix = f"{family.blocks}.{layer}."
        first: dict[tuple[str, str | None], str] = {}
        for spec in family.linears:
            name = prefix + spec.path
            found.append(BlockLinear(name, layer, spec, first.setdefault((spec.reads, spec.norm), name)))
    return found


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder linears of a model, by name, in data-flow order."""
    return {linear.name: model.get_submodule(linear.name) for linear in block_linears(model.config)}  # type: ignore[misc]
