"""The work of `rotpruner.prune`, once its arguments are checked: learn, prune, fit what is kept, a second fit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotpruner.allotment import Allotment
from rotpruner.kept_weights import MASKS_ONLY, take_kept_weights
from rotpruner.learning import SecondFit, learn, passes
from rotpruner.objectives import Objective
from rotpruner.oneshot import Learned, prune_and_compensate
from rotpruner.placements import Placement
from rotpruner.precision import cast_parameters
from rotpruner.progress import Progress
from rotpruner.pruners import Pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import LearnedRotations, Start
from rotpruner.surrogates import Surrogate


@dataclass(frozen=True)
class Rotating:
    """What rotates, and from where.

    Attributes:
        spaces: that rotate.
        placement: of the residual rotations.
        start: where learning begins.
        given: rotations to go on from instead.
    """

    spaces: Sequence[str]
    placement: Placement = "shared"
    start: Start = "identity"
    given: Rotations | None = None

    def module(self, model: PreTrainedModel) -> LearnedRotations:
        """Rotations that learn, on the model's device."""
        rotations = LearnedRotations(model.config, self.spaces, start=self.start, placement=self.placement)
        if self.given is not None:
            rotations.restart(self.given)
        return rotations.to(model.device)

    def described(self, steps: int) -> dict[str, Any]:
        """`basis` and `spaces` of an `Origin`, after so many steps of learning."""
        untouched = self.start == "identity" and self.given is None
        basis = "learned" if steps or self.given is not None else "none" if untouched else self.start
        return {"basis": basis, "spaces": () if basis == "none" else tuple(self.spaces)}


@dataclass(frozen=True)
class Pruning:
    """How a model is to be pruned. The model itself is copied whenever something would change it.

    Attributes:
        model: dense.
        rows: calibration sequences (count, seq_len).
        pruner, allotment: what goes.
        surrogate, objective: how rotations learn.
        dtype: of the frozen weights while they learn, and of the products that give statistics.
        gradient_checkpointing: recompute each block in the backward pass.
        seed: of the order of sequences.
        on_step: called with each step and its losses.
        progress: wraps what is iterated over.
    """

    model: PreTrainedModel
    rows: Tensor
    pruner: Pruner
    allotment: Allotment
    surrogate: Surrogate
    objective: Objective
    dtype: torch.dtype
    gradient_checkpointing: bool
    seed: int
    on_step: Callable[[int, dict[str, float]], None]
    progress: Progress

    def run(
        self,
        rotating: Rotating | None,
        steps: int,
        lr: float,
        compensated: int,
        second_fit: SecondFit | None,
        keep: Callable[[Learned], Rotations],
    ) -> tuple[Any, Learned]:
        """The pruned copy, and what was last learned, which `keep` gets as soon as it is there."""
        found = Learned()
        if rotating is not None:
            found = self.learn(rotating, steps, lr)
            given = keep(found)
        pruned = self.prune(found, compensated)
        if rotating is not None and second_fit is not None:
            del found  # its statistics are as large as those that are gathered next
            continued, rate = replace(rotating, given=given), second_fit.lr_factor * lr
            found = self.learn(continued, second_fit.steps, rate, kept=pruned, done=steps)
            keep(found)
            pruned = self.prune(found, kept=pruned, given=given)
        return pruned, found

    def learn(
        self,
        rotating: Rotating,
        steps: int,
        lr: float,
        kept: PreTrainedModel | None = None,
        done: int = 0,
    ) -> Learned:
        """Learn for so many steps; after an update from what its model has `kept`, in the rotations that are given.

        Steps are counted from those that are `done`.
        """
        rotated = RotatedModel(
            self._frozen(),
            rotating.module(self.model),
            self.pruner,
            self.allotment,
            self.surrogate,
            self.objective,
            gradient_checkpointing=self.gradient_checkpointing,
            seed=self.seed,
        )
        rotated.calibrate(self.rows.split(1), self.progress)
        if rotating.given is None:
            rotated.start_from_statistics(rotating.start, self.progress)
        elif kept is not None:
            rotated.take_over(self._frozen(), kept, rotating.given)

        def told(step: int, losses: dict[str, float]) -> None:
            self.on_step(done + step, losses)

        with torch.enable_grad():
            learn(rotated, passes(self.rows, self.seed), steps=steps, lr=lr, on_step=told, progress=self.progress)
        found = rotated.learned()
        del rotated
        gc.collect()  # now, before the model is copied again: the hooks of a rotated model refer to it
        return found

    def prune(
        self,
        found: Learned,
        compensated: int = 0,
        kept: PreTrainedModel | None = None,
        given: Rotations | None = None,
    ) -> Any:
        """A copy that is pruned as was learned, what it keeps fitted on so many sequences.

        That of a second fit has what the first one has `kept` in `given` rotations.
        """

        def copied() -> Any:
            return copy.deepcopy(self.model).eval()

        pruned, pruner = copied(), self.pruner
        if kept is not None and given is not None:
            take_kept_weights(pruned, kept, given)
            pruner = MASKS_ONLY
        running: dict[str, Any] = {"calibration_dtype": self.dtype, "progress": self.progress}
        batches = self.rows.split(1)
        prune_and_compensate(pruned, pruner, self.allotment, batches, found, compensated, copied, **running)
        return pruned

    def _frozen(self) -> Any:
        base = copy.deepcopy(self.model)
        cast_parameters(base, self.dtype)
        return base
