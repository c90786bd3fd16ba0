"""The Python door: prune a model in a learned rotated space, without Lightning."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotpruner.allotment import LayerSparsity, check_allotment, parse_exceptions
from rotpruner.artifacts import check_new_directory, save_model
from rotpruner.batches import CalibrationBatches, chosen_windows
from rotpruner.choices import Choices
from rotpruner.compensation import check_compensation
from rotpruner.compensation import compensate as compensate_weights
from rotpruner.embedded import embedded_name
from rotpruner.errors import InputError
from rotpruner.learned import Learned
from rotpruner.loading import check_pattern, check_seq_len
from rotpruner.model_card import Origin, pruner_name, write_card
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.patterns import Pattern, Scope, Slice, parse_pattern
from rotpruner.perplexity import windows
from rotpruner.placements import Placement, check_placement
from rotpruner.precision import cast_parameters, fast_dtype
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import Pruner, resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import LearnedRotations, Start
from rotpruner.surrogates import Surrogate


def learn(
    rotated: RotatedModel,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    steps: int,
    lr: float = 2e-3,
    refresh_every: int = 5,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    progress: Progress = unseen,
) -> None:
    """Learn the rotations, and a surrogate's logits, with Adam under a cosine schedule, re-pruning every few steps.

    Args:
        rotated: calibrated.
        batches: at least `steps` pairs of ids (batch, seq_len) and their row numbers or None.
        steps: optimiser steps.
        lr: of the rotations at the first step; it falls to zero at the last.
        refresh_every: steps between re-applications of the pruner.
        on_step: called with the step and its losses, in the units of `Objective`.
        progress: wraps the iteration over steps.

    Raises:
        InputError: `refresh_every` is no number of steps, there are fewer batches than steps, the model is not
            calibrated, learning diverges, or the rotations are parametrised by points of the manifold, which are for
            `CayleySGD`.
    """
    if refresh_every < 1:
        raise InputError(f"refresh_every {refresh_every} must be at least 1")
    if any(matrices.map_name == "manifold" for matrices in rotated.rotations.spaces.values()):
        raise InputError("orthogonal map manifold does not go with Adam, which leaves it; use cayley or exponential")
    optimizer = torch.optim.Adam(rotated.parameter_groups(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    remaining = iter(batches)
    for step in progress(range(steps), "learning"):
        batch = next(remaining, None)
        if batch is None:
            raise InputError(f"the batches ended after {step} of {steps} steps; give as many as there are steps")
        input_ids, index = batch
        if step % refresh_every == 0:
            rotated.refresh_masks()
        rotated.relaxation.advance(step, steps)
        losses = rotated.loss(input_ids, index)
        losses["loss"].backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        on_step(step, {name: value.item() for name, value in losses.items()})


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pattern: str | float = "2:4",
    scope: Scope = "row",
    pruner: str | Pruner = "wanda",
    rotate: Placement | Literal["none"] | Rotations = "shared",
    spaces: Sequence[str] = ("residual", "value_heads"),
    steps: int = 100,
    lr: float = 2e-3,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    surrogate: Surrogate = Surrogate(),  # noqa: B008 - frozen
    layer_sparsity: LayerSparsity = "uniform",
    exceptions: Mapping[str, str | float] = MappingProxyType({}),
    compensate: int = 0,
    num_sequences: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    rotations_directory: str | Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    progress: Progress = unseen,
) -> PreTrainedModel:
    """A pruned copy of a model, in a basis learned for it; `rotpruner.save` makes it an ordinary checkpoint.

    Args:
        model: causal language model of a known family; not changed.
        tokenizer: its own.
        texts: documents to calibrate and learn on.
        pattern, scope, pruner: what to prune and how.
        rotate: `shared` learns one rotation for the whole residual stream, so that all of it merges away; `per_layer`,
            `per_block` or a number of matrices leave products of theirs to be run with the model; `none` prunes the
            model as it is. Rotations of this model are where learning goes on; with no steps, they stay.
        spaces: which spaces rotate (of a slice, the residual stream alone), unless `rotate` says so; empty is `none`.
            With `mlp`, whose features N:M patterns can order, the others start from permutations too.
        steps, lr: of learning, one sequence a step.
        objective, surrogate: what is minimised, and how its gradient passes the masks.
        layer_sparsity: `uniform`, or `owl` to let blocks with many outliers keep more of an unstructured pattern.
        exceptions: patterns of the decoder linears whose names match, as in `{"*.down_proj": "4:8"}`, the last match
            counts; 0.0 leaves them dense.
        compensate: on how many of the sequences the kept weights are fitted, in closed form, see
            `rotpruner.compensation`; 0 leaves them as they are.
        num_sequences, seq_len: size of the calibration set, taken from the texts by `seed`.
        dtype: of the frozen weights while learning, and of the products that give a float32 model's statistics; weights
            are pruned in the model's own dtype. None is bfloat16 where the model's device has instructions for it, else
            float32.
        gradient_checkpointing: recompute each block in the backward pass; slower, much smaller.
        rotations_directory: where the learned rotations are written as well; must not exist yet.
        on_step: called with each step and its losses.
        progress: wraps what is iterated over, steps and blocks, and is told their name: for progress bars.

    Returns:
        A model of the same class, its head untied if the residual stream was rotated. Only `rotpruner.save` writes
        one with products of rotations so that it can be loaded again.

    Raises:
        InputError: an argument or the model cannot be used, or the texts are too short.
    """
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of documents, as in [text]")
    resolved, parsed = resolve_pruner(pruner), parse_pattern(pattern, scope)
    excepted = parse_exceptions(exceptions, scope)
    check_pattern(model, parsed, excepted)
    check_seq_len(model.config, seq_len)
    check_compensation(compensate, num_sequences, parsed)
    if num_sequences < 1 or steps < 0 or not 0 < lr < math.inf:
        raise InputError(
            f"num_sequences {num_sequences}, steps {steps} and lr {lr} must be at least 1, at least 0 and above 0"
        )
    check_allotment(parsed, layer_sparsity, excepted)
    rotating = _rotating(rotate, model, spaces, parsed)
    if rotating is not None and (steps or rotating.given is None):
        Choices(
            pattern=parsed,
            pruner=resolved,
            layer_sparsity=layer_sparsity,
            exceptions=excepted,
            objective=objective,
            surrogate=surrogate,
            spaces=rotating.spaces,
            placement=rotating.placement,
            orthogonal_map="cayley",
            start=rotating.start if rotating.given is None else None,
        ).check(model.config)
    if dtype == torch.float16:
        raise InputError("dtype float16 loses the gradients of a mean over tokens; give bfloat16 or float32")
    if rotations_directory is not None:
        if rotating is None:
            raise InputError(f"nothing rotates that could be written to '{rotations_directory}'; leave it out")
        check_new_directory(rotations_directory)
    rows = _calibration_rows(tokenizer, texts, num_sequences, seq_len, seed).to(model.device)
    sliced = isinstance(parsed, Slice)
    origin = Origin(
        base_model=embedded_name(model.config._name_or_path) or "unnamed",
        pattern=str(parsed),
        pruner=None if sliced else pruner_name(resolved),
        calibration=f"{len(texts)} texts given in Python",
        num_sequences=num_sequences,
        seq_len=seq_len,
        seed=seed,
        basis="pca" if sliced else "none",
        spaces=("residual",) if sliced else (),
        update="compensation" if compensate else None,
        layer_sparsity=layer_sparsity,
        exceptions={names: str(pattern) for names, pattern in excepted.items()},
    )
    found = Learned()
    if rotating is not None:
        base: Any = copy.deepcopy(model)
        cast_parameters(base, dtype or fast_dtype(model.device))
        rotated = RotatedModel(
            base,
            rotating.module(model),
            resolved,
            parsed,
            surrogate,
            objective,
            gradient_checkpointing=gradient_checkpointing,
            layer_sparsity=layer_sparsity,
            exceptions=excepted,
            seed=seed,
        )
        rotated.calibrate(rows.split(1), progress)
        rotated.start_from_statistics(rotating.start, progress)
        with torch.enable_grad():
            learn(rotated, _passes(rows, seed), steps=steps, lr=lr, on_step=on_step, progress=progress)
        found = rotated.learned()
        if rotations_directory is not None:
            Rotations.of(rotated.rotations(), model).save_pretrained(rotations_directory)
        learned = rotating.described(steps) | {"learned_masks": found.masks is not None}
        read = steps * seq_len if objective.runs_model else 0
        origin = replace(origin, steps=steps, training_tokens=read, **learned)
        del base, rotated
        gc.collect()  # now, before the model is copied again: the hooks of a rotated model refer to it
    pruned: Any = copy.deepcopy(model).eval()
    running: dict[str, Any] = {"calibration_dtype": dtype or fast_dtype(model.device), "progress": progress}
    sharing: dict[str, Any] = {"layer_sparsity": layer_sparsity, "exceptions": excepted}
    prune_model(pruned, resolved, parsed, rows.split(1), **sharing, **running, **found._asdict())
    if compensate:
        fitted = rows[:compensate].split(1)
        compensate_weights(pruned, copy.deepcopy(model).eval(), fitted, rotations=found.rotations, **running)
    pruned.origin = origin
    return pruned


@dataclass(frozen=True)
class _Rotating:
    """What rotates, and from where; `given` are rotations to go on from."""

    spaces: Sequence[str]
    placement: Placement = "shared"
    start: Start = "identity"
    given: Rotations | None = None

    def module(self, model: PreTrainedModel) -> LearnedRotations:
        rotations = LearnedRotations(model.config, self.spaces, start=self.start, placement=self.placement)
        if self.given is not None:
            rotations.restart(self.given)
        return rotations.to(model.device)

    def described(self, steps: int) -> dict[str, Any]:
        """`basis` and `spaces` of an `Origin`, after so many steps of learning."""
        untouched = self.start == "identity" and self.given is None
        basis = "learned" if steps or self.given is not None else "none" if untouched else self.start
        return {"basis": basis, "spaces": () if basis == "none" else tuple(self.spaces)}


def _rotating(
    rotate: Placement | Literal["none"] | Rotations,
    model: PreTrainedModel,
    spaces: Sequence[str],
    pattern: Pattern | Slice,
) -> _Rotating | None:
    """What `rotate` and `spaces` of `prune` ask for; None if nothing rotates."""
    if isinstance(rotate, Rotations):
        rotate.check_model(model)
        if isinstance(pattern, Slice) and set(rotate) != {"residual"}:
            raise InputError(f"pattern {pattern} removes residual directions only, but rotate has {sorted(rotate)}")
        return _Rotating(list(rotate), len(rotate["residual"]) if "residual" in rotate else "shared", given=rotate)
    if rotate == "none":
        return None
    if isinstance(spaces, str):
        raise InputError(f"spaces is one string; give a list, as in ['{spaces}']")
    sliced = isinstance(pattern, Slice)  # which has no other space
    check_placement(model.config, rotate, ["residual"] if sliced else spaces)
    if not spaces:
        return None
    if sliced:
        spaces = ["residual"]
    start: Start = "pca" if sliced else "permutation" if "mlp" in spaces else "identity"
    return _Rotating(spaces, rotate, start)


def _calibration_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    num_sequences: int,
    seq_len: int,
    seed: int,
) -> Tensor:
    """Token ids (num_sequences, seq_len), drawn from the windows of the texts as a fit draws them."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
    rows = windows(ids, seq_len)
    if len(rows) < num_sequences:
        raise InputError(
            f"the texts fill {len(rows)} windows of {seq_len} tokens, but num_sequences is {num_sequences}; "
            "give more text or ask for fewer"
        )
    return chosen_windows(rows, num_sequences, seed)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write an ordinary checkpoint that plain `transformers` loads, with a model card if `prune` made the model.

    Args:
        model: pruned or not.
        tokenizer: its own.
        directory: must not exist yet, or be empty.

    Raises:
        InputError: `directory` holds something already.
    """
    save_model(model, tokenizer, directory)
    origin = getattr(model, "origin", None)
    if isinstance(origin, Origin):
        write_card(directory, origin, model.config)


def _passes(rows: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One sequence at a time, in the order of a fit."""
    batches = CalibrationBatches(rows, 1, seed)
    while True:
        for batch in batches:
            yield batch["input_ids"], batch["index"]
