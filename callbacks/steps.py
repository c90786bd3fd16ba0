"""When a callback is due, and how what it finds is logged."""

from __future__ import annotations

from collections.abc import Mapping

from lightning import Trainer

from rotpruner.errors import InputError


class EverySteps:
    """Counts optimiser steps for a callback that is due once at every n-th of them.

    Hooks of batches whose gradients accumulate are called several times a step, and before the first one too.

    Args:
        every_n_steps: n.
        owner: the callback's name.

    Raises:
        InputError: n < 1.
    """

    def __init__(self, every_n_steps: int, owner: str) -> None:
        if every_n_steps < 1:
            raise InputError(f"every_n_steps {every_n_steps} of {owner} is not positive; give 1 or more")
        self.every_n_steps = every_n_steps
        self._last = 0

    def resume_at(self, step: int) -> None:
        """On resume: the callback has been called at this step."""
        self._last = step

    def advance(self, step: int) -> bool:
        """Record the step; returns whether it differs from the last one recorded."""
        advanced, self._last = step != self._last, step
        return advanced

    def is_due(self, step: int) -> bool:
        """Record the step; returns whether the callback is due at it."""
        return self.advance(step) and step > 0 and step % self.every_n_steps == 0


def log_at(trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Log values of a step now, and once: what `LightningModule.log` is given waits for the trainer's intervals."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step)
        logger.save()
