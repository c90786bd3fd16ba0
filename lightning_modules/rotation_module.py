"""The LightningModule: a frozen language model, its learnable rotations and the pruner they are learned for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from callbacks.terminal import track
from lightning_modules.devices import root_device
from lightning_modules.schedules import check_schedule, with_schedule
from lightning_modules.trainers import check_trainer, endless, logged
from rotpruner.allotment import Allotment, LayerSparsity
from rotpruner.basis import check_offload
from rotpruner.choices import Choices
from rotpruner.compensation import check_compensation
from rotpruner.distributed import Ranks
from rotpruner.errors import InputError
from rotpruner.kept_weights import check_kept_weights, check_takes_weights
from rotpruner.loading import check_pattern, check_seq_len, load_config, load_model, meta_model
from rotpruner.objectives import Objective
from rotpruner.orthogonal import MapName, orthogonality_error
from rotpruner.patterns import Scope
from rotpruner.placements import Placement, residual_sites
from rotpruner.precision import DtypeName, resolve_dtype
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import LearnedRotations, Start, check_continues, check_same_bases
from rotpruner.sharding import shard
from rotpruner.surrogates import Surrogate


class RotationModule(LightningModule):
    """Learns rotations of a frozen model by the loss of its pruned output.

    ```yaml
    model:
      model: smollm2-135m
      pruner: wanda
      pattern: "2:4"             # quoted, or YAML reads a number in base 60
      spaces: [residual, value_heads]
      surrogate: {name: constant}
      objective: {kl: 1.0}
      optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.002}}
    ```

    Args:
        model: embedded name, local directory or hub name.
        pruner: short name or import path of a `Pruner` subclass.
        pattern: `N:M`, a sparsity, or `slice:FRACTION` of the residual directions (no pruner takes part in that).
        compensate: how many calibration sequences the kept weights are fitted on, in closed form, once the rotations
            are learned, see `rotpruner.compensation`; 0 leaves them as they are.
        scope: where an unstructured sparsity is counted.
        layer_sparsity: `uniform`, or `owl` to let blocks with many outliers keep more of an unstructured pattern.
        exceptions: patterns of the decoder linears whose names match, as in `{"*.down_proj": "4:8"}`, the last match
            counts; 0.0 leaves them dense.
        cache_dense: leave what the dense model gives in the cache, where later runs of this model on this calibration,
            and this run when it goes on, find it: the calibration statistics, up to 4·I² bytes for each group's
            inputs I, and the final states of each sequence that is learned on, up to 4·d bytes a token.
        spaces: which spaces rotate.
        placement: of the residual rotations: `shared` merges away; `per_layer`, `per_block` (the paper's) or a number
            of matrices leave products of theirs in the model that is exported.
        orthogonal_map: how orthogonal matrices are parametrised; `manifold` goes with `CayleySGD` only.
        start: rotations at the first step; `pca` turns the residual stream to its principal directions, `permutation`
            puts the features of every space in an order of which N:M keeps more.
        init_rotations: saved rotations to start from instead, a directory or hub name.
        init_weights: the model that was pruned in them, updated or recovered perhaps: its kept weights take the place
            of the model's own, which stays the teacher, a second copy of the weights. Its masks stay, so
            surrogates and objectives that are for masks that change do not go with it.
        surrogate: how the gradient passes the mask; `gumbel` learns the mask too.
        objective: what is minimised.
        base_dtype: of the frozen weights and the activations; rotations are float32 (float64 with float64). `auto` is
            bfloat16 where the device has instructions for it, else float32.
        gradient_checkpointing: recompute each block in the backward pass; slower, much smaller.
        offload: keep the decoder weights in main memory and bring each to the device when its linear runs; slower,
            much smaller on the device, and with `gradient_checkpointing` only.
        optimizer: of the rotations.
        lr_scheduler: `cosine` falls to zero at the run's last step; any other scheduler steps once an
            optimiser step.
        seed: of a random start, and of the noise of `gumbel`.

    Raises:
        InputError: an argument that cannot work, before the weights are loaded.
    """

    rotated: RotatedModel

    def __init__(
        self,
        model: str = "smollm2-135m",
        pruner: str = "wanda",
        pattern: str | float = "2:4",
        compensate: int = 0,
        scope: Scope = "row",
        layer_sparsity: LayerSparsity = "uniform",
        exceptions: dict[str, str | float] = {},  # noqa: B006 - read by the command line, never changed
        cache_dense: bool = False,
        spaces: list[str] = ["residual", "value_heads"],  # noqa: B006 - read by the command line, never changed
        placement: Placement = "shared",
        orthogonal_map: MapName = "cayley",
        start: Start = "identity",
        init_rotations: str | None = None,
        init_weights: str | None = None,
        surrogate: Surrogate = Surrogate(),  # noqa: B008 - frozen
        objective: Objective = Objective(),  # noqa: B008 - frozen
        base_dtype: DtypeName = "auto",
        gradient_checkpointing: bool = False,
        offload: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        lr_scheduler: LRSchedulerCallable | Literal["constant", "cosine"] = "cosine",
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Checkpoints hold no base weights, so loading one must not ask for them.
        self.strict_loading = False
        self.pruner = resolve_pruner(pruner)
        self.allotment = Allotment.parse(pattern, layer_sparsity, exceptions, scope)
        self.pattern = self.allotment.pattern
        self.compensate = compensate
        self.cache_dense = cache_dense
        self.model_name, self.spaces = model, spaces
        config = load_config(model)
        check_pattern(meta_model(config), self.allotment)
        choices = Choices(
            allotment=self.allotment,
            pruner=self.pruner,
            objective=objective,
            surrogate=surrogate,
            spaces=spaces,
            placement=placement,
            orthogonal_map=orthogonal_map,
            start=start if init_rotations is None else None,
        )
        choices.check(config, optimizer([torch.nn.Parameter(torch.eye(2))]))
        check_compensation(compensate, None, self.pattern)
        check_offload(offload, gradient_checkpointing)
        self.placement: Placement = placement
        if init_rotations is not None:
            given = Rotations.from_pretrained(init_rotations)
            given.check_config(config)
            sites = residual_sites(config, placement) if "residual" in spaces else 0
            check_continues(given, spaces, sites)
            if init_weights is not None and sites:
                check_same_bases(config, len(given["residual"]), sites)
        if init_weights is not None:
            if init_rotations is None:
                raise InputError("init_weights are of a model that was pruned in a basis: give its init_rotations, too")
            check_takes_weights("init_weights", surrogate, objective, self.pattern)
            check_kept_weights(config, load_config(init_weights))
        self.model_config = config
        self.orthogonal_map, self.start, self.seed = orthogonal_map, start, seed
        self.init_rotations, self.init_weights = init_rotations, init_weights
        self.surrogate, self.objective = surrogate, objective
        self._base_dtype: DtypeName = base_dtype
        self.gradient_checkpointing, self.offload = gradient_checkpointing, offload
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._restored: dict[str, Any] | None = None

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the frozen weights and the activations, on the device that the module will run on."""
        return resolve_dtype(self._base_dtype, root_device(self))

    def setup(self, stage: str) -> None:
        """Check the data against the model, and the strategy, before its weights are loaded."""
        check_trainer(self)
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            raise InputError(
                f"tensor_parallel_size {self.device_mesh['tensor_parallel'].size()} splits single weights; "
                "set it to 1 and data_parallel_size to the number of processes"
            )
        check_schedule(self._lr_scheduler, self)
        if self.surrogate.anneals and endless(self):
            raise InputError(f"surrogate {self.surrogate.name} anneals over the run, which has no end; set max_steps")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check(data.seq_len, data.statistics_sequences, self.device_mesh is not None)

    def check(self, seq_len: int, statistics_sequences: int, sharded: bool) -> None:
        """Raise `InputError` if it cannot learn from such data, or with weights that are spread over processes."""
        check_seq_len(self.model_config, seq_len)
        check_compensation(self.compensate, statistics_sequences, self.pattern)
        check_offload(self.offload, self.gradient_checkpointing, sharded)
        if sharded and torch.__version__ < "2.7":
            raise InputError(
                f"ModelParallelStrategy needs torch 2.7 or newer, this is {torch.__version__}; update it, or use ddp"
            )
        if self.init_weights is not None:
            check_takes_weights("init_weights", self.surrogate, self.objective, self.pattern, sharded)
        if sharded and self.surrogate.learns_masks:
            raise InputError("surrogate gumbel learns masks, which ModelParallelStrategy does not share out; use ddp")
        if sharded and self.orthogonal_map == "manifold":
            raise InputError(
                "CayleySGD moves whole matrices, which ModelParallelStrategy shards; use ddp, or Adam and "
                "orthogonal_map cayley"
            )

    def optimizer_of(self, parameters: list[Any]) -> torch.optim.Optimizer:
        """The optimiser of some parameters or groups of them."""
        return self._optimizer(parameters)

    def configure_model(self) -> None:
        """Load the base model and put it under rotations, once; sharded if the strategy has a device mesh."""
        if hasattr(self, "rotated"):
            return
        # Lightning has new tensors made on the GPU, which need not hold all of these.
        with torch.device("cpu") if self.offload else nullcontext():
            base = load_model(self.model_name, self.base_dtype)
        rotations = LearnedRotations(
            base.config, self.spaces, self.orthogonal_map, self.start, self.seed, self.placement
        )
        if self.base_dtype == torch.float64:
            rotations = rotations.double()
        if self.init_rotations is not None:
            given = Rotations.from_pretrained(self.init_rotations)
            given.check_model(base)
            rotations.restart(given)
        self.rotated = RotatedModel(
            base,
            rotations,
            self.pruner,
            self.allotment,
            self.surrogate,
            self.objective,
            gradient_checkpointing=self.gradient_checkpointing,
            ranks=Ranks.world(),
            seed=self.seed,
            offload=self.offload,
        )
        # DDP would send all masks from the first rank to the others at every step; they are alike by construction.
        masks = [f"rotated.base.{linear.place.name}.mask" for linear in self.rotated.linears]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, masks)
        if self.device_mesh is not None:
            shard(self.rotated, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Only the rotations learn, and a surrogate's logits."""
        return with_schedule(self.optimizer_of(self.rotated.parameter_groups()), self._lr_scheduler, self.trainer)

    def on_fit_start(self) -> None:
        """Gather the calibration statistics, on all ranks together."""
        tokens = self.trainer.datamodule.statistics_tokens  # type: ignore[attr-defined]
        self.rotated.calibrate(tokens.to(self.device).split(1), self._progress(), self.cache_dense)
        if self.init_weights is not None:
            teacher = load_model(self.model_name, self.base_dtype)
            self.rotated.take_over(teacher, *self.kept_weights(), keep=self.cache_dense)

    def kept_weights(self) -> tuple[Any, Rotations]:
        """The pruned model whose kept weights the model takes over, and the rotations that it was pruned in."""
        assert self.init_weights is not None
        assert self.init_rotations is not None
        return load_model(self.init_weights), Rotations.from_pretrained(self.init_rotations)

    def _progress(self) -> Progress:
        silent = self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero
        return unseen if silent else track

    def on_train_start(self) -> None:
        """Choose the first masks, or those of a checkpoint: some strategies read it only after `on_fit_start`."""
        restored, self._restored = self._restored, None
        if restored is None:
            if self.init_rotations is None:
                self.rotated.start_from_statistics(self.start, self._progress())
            self.rotated.refresh_masks()
            return
        # Calibration may have drawn numbers, too.
        torch.set_rng_state(restored["mask_rng_state"])
        self.rotated.refresh_masks({space: Q.to(self.device) for space, Q in restored["mask_rotations"].items()})
        torch.set_rng_state(restored["rng_state"])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the pruned model, with the rotations and masks of the moment."""
        return self.rotated(input_ids).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The core's loss of `{"input_ids": (B, T), "index": (B,)}`."""
        if self.surrogate.anneals:
            relaxation = self.rotated.relaxation
            relaxation.advance(self.trainer.global_step, int(self.trainer.estimated_stepping_batches))
            self.log("surrogate/temperature", relaxation.temperature)
        return logged(self, self.rotated.loss(batch["input_ids"], batch["index"]))

    def on_train_end(self) -> None:
        """Free what only learning needs: the end of the run needs the memory."""
        self.leave()

    def leave(self) -> None:
        """Let go of what only learning needs; also of a run that resumes after its last step."""
        self.rotated.leave()

    @property
    def trainable_parameters(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def ranks(self) -> Ranks:
        """Of the processes that learn together."""
        return self.rotated.ranks

    def orthogonality_error(self) -> float:
        """‖QᵀQ − I‖∞ over all rotations."""
        return max(orthogonality_error(Q) for Q in self.rotated.rotations().values())

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Rotations only; the base model is found again by its name."""
        return {
            name: value
            for name, value in super().state_dict(*args, **kwargs).items()
            if not name.startswith("rotated.base.")
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what determines the masks, and the CPU's random state, for pruners of one's own that draw from it:
        that of now, and that in which the masks were chosen."""
        masks = self.rotated.masks
        assert masks.rotations is not None, "masks are chosen before the first step"
        # On the CPU, so that no rank reads them into another's device.
        checkpoint["mask_rotations"] = {space: Q.cpu() for space, Q in masks.rotations.items()}
        checkpoint["mask_rng_state"] = masks.rng_state
        checkpoint["rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Masks are chosen again once the statistics are there."""
        kept = {key: checkpoint[key] for key in ("mask_rotations", "rng_state")}
        # Those of earlier versions have one random state.
        self._restored = {"mask_rng_state": checkpoint.get("mask_rng_state", checkpoint["rng_state"]), **kept}
        torch.set_rng_state(checkpoint["rng_state"])  # after the last step, `on_train_start` does not come
