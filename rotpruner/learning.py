"""The loop that learns rotations without Lightning, the batches that it takes, and how learning continues later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rotpruner.batches import CalibrationBatches
from rotpruner.errors import InputError
from rotpruner.progress import Progress, unseen
from rotpruner.rotated_model import RotatedModel


@dataclass(frozen=True)
class SecondFit:
    """A second fit, which continues to train the rotations after the weight update, under its masks.

    Args:
        steps: of the second fit.
        lr_factor: of its optimiser's rate, from the first fit's.

    Raises:
        InputError: they are no steps and no factor.
    """

    steps: int
    lr_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"second_fit.steps {self.steps} must be at least 1; second_fit null leaves it at one fit")
        if not 0 < self.lr_factor < math.inf:
            raise InputError(f"second_fit.lr_factor {self.lr_factor} must be above 0")


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


def passes(rows: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One sequence at a time, in the order of a fit."""
    batches = CalibrationBatches(rows, 1, seed)
    while True:
        for batch in batches:
            yield batch["input_ids"], batch["index"]
