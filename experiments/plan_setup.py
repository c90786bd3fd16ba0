"""What a plan needs to know of a fit: its command line's settings, read and checked as the fit would."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Callback

from callbacks.ending import Ending
from callbacks.on_texts import OnTexts
from experiments.fit import FitCLI, check_limited, plain_refusals
from experiments.gpus import dtype_on
from experiments.planning.sizes import Setup
from experiments.run_directory import processes
from experiments.second_fit import check
from lightning_modules.rotation_module import RotationModule
from rotpruner.batches import CalibrationBatches
from rotpruner.errors import InputError
from rotpruner.kept_weights import check_takes_weights
from rotpruner.learning import SecondFit
from rotpruner.placements import turns

#: Tokens of WikiText-2's test split, about.
_WHOLE_TEXT = 300_000


class PlanCLI(FitCLI):
    """`fit`'s options, from which everything but the Trainer is built; no run directory is looked at."""

    built: Any

    def before_instantiate_classes(self) -> None:
        """Leave the run directory alone; of two fits, the first is built."""
        if self.config.second_fit is not None:
            check(self.recorded())

    def instantiate_classes(self) -> None:
        """Build what checks itself: the module, which loads no weights yet, its data, and the callbacks."""
        settings = self.config.clone()
        settings.trainer.logger = settings.trainer.profiler = None
        settings.trainer.strategy = "auto"
        with plain_refusals():
            self.built = self.parser.instantiate_classes(settings)


def read_setup(arguments: list[str], gpu: str, count: int | None) -> tuple[Setup, Namespace]:
    """The settings of a fit from its command line, and those of its `model` as they were given.

    Without a `count` of processes there are as many as `trainer.devices` and `trainer.num_nodes` say, where those are
    numbers.

    Raises:
        InputError: as the fit would, before it loads weights.
    """
    cli = PlanCLI(arguments)
    trainer, data = cli.config.trainer, cli.built.data
    module: RotationModule = cli.built.model
    count = count or processes(trainer) or trainer.num_nodes
    sharded = count > 1 and _shards(trainer.strategy)
    module.check(data.seq_len, data.statistics_sequences, sharded)
    second = cli.config.second_fit and SecondFit(**cli.config.second_fit.as_dict())
    if second is not None:
        check_takes_weights("second_fit", module.surrogate, module.objective, module.pattern, sharded)
    callbacks = cli.built.trainer.callbacks or ()
    callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks
    for callback in callbacks:
        if isinstance(callback, OnTexts):
            callback.check(module)
    if (trainer.accumulate_grad_batches or 1) > 1:
        raise InputError(
            f"plan counts one batch a step, and trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: "
            "leave it out; memory is the same, and time so many times longer"
        )
    if not module.objective.runs_model:
        raise InputError("plan counts runs of the model, and this objective needs none: there is nothing to plan")
    if module.surrogate.anneals:
        raise InputError(
            f"plan knows no formulas of surrogate {module.surrogate.name}; ask for sr_ste, which takes less"
        )
    setup = Setup(
        config=module.model_config,
        pruner=module.pruner,
        pattern=module.pattern,
        spaces=tuple(space for space in module.spaces if turns(space)),  # orders take bytes, and no time to speak of
        placement=module.placement,
        orthogonal_map=module.orthogonal_map,
        start=module.start if module.init_rotations is None else "identity",
        layer_sparsity=module.allotment.layer_sparsity,
        compensate=module.compensate,
        objective=module.objective,
        dtype=dtype_on(cli.config.model.base_dtype, gpu),
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        num_sequences=data.num_sequences,
        statistics_sequences=data.statistics_sequences,
        # One that is used whole is taken for WikiText-2's test split.
        test_tokens=max((each.max_tokens or _WHOLE_TEXT for each in callbacks if isinstance(each, Ending)), default=0),
        steps=_steps(trainer, data, count),
        gradient_checkpointing=module.gradient_checkpointing,
        offload=module.offload,
        second_steps=0 if second is None else second.steps,
        second_teacher=module.init_weights is not None,
        optimizer_states=_states(module.optimizer_of([torch.nn.Parameter(torch.eye(4))])),
        keeps_unmasked=module.surrogate.keeps_unmasked,
        ranks=count,
        sharded=sharded,
        device="cpu" if gpu == "cpu" else "gpu",
    )
    return setup, cli.config.model


def _steps(trainer: Any, data: Any, ranks: int) -> int:
    """Of the whole fit.

    Raises:
        InputError: neither steps nor epochs are limited, or the ranks' batches are more than the sequences.
    """
    batches = len(CalibrationBatches(torch.empty(data.num_sequences, 0), data.batch_size, world_size=ranks))
    check_limited(trainer)
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * batches)
    if not limits:
        raise InputError("the fit has no last step: set trainer.max_steps or trainer.max_epochs")
    return min(limits)


def _shards(strategy: Any) -> bool:
    """Whether a Trainer's strategy spreads the weights."""
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    return "ModelParallel" in name


def _states(optimizer: torch.optim.Optimizer) -> int:
    """How many tensors as large as a parameter an optimiser keeps for it, as a step shows."""
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return sum(
        torch.is_tensor(state) and state.shape == parameter.shape for state in optimizer.state[parameter].values()
    )
