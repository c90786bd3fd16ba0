"""The end of a recovery: export the model, evaluate it, and the model that it was before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from callbacks.terminal import console, results_table, track
from datamodules.evaluation import perplexities, tokenize_texts
from datamodules.texts import check_text
from rotpruner.artifacts import save_model, write_json
from rotpruner.errors import InputError
from rotpruner.loading import load_model, load_tokenizer
from rotpruner.oneshot import parameter_count, sparsity_of
from rotpruner.provenance import commit
from rotpruner.shortcuts import online_cost


class RecoveryFinish(Callback):
    """After the last step, write `export/` and `results.json` into the run directory.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.recovery_finish.RecoveryFinish
          init_args: {texts: [wikipedia_test], max_tokens: 16384}
    ```

    Its rows: `dense`, the teacher; `pruned`, the model before; `recovered`. All are evaluated in float32, the last one
    as it was saved and loaded again.

    Args:
        texts: names or paths of test texts, none of which trained or calibrated anything.
        seq_len: tokens a window.
        max_tokens: the first tokens of each text that are used; None takes all.
    """

    def __init__(
        self,
        texts: list[str] = ["wikipedia_test"],  # noqa: B006 - read by the command line, never changed
        seq_len: int = 1024,
        max_tokens: int | None = 16384,
    ) -> None:
        if not texts:
            raise InputError("texts of RecoveryFinish is empty; name at least one test text")
        for text in texts:
            check_text(text)
        self.texts, self.seq_len, self.max_tokens = texts, seq_len, max_tokens
        #: What to record as the run's configuration; the command line fills it in.
        self.config: Mapping[str, Any] = {}
        self._seconds = 0.0
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far, so that a resumed run reports all of them."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self._seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the test texts before anything long begins."""
        self._started = time.perf_counter()
        tokenizer = load_tokenizer(pl_module.model_name)  # type: ignore[arg-type]
        self._ids = tokenize_texts(self.texts, tokenizer, self.seq_len, self.max_tokens)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only after training has run to its end."""
        if trainer.interrupted or trainer.received_sigterm:
            return
        module: Any = pl_module
        with torch.no_grad(), module.ranks.waiting():
            if trainer.is_global_zero:
                self._finish(Path(trainer.default_root_dir), module, round(self._elapsed(), 1))

    def _finish(self, run: Path, module: Any, seconds: float) -> None:
        save_model(module.recovery.pruned, load_tokenizer(module.model_name), run / "export", replace=True)
        sources = {"dense": module.teacher, "pruned": module.model_name, "recovered": str(run / "export")}
        rows = []
        for name, source in sources.items():
            model = load_model(source, torch.float32)
            row: dict[str, Any] = {"name": name, "pattern": None, "sparsity": sparsity_of(model)}
            row["seconds"] = seconds if name == "recovered" else 0.0
            row["ppl"] = perplexities(model, self._ids, self.seq_len, self.max_tokens, track)
            rows.append({**row, "parameters": parameter_count(model), "online_flops": online_cost(model).flops})
        results = {"rows": rows, "config": self.config, "commit": commit()}
        write_json(results, run / "results.json")
        console.print(results_table(results))
        console.print(f"export: {run / 'export'}")
