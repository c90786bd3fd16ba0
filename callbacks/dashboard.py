"""What a wandb dashboard shows of a fit besides the losses that the module logs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.ending import Ending
from callbacks.steps import EverySteps
from rotpruner.artifacts import read_json
from rotpruner.diagnostics import LAYERS, block_means, masked_share
from rotpruner.errors import InputError
from rotpruner.orthogonal import is_order, permutation_matrix
from rotpruner.perplexity import gap

_PIXELS = 256  # of a rotation's picture, at most, in each direction
_SECRET = ("api_key", "apikey", "password", "passwd", "secret", "token", "credential")
_HARMLESS = "max_tokens"


class Dashboard(Callback):
    """Log a run's settings, masks, rotations, speed and results to a `WandbLogger`. Stands after `Finish` in the list.

    ```yaml
    trainer:
      logger: {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: rotpruner, offline: true}}
      callbacks:
        - class_path: callbacks.dashboard.Dashboard
          init_args: {every_n_steps: 25}
    ```

    `-c experiments/configs/logging/wandb.yaml` adds just that to any config. On top of what the module and the other
    callbacks log (`train/…`, `masks/flipped`, `ppl/…`), a run shows:

    * its settings, without environment variables and without values whose names sound secret;
    * `throughput/tokens_per_second`, over all ranks, as often as Lightning logs;
    * every `every_n_steps` steps: `rotations/orthogonality_error`, ‖QᵀQ − I‖∞; `kept_mass/block_…`, the share of
      saliency under the mask, and `flips/block_…`, the share of mask entries that the last refresh flipped; the
      table `sparsity` of all linears; the picture `rotations/SPACE` of the first matrix of each space, |Q|;
    * at the end, if `Finish` came before: `results/ROW/TEXT` perplexities and the tables `results` and `layers`.

    A recovery, which has neither rotations nor masks of its own, shows its settings, speed and results.

    Args:
        every_n_steps: how often masks and rotations are looked at; it costs as much as a refresh of the masks.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        self._steps = EverySteps(every_n_steps, "Dashboard")
        #: What to record as the run's configuration; the command line fills it in.
        self.config: Mapping[str, Any] = {}
        self._clock = 0.0
        self._logger: WandbLogger | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the logger before anything long begins."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers:
            raise InputError(
                "Dashboard has no wandb run to log to; set trainer.logger to a WandbLogger, "
                "as -c experiments/configs/logging/wandb.yaml does"
            )
        self._logger = loggers[0]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(later, Ending) for later in callbacks[callbacks.index(self) :]):
            raise InputError(
                "Dashboard stands before Finish in trainer.callbacks, whose results it would not see: list it after "
                "that, for instance by -c experiments/configs/logging/wandb.yaml as the last config"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the settings."""
        if trainer.is_global_zero:
            self._wandb.log_hyperparams(without_secrets(self.config))

    @property
    def _wandb(self) -> WandbLogger:
        assert self._logger is not None
        return self._logger

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; on resume, the checkpoint's own step has already been logged."""
        self._steps.resume_at(trainer.global_step)
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Speed of every batch; masks and rotations now and then."""
        now = time.perf_counter()
        tokens = batch["input_ids"].numel() * trainer.world_size
        pl_module.log("throughput/tokens_per_second", tokens / (now - self._clock))
        if self._steps.is_due(trainer.global_step) and hasattr(pl_module, "rotated"):
            self._look(pl_module, trainer.global_step)
        self._clock = time.perf_counter()  # looking is not learning

    @torch.no_grad()
    def _look(self, module: Any, step: int) -> None:
        rotated = module.rotated
        # On all ranks, which may hold a shard each.
        rows, rotations = masked_share(rotated), rotated.rotations()
        metrics = {"rotations/orthogonality_error": module.orthogonality_error()}
        if not module.trainer.is_global_zero:
            return
        for layer, mass in block_means(rows, lambda row: row["kept_mass"]).items():
            metrics[f"kept_mass/block_{layer:02}"] = mass
        for layer, share in enumerate(rotated.masks.block_flips):
            metrics[f"flips/block_{layer:02}"] = share
        self._wandb.log_metrics(metrics, step)
        columns = ["name", "layer", "weights", "sparsity", "kept_mass"]
        if rows:
            self._wandb.log_table("sparsity", columns, [[row[column] for column in columns] for row in rows], step=step)
        for space, Q in rotations.items():
            first = permutation_matrix(Q[0].cpu()) if is_order(Q) else Q[0, 0]
            self._wandb.log_image(f"rotations/{space}", [picture(first)], step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What `Finish` has written, if it came before."""
        run = Path(trainer.default_root_dir)
        if not (trainer.is_global_zero and (run / "results.json").is_file()):
            return
        rows = read_json(run / "results.json")["rows"]
        dense = rows[0]["ppl"]
        step = trainer.global_step
        self._wandb.log_metrics(
            {f"results/{row['name']}/{text}": row["ppl"][text] for row in rows for text in dense}, step
        )
        columns = ["row", "pattern", "sparsity", "parameters", "seconds", "text", "ppl", "gap"]
        table = [
            [*(row[key] for key in ("name", "pattern", "sparsity", "parameters", "seconds")), text, ppl,
             gap(ppl, dense[text])]
            for row in rows
            for text, ppl in row["ppl"].items()
        ]  # fmt: skip
        self._wandb.log_table("results", columns, table, step=step)
        if not (run / LAYERS).is_file():
            return
        linears = read_json(run / LAYERS)["linears"]
        columns = ["name", "layer", "sparsity", "error"]
        self._wandb.log_table("layers", columns, [[row[column] for column in columns] for row in linears], step=step)


def without_secrets(config: Any) -> Any:
    """A configuration without the values whose names sound secret."""

    def secret(name: str) -> bool:
        return name != _HARMLESS and any(word in name.lower() for word in _SECRET)

    if isinstance(config, Mapping):
        return {key: "(not logged)" if secret(str(key)) else without_secrets(value) for key, value in config.items()}
    return [without_secrets(item) for item in config] if isinstance(config, (list, tuple)) else config


def picture(Q: torch.Tensor) -> Any:
    """|Q| (n, n) as grey levels, (≤ 256, ≤ 256) uint8: black up to 1e-4, white at 1, logarithmic in between.

    The largest entry of a cell stands for it.
    """
    cells = min(len(Q), _PIXELS)
    pooled = F.adaptive_max_pool2d(Q.detach().abs().float().cpu()[None], cells)[0]
    return ((1 + pooled.clamp(1e-4, 1).log10() / 4) * 255).round().to(torch.uint8).numpy()
