"""Shared by all end-of-training callbacks: seconds that survive interruptions, test texts, one row per model."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from transformers import PreTrainedModel

from callbacks.on_texts import OnTexts
from callbacks.terminal import ResultsTable, console, track
from datamodules.evaluation import perplexities
from rotpruner.artifacts import write_json
from rotpruner.errors import InputError
from rotpruner.measures import parameter_count, sparsity_of
from rotpruner.model_card import evaluation_of
from rotpruner.provenance import commit, device_name
from rotpruner.shortcuts import online_cost

Row = dict[str, Any]


def training_device(trainer: Trainer) -> torch.device:
    """Where training ran; most strategies have put the module itself back into main memory by its end."""
    return trainer.strategy.root_device


def global_batch(trainer: Trainer) -> int:
    """Sequences that all processes together take at a time."""
    return trainer.datamodule.batch_size * trainer.world_size  # type: ignore[attr-defined]


class Ending(OnTexts, ABC):
    """After the last step, and only then, something is exported and evaluated.

    Args:
        texts: names or paths of test texts, none of which trained or calibrated anything.
        seq_len: tokens per window.
        max_tokens: the first tokens of each text that are used; None takes all.
    """

    def __init__(self, texts: list[str], seq_len: int, max_tokens: int | None) -> None:
        if not texts:
            raise InputError(f"texts of {type(self).__name__} is empty; name at least one test text")
        super().__init__(texts, seq_len, max_tokens)
        #: What to record as the run's configuration; the command line fills it in.
        self.config: Mapping[str, Any] = {}
        self._training_seconds = 0.0
        self._started = 0.0
        self._device = torch.device("cpu")
        self._commit: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far, so that a resumed run reports all of them, and the commit that it began at."""
        return {"training_seconds": self._elapsed(), "commit": self._commit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds counted so far."""
        self._training_seconds = state_dict["training_seconds"]
        self._commit = state_dict.get("commit", self._commit)  # before or after `on_fit_start`, as the strategy has it

    def _elapsed(self) -> float:
        return self._training_seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the texts, and begin to count seconds."""
        super().on_fit_start(trainer, pl_module)
        self._started = time.perf_counter()
        self._commit = self._commit or commit()  # the checkout may move on while this runs

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only after training has run to its end; an interrupted one is resumed, not finished.

        The first rank works on a model of its own, whose blocks are run where training was, one at a time or with the
        whole model there (`rotpruner.memory.home_of`); the others wait for it.
        """
        if trainer.interrupted or trainer.received_sigterm:
            return
        module: Any = pl_module
        module.leave()
        self._device = training_device(trainer)
        with torch.no_grad():
            self.gather(module)
        with torch.no_grad(), module.ranks.waiting():
            if trainer.is_global_zero:
                self.finish(Path(trainer.default_root_dir), trainer, module, self._elapsed())

    def gather(self, module: Any) -> None:
        """On all ranks: bring together what is spread over them."""

    @abstractmethod
    def finish(self, run: Path, trainer: Trainer, module: Any, seconds: float) -> None:
        """On the first rank: export and evaluate into the run directory; `seconds` were spent on training."""

    def evaluated(
        self, name: str, pattern: Any, model: PreTrainedModel, seconds: float, reference: bool = False
    ) -> Row:
        """A row of results: perplexities of a float32 model on the test texts, and its sizes.

        A `reference` is what many runs are compared with; its perplexities are kept and measured only once. Those of a
        model whose logits are NaN are infinite.
        """
        try:
            ppl = perplexities(model, self._windows, track, keep=reference, device=self._device)
        except InputError as error:  # a row that is worth nothing, a control perhaps, must not cost the others
            console.print(f"{name}: {error}")
            ppl = dict.fromkeys(self._windows, math.inf)
        return {
            "name": name,
            "pattern": None if pattern is None else str(pattern),
            "sparsity": sparsity_of(model),
            "seconds": round(seconds, 1),
            "ppl": ppl,
            "parameters": parameter_count(model),
            "online_flops": online_cost(model).flops,
        }

    @property
    def evaluation(self) -> str:
        """How models are evaluated, in words."""
        return evaluation_of(self.seq_len, self.max_tokens)

    def described(self, trainer: Trainer) -> Row:
        """What model cards say of every training and its evaluation, by `Origin`'s names."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        read = trainer.lightning_module.objective.runs_model  # type: ignore[union-attr]
        return {
            "calibration": data.calibration,
            "seq_len": data.seq_len,
            "steps": trainer.global_step,
            "training_tokens": data.sequences_learned * data.seq_len if read else 0,
            "evaluation": self.evaluation,
            "config": self.config,
        }

    def record(self, run: Path, rows: list[Row], trainer: Trainer) -> None:
        """Write `results.json`, which makes the run a finished one, and show it."""
        described = self.described(trainer)
        results = {
            "rows": rows,
            "budget": {
                "steps": described["steps"],
                "training_tokens": described["training_tokens"],
                "trainable_parameters": trainer.lightning_module.trainable_parameters,
                "global_batch": global_batch(trainer),
            },
            "evaluation": described["evaluation"],
            "config": self.config,
            "commit": self._commit,
            "device": device_name(self._device),
        }
        write_json(results, run / "results.json")
        console.print(ResultsTable(results))
        console.print(f"export: {run / 'export'}")
