"""A frozen causal language model that runs rotated and pruned: the loss of a batch, as a function of the rotations.

The base model keeps one copy of its weights, in the original basis. Each decoder linear makes its
rotated, masked weight when it is called (and again in the backward pass under gradient checkpointing);
the embedding's output is rotated and the final norm's input rotated back, so that everything outside
the decoder blocks stays as it is. Without rotations the same modules are the dense model, the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotpruner.families import BlockLinear, block_linears, family_of
from rotpruner.fusion import fuse_block_norms
from rotpruner.objectives import Objective
from rotpruner.oneshot import gather_model_moments
from rotpruner.orthogonal import rotate_bias, rotate_features, rotate_weight
from rotpruner.patterns import Pattern
from rotpruner.pruners import Pruner
from rotpruner.rotations import LearnedRotations, RotationSet, at_site, sides
from rotpruner.statistics import Moment
from rotpruner.surrogates import Surrogate


class Basis:
    """The rotations in which the linears of one model run at the moment; empty means dense."""

    def __init__(self) -> None:
        self.rotations: RotationSet = {}
        self.pruned = False


class RotatedLinear(nn.Linear):
    """A frozen decoder linear that runs in the basis of the moment: y = x (surrogate(Q_Bᵀ W Q_A, M))ᵀ + b Q_B."""

    mask: Tensor | None

    def __init__(self, linear: nn.Linear, place: BlockLinear, basis: Basis, surrogate: Surrogate) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.place, self.basis, self.surrogate = place, basis, surrogate
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        reads, writes = sides(self.basis.rotations, self.place)
        weight = rotate_weight(self.weight, reads, writes)
        if self.basis.pruned and self.mask is not None:
            weight = self.surrogate(weight, self.mask)
        return F.linear(x, weight, rotate_bias(self.bias, writes))


class RotatedModel(nn.Module):
    """A base model, learnable rotations of its spaces, and the pruner that they are learned for.

    Args:
        base: causal language model of a known family. It is taken over: frozen, its block norms fused,
            its dropout off, its decoder linears replaced by modules that hold the same weights.
        rotations: of its spaces.
        pruner, pattern: how masks are chosen.
        surrogate: how the gradient passes them.
        objective: what is minimised.
        gradient_checkpointing: recompute each block, and its rotated weights, in the backward pass.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        rotations: LearnedRotations,
        pruner: Pruner,
        pattern: Pattern,
        surrogate: Surrogate | None = None,
        objective: Objective | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.rotations = rotations
        self.pruner, self.pattern = pruner, pattern
        self.objective = objective or Objective()
        self.basis = Basis()
        self.moments: dict[str, Moment] = {}
        #: The rotations in which the masks of the moment were chosen; they determine the masks.
        self.mask_rotations: RotationSet | None = None
        #: The share of each block's mask entries that flipped at the last refresh.
        self.block_flips: list[float] = []
        self._dense_states: dict[int, Tensor] = {}

        if "residual" in rotations.spaces:
            fuse_block_norms(base)
            self._hook_residual_ends(base)
        base.requires_grad_(False)
        self.linears = self._replace_linears(base, surrogate or Surrogate())
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        # In evaluation mode transformers skips gradient checkpointing in silence; dropout is off anyway.
        self.base = base.train()
        if gradient_checkpointing:
            # transformers 5.0 knows this by its old name only.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def _replace_linears(self, base: PreTrainedModel, surrogate: Surrogate) -> list[RotatedLinear]:
        replaced = []
        for place in block_linears(base.config):
            linear = RotatedLinear(base.get_submodule(place.name), place, self.basis, surrogate)  # type: ignore[arg-type]
            base.set_submodule(place.name, linear)
            replaced.append(linear)
        return replaced

    def _hook_residual_ends(self, base: PreTrainedModel) -> None:
        def enter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            Q = at_site(self.basis.rotations, "residual", 0)
            return output if Q is None else rotate_features(output, Q.to(output.dtype))

        def leave(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            Q = at_site(self.basis.rotations, "residual", 0)
            return args if Q is None else (rotate_features(args[0], Q.mT.to(args[0].dtype)), *args[1:])

        family = family_of(base.config)
        for path in family.embeddings:
            base.get_submodule(path).register_forward_hook(enter)
        base.get_submodule(family.final_norm).register_forward_pre_hook(leave)

    # -- bases ---------------------------------------------------------------------------------

    def _enter_rotated(self, pruned: bool) -> None:
        # Not undone after the forward pass: recomputation in the backward pass needs the same basis.
        self.basis.rotations, self.basis.pruned = self.rotations(), pruned

    @contextmanager
    def dense(self) -> Iterator[PreTrainedModel]:
        """The base model as it came, for the time of a `with` block; no gradients."""
        held = self.basis.rotations, self.basis.pruned
        self.basis.rotations, self.basis.pruned = {}, False
        try:
            with torch.no_grad():
                yield self.base
        finally:
            self.basis.rotations, self.basis.pruned = held

    # -- calibration and masks -------------------------------------------------------------------

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Gather the statistics that the pruner needs from token batches (sequences, seq_len), once."""
        with self.dense() as base:
            self.moments = gather_model_moments(base, self.pruner, set(self.rotations.spaces), batches)

    @torch.no_grad()
    def refresh_masks(self, rotations: RotationSet | None = None) -> float:
        """Apply the pruner anew, in the rotations of the moment or in given ones.

        Returns:
            The share of mask entries that flipped, 0 at the first call.
        """
        self.mask_rotations = {
            space: Q.detach().clone() for space, Q in (self.rotations() if rotations is None else rotations).items()
        }
        rotated: dict[str, Moment] = {}
        flipped = [0] * self.base.config.num_hidden_layers
        total = [0] * len(flipped)
        for linear in self.linears:
            reads, writes = sides(self.mask_rotations, linear.place)
            group = linear.place.group
            if group in self.moments and group not in rotated:
                rotated[group] = self.moments[group].rotate(reads)
            weight = rotate_weight(linear.weight, reads, writes)
            mask = self.pruner.mask(weight, rotated.get(group), self.pattern)
            if linear.mask is not None:
                flipped[linear.place.layer] += int((mask != linear.mask).sum())
            total[linear.place.layer] += mask.numel()
            linear.mask = mask
        self.block_flips = [part / whole for part, whole in zip(flipped, total, strict=True)]
        return sum(flipped) / sum(total)

    # -- what is minimised -----------------------------------------------------------------------

    def forward(self, input_ids: Tensor, *, pruned: bool = True, use_cache: bool = False) -> Any:
        """The rotated model's output as `transformers` returns it, for ids (batch, seq_len)."""
        self._enter_rotated(pruned)
        return self.base(input_ids=input_ids, use_cache=use_cache)

    def loss(self, input_ids: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """The objective of one batch.

        Args:
            input_ids: (batch, seq_len).
            index: (batch,) row numbers in the calibration tensor; dense states are kept by them and
                computed once. None computes them anew.

        Returns:
            `{"loss": weighted sum, term: value, …}`, float32 scalars in nats per token.
        """
        teacher = self._teacher_states(input_ids, index) if self.objective.needs_teacher else None
        self._enter_rotated(pruned=True)
        student = self._states(input_ids)
        return self.objective(student, teacher, input_ids, self._head)

    def _head(self, states: Tensor) -> Tensor:
        family = family_of(self.base.config)
        return family.after_head(self.base.config, self.base.get_submodule(family.head)(states))

    def _states(self, input_ids: Tensor) -> Tensor:
        return self.base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _teacher_states(self, input_ids: Tensor, index: Tensor | None) -> Tensor:
        rows = [None] * len(input_ids) if index is None else index.tolist()
        states = []
        # Row by row, so that a row's states do not depend on the batch that it first came in.
        for row, ids in zip(rows, input_ids, strict=True):
            if row is None or row not in self._dense_states:
                with self.dense():
                    state = self._states(ids[None])[0]
                if row is not None:
                    self._dense_states[row] = state.cpu()
            else:
                state = self._dense_states[row].to(input_ids.device)
            states.append(state)
        return torch.stack(states)
