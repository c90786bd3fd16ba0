"""Watch the perplexity of the pruned model while it learns."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from callbacks.on_texts import OnTexts
from callbacks.steps import EverySteps, log_at
from rotpruner.perplexity import of_mean, summed_nll


class WindowPerplexity(Metric):
    """Perplexity over windows: cross-entropy in float32, sums in float64, reduced over ranks."""

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, input_ids: Tensor) -> None:
        """Add windows: logits (B, T, V) and their ids (B, T)."""
        nll, targets = summed_nll(logits, input_ids)
        self.total += nll
        self.count += targets

    def compute(self) -> Tensor:
        """exp of the mean negative log-likelihood, float64; raises InputError if that is NaN."""
        return torch.tensor(of_mean(float(self.total / self.count)), dtype=torch.float64)


class Perplexity(OnTexts):
    """Log `ppl/<text>` of the pruned model with the masks of the moment, every `every_n_steps` steps.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.perplexity.Perplexity
          init_args: {texts: [wikipedia_test], every_n_steps: 50, max_tokens: 8192}
    ```

    Args:
        texts: names or paths; for watching, so not those of the results if settings are chosen by them.
        every_n_steps: how often.
        seq_len: tokens per window.
        max_tokens: the first tokens of each text that are used.
    """

    def __init__(self, texts: list[str], every_n_steps: int = 50, seq_len: int = 1024, max_tokens: int = 8192) -> None:
        super().__init__(texts, seq_len, max_tokens)
        self._steps = EverySteps(every_n_steps, "Perplexity")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On resume, the checkpoint's own step has already been logged."""
        self._steps.resume_at(trainer.global_step)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ranks share the windows."""
        step, module = trainer.global_step, cast(Any, pl_module)
        if not self._steps.is_due(step):
            return
        for name, cut in self._windows.items():
            metric = WindowPerplexity().to(pl_module.device)
            for window, counts in module.ranks.share(cut.to(pl_module.device).split(1)):
                logits = module(window)
                if counts:
                    metric.update(logits, window)
            value = metric.compute().item()
            log_at(trainer, {f"ppl/{name}": value}, step)
            module.log(f"ppl/{name}", value, prog_bar=True, logger=False)
