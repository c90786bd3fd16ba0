"""A frozen causal language model that runs rotated and pruned: the loss of a batch, as a function of the rotations.

The base model keeps one copy of its weights, in the original basis. Each decoder linear makes its
rotated, masked weight when it is called (and again in the backward pass under gradient checkpointing);
the embedding's output is rotated and the final norm's input rotated back, so that everything outside
the decoder blocks stays as it is. Where the stream changes its basis on the way, residual connections carry
that. Without rotations the same modules are the dense model, the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotpruner.allotment import Allotment, allot
from rotpruner.basis import Basis, RotatedLinear, change_bases, check_offload, grouped, turn_residual_ends
from rotpruner.calibration import linear_patterns, linears_to_watch
from rotpruner.concentration import concentration
from rotpruner.dense_cache import DenseCache
from rotpruner.distributed import Ranks
from rotpruner.errors import InputError
from rotpruner.fusion import fuse_block_norms
from rotpruner.kept_weights import kept_masks, take_kept_weights
from rotpruner.layout import block_linears, module_at
from rotpruner.loading import check_pattern
from rotpruner.mask_choice import Masks
from rotpruner.objectives import Objective
from rotpruner.oneshot import Learned
from rotpruner.patterns import NM, Pattern, Slice
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import Pruner
from rotpruner.relaxation import Relaxation
from rotpruner.rotations import LearnedRotations, RotationSet, Start, check_continues, check_same_bases, check_start
from rotpruner.slicing import project, residual_readers, sliced_width
from rotpruner.starts import permuted_start, principal_start
from rotpruner.statistics import Moment, gather_moments
from rotpruner.surrogates import Surrogate, check_surrogate
from rotpruner.teacher import DenseStates, Teacher, head_of, ready_to_learn


class RotatedModel(nn.Module):
    """A base model, learnable rotations of its spaces, and the pruner that they are learned for.

    Args:
        base: causal language model of a known family. It is taken over: frozen, its block norms fused,
            its dropout off, its decoder linears replaced by modules that hold the same weights.
        rotations: of its spaces.
        pruner, pattern: how masks are chosen; an `Allotment` has other patterns for some of the linears. A `Slice`
            needs no masks, the last residual directions run as zeros.
        surrogate: how the gradient passes them.
        objective: what is minimised.
        gradient_checkpointing: recompute each block, and its rotated weights, in the backward pass.
        offload: keep the decoder linears' weights in main memory, whence they come one linear at a time, forward and
            again in the recomputation; needs `gradient_checkpointing`.
        ranks: processes that hold a copy each, or shards of one. They share calibration and the choice of masks;
            losses and their gradients are each rank's own.
        seed: of the noise of a surrogate that has any.

    Raises:
        InputError: the pattern does not fit the model or the surrogate, or has no sparsity that blocks could share out;
            or `offload` is set without `gradient_checkpointing`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        rotations: LearnedRotations,
        pruner: Pruner,
        pattern: Pattern | Slice | Allotment,
        surrogate: Surrogate | None = None,
        objective: Objective | None = None,
        *,
        gradient_checkpointing: bool = False,
        ranks: Ranks | None = None,
        seed: int = 0,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.allotment = Allotment.of(pattern)
        pattern = self.allotment.pattern
        check_pattern(base, self.allotment)
        check_offload(offload, gradient_checkpointing)
        surrogate = surrogate or Surrogate()
        self.rotations = rotations
        self.pruner, self.pattern = pruner, pattern
        self.objective = objective or Objective()
        check_surrogate(surrogate, self.allotment, pruner, self.objective)
        self.ranks = ranks or Ranks()
        self.basis = Basis(base.config)
        self.moments: dict[str, Moment] = {}
        self._calibrated = False
        #: Of each linear by name; `calibrate` shares the sparsity out.
        self.patterns: dict[str, Pattern] = {}
        if not isinstance(pattern, Slice):
            self.patterns = allot(base.config, pattern, self.allotment.exceptions)
        self._dense_states = DenseStates(self._run_dense, self.ranks)
        self._teacher: Teacher | None = None  # the base itself

        if "residual" in rotations.spaces:
            fuse_block_norms(base)
            turn_residual_ends(base, self.basis)
        base.requires_grad_(False)
        weights = {place: module_at(base, place.name).weight for place in block_linears(base.config)}
        self.relaxation = Relaxation(base.config, surrogate, pruner, pattern, weights, seed)
        del weights  # each goes as soon as its pinned copy has taken its place
        self.linears = self._replace_linears(base, offload)
        self.masks = Masks(self.linears, self.relaxation, pruner, self.ranks)
        change_bases(base, self.basis, rotations.sites)
        self.base = ready_to_learn(base, gradient_checkpointing)

    def _replace_linears(self, base: PreTrainedModel, offload: bool) -> list[RotatedLinear]:
        replaced = []
        for place in block_linears(base.config):
            linear = RotatedLinear(module_at(base, place.name), place, self.basis, self.relaxation.masked, offload)
            base.set_submodule(place.name, linear)
            replaced.append(linear)
        return replaced

    # -- bases ---------------------------------------------------------------------------------

    def _enter_rotated(self, pruned: bool, softened: bool = False) -> None:
        # Not undone after the forward pass: recomputation in the backward pass needs the same basis.
        rotations = self.rotations()
        if pruned and isinstance(self.pattern, Slice):
            rotations = project(rotations, sliced_width(self.base.config, self.pattern))
        # Unbound, so that the gradients of many layers' matrices come back in one piece.
        self.basis.rotations = {space: Q.unbind() for space, Q in rotations.items()}
        self.basis.pruned = pruned
        self.relaxation.enter(self.basis.rotations, self.moments, self.patterns, softened)

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

    def calibrate(
        self,
        batches: Sequence[Tensor],
        progress: Progress = unseen,
        keep: bool = False,
    ) -> None:
        """Gather the statistics that the pruner needs, once; `owl` shares the sparsity out in a pass before.

        Ranks, which are all given the same batches, take turns with them and end with the same statistics.

        Args:
            batches: token ids, each (sequences, seq_len).
            progress: wraps the iteration over batches, for a progress bar.
            keep: leave them in the cache, and take them from there if they are in it; so too the dense model's final
                states of what is learned on (`rotpruner.dense_cache`).
        """
        with self.dense() as base:
            if isinstance(self.pattern, Slice):
                linears, widths = residual_readers(base)
            else:
                together = partial(gather_moments, ranks=self.ranks)
                self.patterns = linear_patterns(base, self.allotment, batches, together)
                spaces = set(self.rotations.spaces)
                linears, widths = linears_to_watch(base, block_linears(base.config), self.pruner.needs, spaces)

            def gather() -> dict[str, Moment]:
                return gather_moments(base, linears, widths, progress(batches, "calibration"), self.ranks)

            if keep:
                # Weights that are offloaded are no parameters of the base.
                weights = base.state_dict() | {f"{linear.place.name}.weight": linear.weight for linear in self.linears}
                cache = DenseCache(base, weights, self.ranks)
                self._dense_states = DenseStates(self._run_dense, self.ranks, lambda device: cache)
                self.moments = cache.moments(gather, widths, batches) if linears else {}
            else:
                self.moments = gather()
        self._calibrated = True

    def start_from_statistics(self, start: Start, progress: Progress = unseen) -> None:
        """After `calibrate`: put the rotations where a start that hangs on statistics has them.

        Args:
            start: any; `identity` and `random` hang on none and leave them where they are.
            progress: wraps the iteration over places that have an order, for a progress bar.

        Raises:
            InputError: there is no such start, or it does not go with the spaces, the pattern or the pruner.
        """
        if start in ("identity", "random"):
            return
        with torch.no_grad():
            rotations = {space: Q.clone() for space, Q in self.rotations().items()}
        check_start(start, list(rotations), self.pattern)
        if start == "pca":
            if not self.moments:
                raise InputError("start pca needs the statistics of a pruner that has any, such as wanda")
            self.rotations.restart(principal_start(self.base.config, self.moments, rotations, self.ranks))
        else:
            assert isinstance(self.pattern, NM), "checked above"
            self._check_calibrated()
            like = {name for name, pattern in self.patterns.items() if pattern == self.pattern}
            weights = {linear.place: linear.weight for linear in self.linears if linear.place.name in like}
            judged = weights, self.moments, self.pruner, self.pattern
            self.rotations.restart(permuted_start(self.base.config, *judged, rotations, self.ranks, progress))

    def take_over(
        self,
        teacher: PreTrainedModel,
        pruned: PreTrainedModel,
        rotations: Mapping[str, Tensor],
        keep: bool = False,
    ) -> None:
        """After `calibrate`: take over what a pruned model has kept (`rotpruner.kept_weights`), and its masks.

        A linear that is not to be pruned gets back what was removed. Masks stay from here on: weights were fitted
        under them, and the pruner would choose others by their new sizes.

        Args:
            teacher: the dense model, which the base is no longer from here on; taken over.
            pruned: that came of it.
            rotations: that it was pruned in.
            keep: leave the teacher's final states in the cache, as in `calibrate`.

        Raises:
            InputError: as `kept_masks`, `check_continues`, `check_same_bases` and `take_kept_weights`.
        """
        masks = kept_masks(pruned, self.patterns)
        check_continues(rotations, list(self.rotations.started()), self.rotations.sites)
        if "residual" in rotations:
            check_same_bases(self.base.config, len(rotations["residual"]), self.rotations.sites)
        take_kept_weights(self.base, pruned, rotations)
        self.masks.give(masks, self.base.device)
        self._teacher = Teacher(teacher)
        cached = partial(self._teacher.cache, ranks=self.ranks) if keep else None
        self._dense_states = DenseStates(self._teacher, self.ranks, cached)

    def give_up_weights(self) -> None:
        """Let go of the decoder weights and their masks, once all is learned: the model cannot run any more."""
        for linear in self.linears:
            linear.weight = linear.mask = None  # type: ignore[assignment]

    def leave(self) -> None:
        """Let go of what only learning needs: the last step's rotations and their graph, the dense model's states."""
        self.basis.rotations = {}
        self._dense_states.forget()
        if self._teacher is not None:
            self._teacher.leave()
        self.relaxation.leave()

    # -- learning --------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What an optimiser learns: the rotations and, if there are any, the logits of masks at their own rate."""
        groups: list[dict[str, Any]] = [{"params": list(self.rotations.parameters())}]
        if logits := list(self.relaxation.parameters()):
            groups.append({"params": logits, "lr": self.relaxation.surrogate.lr})
        return groups

    def learned(self) -> Learned:
        """What has been learned so far, for `prune_model`; without gradients.

        Raises:
            InputError: learning has diverged.
        """
        rotations = {space: Q.detach() for space, Q in self.rotations().items()}
        _check_finite(rotations)
        # Pruners that rebuild the outputs of what they have pruned get the statistics of pruned predecessors.
        moments = None if self.pruner.rebuilds else self.moments
        return Learned(rotations, moments, self.masks.settled(), self.patterns)

    @torch.no_grad()
    def refresh_masks(self, rotations: RotationSet | None = None) -> float:
        """Have masks chosen anew, see `Masks`, in the rotations of the moment or in given ones.

        Returns:
            The share of mask entries that flipped, 0 at the first call.

        Raises:
            InputError: the pruner needs statistics that `calibrate` has not gathered, or learning has diverged.
        """
        chosen_in = {
            space: Q.detach().clone() for space, Q in (self.rotations() if rotations is None else rotations).items()
        }
        _check_finite(chosen_in)
        self._check_calibrated()
        return self.masks.choose(chosen_in, self.moments, self.patterns, self.base.device)

    def _check_calibrated(self) -> None:
        shares_out = self.allotment.layer_sparsity != "uniform"
        reads = shares_out or (self.pruner.needs != "nothing" and not isinstance(self.pattern, Slice))
        if reads and not self._calibrated:
            reader = f"layer_sparsity {self.allotment.layer_sparsity}" if shares_out else type(self.pruner).__name__
            raise InputError(f"{reader} needs statistics, and none are gathered: call calibrate(batches) first")

    def _check_masks(self) -> None:
        if self.masks.rotations is None and not isinstance(self.pattern, Slice):
            raise InputError("no masks are chosen yet, so nothing would be pruned: call refresh_masks() first")

    # -- what is minimised -----------------------------------------------------------------------

    def forward(self, input_ids: Tensor, *, pruned: bool = True, use_cache: bool = False) -> Any:
        """The rotated model's output as `transformers` returns it, for ids (batch, seq_len).

        Raises:
            InputError: no masks are chosen yet.
        """
        if pruned:
            self._check_masks()
        self._enter_rotated(pruned)
        return self.base(input_ids=input_ids, use_cache=use_cache)

    def loss(self, input_ids: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """The objective of one batch.

        Args:
            input_ids: (batch, seq_len).
            index: (batch,) row numbers in the calibration tensor; dense states are kept by them and
                computed once. None computes them anew.

        Returns:
            `{"loss": weighted sum, term: value, …}`, scalars of at least float32, in the units of `Objective`.

        Raises:
            InputError: the objective runs the model, and no masks are chosen yet.
        """
        if self.objective.runs_model:
            self._check_masks()
        terms: dict[str, Tensor] = {}
        teacher = self._dense_states(input_ids, index) if self.objective.needs_teacher else None
        self._enter_rotated(pruned=True, softened=self.objective.runs_model)
        if self.objective.runs_model:
            terms |= self.objective(self._states(input_ids), teacher, input_ids, head_of(self.base))
        if self.objective.needs_importance:
            judged = self.basis.rotations, self.moments, self.pruner, self.patterns
            terms |= concentration(grouped(self.linears), *judged, self.objective, self.base.device)
        return self.objective.weighted(terms)

    def dense_loss(self, input_ids: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """What `loss` would be without rotations and masks: the floor that a step's time is measured against."""
        teacher = self._dense_states(input_ids, index) if self.objective.needs_teacher else None
        self.basis.rotations, self.basis.pruned = {}, False
        terms = self.objective(self._states(input_ids), teacher, input_ids, head_of(self.base))
        return self.objective.weighted(terms)

    def _states(self, input_ids: Tensor) -> Tensor:
        return self.base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _run_dense(self, input_ids: Tensor) -> Tensor:
        with self.dense():
            return self._states(input_ids)


def _check_finite(rotations: RotationSet) -> None:
    if not all(Q.isfinite().all() for Q in rotations.values()):
        raise InputError("the rotations are NaN or infinite: learning has diverged, lower the optimiser's rate")
