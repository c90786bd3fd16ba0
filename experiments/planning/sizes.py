"""The sizes that a plan is reckoned from: the settings of a fit and its model's shapes, without any weights.

Symbols of all formulas: P parameters, M weights of decoder linears, L blocks, T tokens a sequence, B sequences a
batch, d width of the residual stream, f of the MLP, h query and g key-value heads of width e, V vocabulary, s bytes of
an element of the frozen model, r bytes of an element of the rotations, K entries of all rotations and k free
parameters in them. A decoder linear has O outputs and I inputs, a rotation of its side is n wide.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from rotpruner.allotment import LayerSparsity
from rotpruner.layout import BlockLinear, block_linears, module_at
from rotpruner.loading import meta_model
from rotpruner.measures import parameter_count
from rotpruner.objectives import Objective
from rotpruner.orthogonal import MapName
from rotpruner.patterns import NM, Pattern, Slice
from rotpruner.placements import Placement, basis_changes, head_dim, key_value_heads, mlp_width, space_shape
from rotpruner.pruners import Pruner
from rotpruner.rotations import LearnedRotations, Start
from rotpruner.slicing import sliced_width


@dataclass(frozen=True)
class Term:
    """One part of what a fit takes: how much, and the formula that gives it, with the numbers put in."""

    name: str
    amount: int
    formula: str


def summed(parts: Iterable[str]) -> str:
    """Summands of a formula, in parentheses if there are several."""
    found = list(parts)
    return f"({' + '.join(found)})" if len(found) > 1 else "".join(found) or "0"


def total(terms: Iterable[Term]) -> int:
    """Their sum."""
    return sum(term.amount for term in terms)


@dataclass(frozen=True)
class Setup:
    """The settings that decide what a fit takes.

    Attributes:
        config: of the model, as `transformers` reads it.
        pruner: that is re-applied.
        spaces: that rotate.
        placement: of the residual stream's matrices.
        pattern: that is applied; a `Slice` has neither masks nor a pruner.
        orthogonal_map: how their matrices are parametrised.
        start: of the rotations.
        layer_sparsity: how blocks share the pattern.
        compensate: how many sequences the kept weights are fitted on at the end.
        objective: what is minimised.
        dtype: of the frozen weights and activations.
        seq_len, batch_size, num_sequences, steps: of a rank.
        statistics_sequences: how many of the sequences give the pruner its statistics.
        test_tokens: of the longest text on which perplexity is measured at the end.
        gradient_checkpointing: whether blocks are recomputed in the backward pass.
        offload: whether the decoder linears' weights wait in main memory; with gradient checkpointing, unsharded.
        second_steps: of a second fit after the update of the kept weights, see `second`; 0 is none.
        second_teacher: whether the dense model is there besides a base that has taken over other weights.
        optimizer_states: tensors that the optimiser keeps for each parameter; Adam has 2.
        keeps_unmasked: whether the surrogate keeps W' besides the masked weight (SR-STE does).
        ranks: GPUs that share the work.
        sharded: whether they share the blocks' weights too (FSDP2), or hold a copy each.
        device: `cpu` or `gpu`.
        model: of the config, on the meta device; made if left out, and handed on by `dataclasses.replace`.
    """

    config: Any
    pruner: Pruner
    spaces: Sequence[str] = ("residual", "value_heads")
    placement: Placement = "shared"
    pattern: Pattern | Slice = NM(2, 4)  # noqa: RUF009 - frozen
    orthogonal_map: MapName = "cayley"
    start: Start = "identity"
    layer_sparsity: LayerSparsity = "uniform"
    compensate: int = 0
    objective: Objective = Objective()  # noqa: RUF009 - frozen
    dtype: torch.dtype = torch.bfloat16
    seq_len: int = 1024
    batch_size: int = 1
    num_sequences: int = 128
    statistics_sequences: int = 128
    test_tokens: int = 0
    steps: int = 100
    gradient_checkpointing: bool = False
    offload: bool = False
    second_steps: int = 0
    second_teacher: bool = False
    optimizer_states: int = 2
    keeps_unmasked: bool = False
    ranks: int = 1
    sharded: bool = False
    device: str = "gpu"
    model: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.model is None:
            object.__setattr__(self, "model", meta_model(self.config))

    @property
    def second(self) -> Setup | None:
        """The fit that goes on after the update, if there is one."""
        if not self.second_steps:
            return None
        changed: dict[str, Any] = {"steps": self.second_steps, "second_steps": 0, "compensate": 0, "start": "identity"}
        return replace(self, **changed, second_teacher=True)

    @cached_property
    def linears(self) -> list[tuple[BlockLinear, int, int]]:
        """Every decoder linear with its outputs O and inputs I."""
        found = []
        for place in block_linears(self.config):
            linear = module_at(self.model, place.name)
            found.append((place, linear.out_features, linear.in_features))
        return found

    @cached_property
    def parameters(self) -> int:
        """P, tied ones counted once."""
        return parameter_count(self.model)

    @cached_property
    def decoder_weights(self) -> int:
        """M."""
        return sum(outputs * inputs for _, outputs, inputs in self.linears)

    @property
    def fetches(self) -> bool:
        """Whether offloaded weights are copied to a device; a CPU uses them where they are."""
        return self.offload and self.device == "gpu"

    @cached_property
    def trainable(self) -> int:
        """k."""
        with torch.device("meta"):
            rotations = LearnedRotations(self.config, self.spaces, self.orthogonal_map, placement=self.placement)
        return parameter_count(rotations)

    @cached_property
    def rotation_entries(self) -> int:
        """K."""
        return sum(self._entries)

    @cached_property
    def largest_space(self) -> int:
        """Entries of all matrices of the space that has most."""
        return max(self._entries)

    @property
    def _entries(self) -> list[int]:
        return [count * n * n for count, n in self.matrices]

    @cached_property
    def matrices(self) -> list[tuple[int, int]]:
        """For each space its number of matrices and their width n."""
        shapes = [space_shape(self.config, space, self.placement) for space in self.spaces]
        return [(sites * blocks, n) for sites, blocks, n in shapes]

    @cached_property
    def block(self) -> list[tuple[BlockLinear, int, int]]:
        """The linears of the first block; the others are like it."""
        return [found for found in self.linears if found[0].layer == 0]

    def width(self, space: str) -> int:
        """n of what rotates a side of a linear, 0 if nothing does."""
        return space_shape(self.config, space)[2] if space in self.spaces else 0

    @cached_property
    def moments(self) -> list[tuple[int, int]]:
        """I and n of a block's moments: diagonal blocks as wide as what rotates them, one for each group of linears."""
        found = []
        for place, _, inputs in self.block:
            if not place.leads_group:
                continue
            if self.sliced:  # directions are removed by what all readers of the stream see, whatever the pruner
                found += [(inputs, inputs)] if place.spec.reads == "residual" else []
            elif self.pruner.needs != "nothing":
                found.append((inputs, inputs if self.pruner.needs == "full" else self.width(place.spec.reads) or 1))
        return found

    @property
    def statistics(self) -> int:
        """Entries of all moments."""
        return self.layers * sum(inputs * n for inputs, n in self.moments)

    def legend(self) -> list[str]:
        """The symbols of all formulas with this fit's numbers, for a person who follows the arithmetic."""
        config = self.config
        sizes = summed(f"{outputs} · {inputs}" for _, outputs, inputs in self.block)
        names = ", ".join(place.spec.path.rpartition(".")[2] for place, _, _ in self.block)
        return [
            f"L = {self.layers}, d = {config.hidden_size}, f = {mlp_width(config)}, h = {config.num_attention_heads}, "
            f"g = {key_value_heads(config)}, e = {head_dim(config)}, V = {config.vocab_size:,}, T = {self.seq_len}, "
            f"B = {self.batch_size}, s = {self.s} bytes, r = {self.r} bytes",
            f"P = {self.parameters:,}, among them M = L Σ O · I = {self.layers} · {sizes} = {self.decoder_weights:,}: "
            f"{names}",
            f"K = Σ matrices · n² = {summed(f'{count} · {n}²' for count, n in self.matrices)} = "
            f"{self.rotation_entries:,}, of which k = {self.trainable:,} are free",
        ]

    @property
    def sliced(self) -> bool:
        return isinstance(self.pattern, Slice)

    @cached_property
    def exported_parameters(self) -> int:
        """Of the merged model: its head untied where the residual stream rotates, narrower if it was sliced, and with
        the products that changes of basis leave."""
        if "residual" not in self.spaces:
            return self.parameters
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings = False
        if isinstance(self.pattern, Slice):
            config.head_dim = head_dim(config)
            config.hidden_size = sliced_width(self.config, self.pattern)
        return parameter_count(meta_model(config)) + self.basis_changes * config.hidden_size**2

    @cached_property
    def basis_changes(self) -> int:
        """Sublayers whose residual connection carries a product (d, d)."""
        if "residual" not in self.spaces:
            return 0
        return len(basis_changes(self.config, space_shape(self.config, "residual", self.placement)[0]))

    @property
    def s(self) -> int:
        return self.dtype.itemsize

    @property
    def r(self) -> int:
        return max(4, self.s)

    @property
    def tokens(self) -> int:
        """B · T."""
        return self.batch_size * self.seq_len

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def checkpoint_size(self) -> int:
        """Bytes of an element of the saved model."""
        return (getattr(self.config, "dtype", None) or torch.float32).itemsize

    @cached_property
    def largest(self) -> int:
        """Weights of the largest decoder linear."""
        return max(outputs * inputs for _, outputs, inputs in self.linears)
