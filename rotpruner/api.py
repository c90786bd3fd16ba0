"""The Python door: prune a model in a learned rotated space, without Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotpruner import compensation
from rotpruner.artifacts import check_new_directory, save_model
from rotpruner.embedded import embedded_name
from rotpruner.errors import InputError
from rotpruner.loading import check_pattern, check_seq_len
from rotpruner.model_card import Origin, pruner_name, write_card
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.patterns import Pattern, Scope, Slice, parse_pattern
from rotpruner.perplexity import windows
from rotpruner.precision import fast_dtype
from rotpruner.pruners import Pruner, resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import (
    LearnedRotations,
    Placement,
    Start,
    basis_changes,
    check_placement,
    check_start,
    merge_rotations,
    residual_sites,
)
from rotpruner.shortcuts import check_exportable
from rotpruner.surrogates import Surrogate


def learn(
    rotated: RotatedModel,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    steps: int,
    lr: float = 2e-3,
    refresh_every: int = 5,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Learn the rotations, and a surrogate's logits, with Adam under a cosine schedule, re-pruning every few steps.

    Args:
        rotated: calibrated.
        batches: at least `steps` pairs of ids (batch, seq_len) and their row numbers or None.
        steps: optimiser steps.
        lr: of the rotations at the first step; it falls to zero at the last.
        refresh_every: steps between re-applications of the pruner.
        on_step: called with the step and its losses in nats per token.
    """
    optimizer = torch.optim.Adam(rotated.parameter_groups(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (input_ids, index) in zip(range(steps), batches, strict=False):
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
    compensate: int = 0,
    num_sequences: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    rotations_directory: str | Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
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
        compensate: how many of the sequences the weights that stay are fitted on, in closed form, see
            `rotpruner.compensation`; 0 leaves them as they are.
        num_sequences, seq_len: size of the calibration set, taken from the texts by `seed`.
        gradient_checkpointing: recompute each block in the backward pass; slower, much smaller.
        dtype: of the frozen weights while learning; the result is pruned in the model's own dtype. None is bfloat16
            where the model's device has instructions for it, else float32.
        rotations_directory: where the learned rotations are written as well; must not exist yet.
        on_step: called with each step and its losses.

    Returns:
        A model of the same class, its head untied if the residual stream was rotated. Only `rotpruner.save` writes
        one with products of rotations so that it can be loaded again.

    Raises:
        InputError: an argument or the model cannot be used, or the texts are too short.
    """
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of documents, as in [text]")
    resolved, parsed = resolve_pruner(pruner), parse_pattern(pattern, scope)
    check_pattern(model, parsed)
    check_seq_len(model.config, seq_len)
    compensation.check_compensation(compensate, num_sequences, parsed)
    given = _check_rotate(rotate, model, spaces, parsed)
    if rotations_directory is not None:
        if rotate == "none" or not (spaces or given):
            raise InputError(f"nothing rotates that could be written to '{rotations_directory}'; leave it out")
        check_new_directory(rotations_directory)
    if num_sequences < 1 or steps < 0:
        raise InputError(f"num_sequences {num_sequences} and steps {steps} must be at least 1 and 0")
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
    rows = windows(ids, seq_len)
    generator = torch.Generator().manual_seed(seed)
    if len(rows) < num_sequences:
        raise InputError(
            f"the texts fill {len(rows)} windows of {seq_len} tokens, but num_sequences is {num_sequences}; "
            "give more text or ask for fewer"
        )
    rows = rows[_shuffled(len(rows), generator)[:num_sequences]].to(model.device)
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
        update="compensation" if compensate else None,
    )
    if rotate == "none" or not (spaces or given):
        pruned: Any = copy.deepcopy(model).eval()
        prune_model(pruned, resolved, parsed, rows.split(1))
        if compensate:
            compensation.compensate(pruned, copy.deepcopy(model).eval(), rows[:compensate].split(1))
        pruned.origin = origin
        return pruned

    start: Start = "identity"
    placement: Placement = "shared"
    if given is not None:
        spaces, placement = list(given), len(given["residual"]) if "residual" in given else "shared"
    elif not isinstance(rotate, Rotations) and rotate != "none":
        placement = rotate
    if given is None and isinstance(parsed, Slice):
        spaces, start = ["residual"], "pca"
    elif given is None and "mlp" in spaces:
        start = "permutation"
    if given is None:
        check_start(start, spaces, parsed)
    rotations = LearnedRotations(model.config, spaces, start=start, placement=placement)
    if given is not None:
        rotations.restart(given)
    rotations = rotations.to(model.device)
    base: Any = copy.deepcopy(model)
    base.to(dtype or fast_dtype(model.device))
    rotated = RotatedModel(base, rotations, resolved, parsed, Surrogate(), Objective(kl=1.0), gradient_checkpointing)
    rotated.calibrate(rows.split(1))
    rotated.start_from_statistics(start)
    with torch.enable_grad():
        learn(rotated, _passes(rows, generator), steps=steps, lr=lr, on_step=on_step)
    learned = {space: Q.detach() for space, Q in rotations().items()}
    if rotations_directory is not None:
        Rotations.of(learned, model).save_pretrained(rotations_directory)
    # Pruners that rebuild the outputs of what they have pruned get the statistics of pruned predecessors.
    moments = None if resolved.rebuilds else rotated.moments
    del base, rotated  # before the model is copied again
    pruned = copy.deepcopy(model).eval()
    prune_model(pruned, resolved, parsed, rows.split(1), learned, moments)
    if compensate:
        dense: Any = copy.deepcopy(model).eval()
        merge_rotations(dense, learned)
        compensation.compensate(pruned, dense, rows[:compensate].split(1))
    basis = "learned" if steps or given is not None else origin.basis
    pruned.origin = replace(origin, basis=basis, spaces=tuple(learned), steps=steps, training_tokens=steps * seq_len)
    return pruned


def _check_rotate(
    rotate: Placement | Literal["none"] | Rotations,
    model: PreTrainedModel,
    spaces: Sequence[str],
    pattern: Pattern | Slice,
) -> Rotations | None:
    """The rotations that were given, if any."""
    if isinstance(rotate, Rotations):
        rotate.check_model(model)
        if isinstance(pattern, Slice) and set(rotate) != {"residual"}:
            raise InputError(f"pattern {pattern} removes residual directions only, but rotate has {sorted(rotate)}")
        return rotate
    if rotate == "none":
        return None
    if not isinstance(pattern, Slice):  # which has no other space
        check_placement(rotate, spaces)
    if basis_changes(model.config, residual_sites(model.config, rotate)):
        check_exportable(model.config)
    return None


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


def _passes(rows: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for row in _shuffled(len(rows), generator).split(1):
            yield rows[row], row


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device)  # whatever the default device is
