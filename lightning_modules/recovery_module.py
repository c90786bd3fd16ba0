"""The LightningModule of sparse recovery: a pruned model's surviving weights learn from the dense model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.devices import root_device
from lightning_modules.schedules import check_schedule, with_schedule
from lightning_modules.trainers import check_trainer, logged
from rotpruner.distributed import Ranks
from rotpruner.errors import InputError
from rotpruner.loading import check_seq_len, load_config, load_model
from rotpruner.objectives import Objective
from rotpruner.precision import resolve_dtype
from rotpruner.recovery import SparseRecovery, check_keeps_zeros, check_recovery


class RecoveryModule(LightningModule):
    """Trains the weights that pruning has left, under its mask.

    ```yaml
    model:
      model: runs/smollm2-135m/export
      teacher: smollm2-135m
      objective: {kl: 1.0}
      optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.00005}}
    ```

    Args:
        model: the pruned model, a directory or hub name.
        teacher: the dense model that it came from.
        objective: what is minimised, of `kl` and `cross_entropy`.
        compute_dtype: of the pruned model's products, and of the teacher; `auto` is bfloat16 where the device has
            instructions for it, else float32.
        gradient_checkpointing: recompute each block in the backward pass; slower, much smaller.
        optimizer: of the weights, one that works on each alone; others move those that pruning has removed.
        cache_dense: leave the teacher's final states in the cache, where later recoveries on the same text find them.
        lr_scheduler: `cosine` falls to zero at the run's last step; any other scheduler steps once an optimiser step.
        warmup_steps: over which the rate comes up to the schedule's. Adam's very first step moves every weight by the
            whole rate, whatever its gradient.
        seed: of the run.

    Raises:
        InputError: an argument that cannot work, before the weights are loaded.
    """

    recovery: SparseRecovery

    def __init__(
        self,
        model: str,
        teacher: str,
        objective: Objective = Objective(),  # noqa: B008 - frozen
        compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=5e-5),
        lr_scheduler: LRSchedulerCallable | Literal["constant", "cosine"] = "cosine",
        warmup_steps: int = 0,
        cache_dense: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise InputError(f"warmup_steps {warmup_steps} must be at least 0")
        self.warmup_steps = warmup_steps
        self.model_name, self.teacher, self.objective, self.seed = model, teacher, objective, seed
        self._config = load_config(model)
        check_recovery(self._config, load_config(teacher), objective)
        self._compute_dtype: Literal["auto", "bfloat16", "float32"] = compute_dtype
        self.gradient_checkpointing, self.cache_dense = gradient_checkpointing, cache_dense
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        check_keeps_zeros(optimizer)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the products, on the device that the module will run on."""
        return resolve_dtype(self._compute_dtype, root_device(self))

    def setup(self, stage: str) -> None:
        """Check the data against the model, and the strategy, before its weights are loaded."""
        check_trainer(self)
        check_schedule(self._lr_scheduler, self, self.warmup_steps)
        if self.device_mesh is not None:
            raise InputError("recovery trains whole copies of the model, which ModelParallelStrategy shards: use ddp")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.statistics_sequences != data.num_sequences:
            raise InputError(
                f"data.statistics_sequences {data.statistics_sequences} is for pruners, and recovery runs none: "
                "leave it out"
            )
        check_seq_len(self._config, data.seq_len)

    def configure_model(self) -> None:
        """Load both models, once."""
        if not hasattr(self, "recovery"):
            self.recovery = SparseRecovery(
                load_model(self.model_name, torch.float32),
                load_model(self.teacher, self.compute_dtype),
                self.objective,
                self.compute_dtype,
                self.gradient_checkpointing,
                Ranks.world(),
                self.cache_dense,
            )

    def leave(self) -> None:
        """Let go of what only learning needs."""
        self.recovery.leave()

    @property
    def trainable_parameters(self) -> int:
        """How many numbers learn: the zeros between them do not."""
        weights = (parameter for parameter in self.parameters() if parameter.requires_grad)
        return sum(int((weight != 0).sum()) for weight in weights)

    @property
    def ranks(self) -> Ranks:
        """Of the processes that learn together."""
        return self.recovery.ranks

    def configure_optimizers(self) -> Any:
        """Only surviving weights learn."""
        parameters = [parameter for parameter in self.recovery.parameters() if parameter.requires_grad]
        return with_schedule(self._optimizer(parameters), self._lr_scheduler, self.trainer, self.warmup_steps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the pruned model as it is now."""
        return self.recovery(input_ids)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The core's loss of `{"input_ids": (B, T), "index": (B,)}`."""
        return logged(self, self.recovery.loss(batch["input_ids"], batch["index"]))
