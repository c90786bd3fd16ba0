"""Sparse recovery: the weights that pruning has left are trained, those that it removed stay zero.

The pruned model learns the next-token distributions of the dense one (Hinton et al., 2015, arXiv:1503.02531). It needs
no rotations: with those of a learned space merged away it starts from there, without any it is the control.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotpruner.distributed import Ranks
from rotpruner.errors import InputError
from rotpruner.layout import linear_modules
from rotpruner.objectives import Objective
from rotpruner.precision import autocast, fast_dtype
from rotpruner.teacher import DenseStates, Teacher, head_of, ready_to_learn


class SparseRecovery(nn.Module):
    """A pruned model whose surviving decoder weights learn, and the dense one that teaches them.

    Args:
        pruned: with the zeros that pruning left in its decoder linears; taken over, only those weights learn.
        teacher: dense, of the same type, depth and vocabulary; frozen, and kept out of the module's parameters.
        objective: its KL and cross-entropy; the two models' states may be in different bases.
        compute_dtype: of the pruned model's products; its weights keep their own dtype. None is the device's fast one.
        gradient_checkpointing: recompute each block in the backward pass.
        ranks: that train copies together.
        cache_dense: leave the teacher's final states in the cache, and take them from there
            (`rotpruner.dense_cache`).

    Raises:
        InputError: nothing was pruned, the teacher is another model, or the objective compares states.
    """

    def __init__(
        self,
        pruned: PreTrainedModel,
        teacher: PreTrainedModel,
        objective: Objective | None = None,
        compute_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        ranks: Ranks | None = None,
        cache_dense: bool = False,
    ) -> None:
        super().__init__()
        self.objective = objective or Objective()
        check_recovery(pruned.config, teacher.config, self.objective)
        self.compute_dtype = compute_dtype or fast_dtype(pruned.device)
        self.ranks = ranks or Ranks()
        self._teacher = Teacher(teacher)
        cached = partial(self._teacher.cache, ranks=self.ranks) if cache_dense else None
        self._dense_states = DenseStates(self._teacher, self.ranks, cached)
        self.pruned = ready_to_learn(pruned.requires_grad_(False), gradient_checkpointing)
        linears = linear_modules(pruned)
        if not any((linear.weight == 0).any() for linear in linears.values()):
            raise InputError("no decoder weight of the pruned model is zero, so no mask could be kept; prune it first")
        for linear in linears.values():
            _learn_survivors(linear.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, seq_len, V) of the pruned model for ids (batch, seq_len)."""
        with autocast(input_ids.device, self.compute_dtype):
            return self.pruned(input_ids=input_ids, use_cache=False).logits

    def loss(self, input_ids: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """The objective of a batch of ids (batch, seq_len), rows `index` (batch,) of the calibration tensor."""
        dense = dense_head = None
        if self.objective.needs_teacher:
            # There even if all states are in the cache.
            dense_head = head_of(self._teacher.on(input_ids.device))
            dense = self._dense_states(input_ids, index)
        with autocast(input_ids.device, self.compute_dtype):
            states = self.pruned.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            terms = self.objective(states, dense, input_ids, head_of(self.pruned), dense_head)
        return self.objective.weighted(terms)

    def leave(self) -> None:
        """Let go of what only learning needs: the teacher, its states and the last step's gradients."""
        self._dense_states.forget()
        self._teacher.leave()
        self.zero_grad()


def check_recovery(pruned: Any, teacher: Any, objective: Objective) -> None:
    """Raise `InputError` if the model of one config cannot learn this from that of the other."""
    if pruned.vocab_size != teacher.vocab_size:
        raise InputError(
            f"the pruned model has {pruned.vocab_size} tokens, its teacher {teacher.vocab_size}; "
            "give the model that was pruned as the teacher"
        )
    forms = [(config.model_type.removeprefix("rotated_"), config.num_hidden_layers) for config in (pruned, teacher)]
    if forms[0] != forms[1]:
        raise InputError(
            "the pruned model is a {} of {} blocks, its teacher a {} of {}; ".format(*forms[0], *forms[1])
            + "give the model that was pruned as the teacher"
        )
    if objective.cosine or objective.needs_importance:
        raise InputError("recovery knows the objectives kl and cross_entropy only; set the others to 0")


def check_keeps_zeros(optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    """Raise `InputError` if an optimiser moves weights that are zero and have no gradient, as two steps on a few show.

    Those that work on each number alone leave them alone; those that work on whole matrices, such as Muon, do not.
    """
    weight = nn.Parameter(torch.arange(1.0, 17.0).view(4, 4).tril())
    optimizer = optimizer_of([weight])
    try:
        for _ in range(2):
            weight.grad = torch.arange(16.0, 0.0, -1.0).view(4, 4).sin().tril()
            optimizer.step(lambda: torch.zeros(()))  # type: ignore[arg-type, return-value]
    except (RuntimeError, AssertionError):  # it runs on GPUs only, and cannot be tried here
        return
    if weight.detach().triu(1).any():
        raise InputError(
            f"{type(optimizer).__name__} moves the weights that pruning has removed; choose an optimizer that works on "
            "each weight alone, such as Adam"
        )


def _learn_survivors(weight: Tensor) -> None:
    """Let a weight learn where it is not zero; optimisers that `check_keeps_zeros` admits leave the rest alone."""
    weight.requires_grad_(True).register_hook(lambda gradient: gradient.masked_fill(weight.detach() == 0, 0))
