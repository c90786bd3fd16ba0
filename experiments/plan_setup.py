"""What a plan needs to know of a fit: its command line's settings, read and checked as the fit would."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from jsonargparse import Namespace

from callbacks.finish import Finish
from datamodules.calibration import CalibrationDataModule
from experiments.fit import FitCLI, check_limited, is_one_of
from experiments.gpus import dtype_on
from experiments.planning.sizes import Setup
from rotpruner.basis import check_offload
from rotpruner.batches import CalibrationBatches
from rotpruner.choices import Choices
from rotpruner.compensation import check_compensation
from rotpruner.errors import InputError
from rotpruner.loading import check_pattern, check_seq_len, load_config, meta_model
from rotpruner.objectives import Objective
from rotpruner.patterns import parse_pattern
from rotpruner.placements import turns
from rotpruner.pruners import resolve_pruner
from rotpruner.surrogates import Surrogate


class SettingsCLI(FitCLI):
    """`fit`'s options, read and checked for their form; nothing is built and no run directory is looked at."""

    def before_instantiate_classes(self) -> None:
        """Leave the run directory alone."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def read_setup(arguments: list[str], gpu: str, count: int | None) -> tuple[Setup, Namespace]:
    """The settings of a fit from its command line, and those of its `model` as they were given.

    Without a `count` of processes there are as many as `trainer.devices` and `trainer.num_nodes` say, where those are
    numbers.

    Raises:
        InputError: as the fit would, before it loads weights.
    """
    settings = SettingsCLI(arguments).config
    model, data, trainer = settings.model, settings.data, settings.trainer
    count = count or _processes(trainer)
    config, optimizer = load_config(model.model), _trial(model)
    check_pattern(meta_model(config), parse_pattern(model.pattern, model.scope))
    choices = Choices(
        pattern=parse_pattern(model.pattern, model.scope),
        pruner=resolve_pruner(model.pruner),
        layer_sparsity=model.layer_sparsity,
        objective=Objective(**_plain(model.objective)),
        surrogate=Surrogate(**_plain(model.surrogate)),
        spaces=model.spaces,
        placement=model.placement,
        orthogonal_map=model.orthogonal_map,
        start=model.start if model.init_rotations is None else None,
    )
    choices.check(config, optimizer)
    check_seq_len(config, data.seq_len)
    CalibrationDataModule(**{name: data[name] for name in signature(CalibrationDataModule).parameters})
    statistics_sequences = data.statistics_sequences or data.num_sequences
    check_compensation(model.compensate, statistics_sequences, choices.pattern)
    if choices.surrogate.anneals:
        raise InputError(
            f"plan knows no formulas of surrogate {choices.surrogate.name}; ask for sr_ste, which takes less"
        )
    sharded = count > 1 and _shards(trainer.strategy)
    check_offload(model.offload, model.gradient_checkpointing, sharded)
    setup = Setup(
        config=config,
        pruner=choices.pruner,
        pattern=choices.pattern,
        spaces=tuple(space for space in model.spaces if turns(space)),  # orders take bytes, and no time to speak of
        placement=model.placement,
        orthogonal_map=model.orthogonal_map,
        start=choices.start or "identity",
        layer_sparsity=model.layer_sparsity,
        compensate=model.compensate,
        objective=choices.objective,
        dtype=dtype_on(model.base_dtype, gpu),
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        num_sequences=data.num_sequences,
        statistics_sequences=statistics_sequences,
        test_tokens=_test_tokens(trainer),
        steps=_steps(trainer, data, count),
        gradient_checkpointing=model.gradient_checkpointing,
        offload=model.offload,
        optimizer_states=_states(optimizer),
        keeps_unmasked=choices.surrogate.keeps_unmasked,
        ranks=count,
        sharded=sharded,
        device="cpu" if gpu == "cpu" else "gpu",
    )
    return setup, model


def _processes(trainer: Any) -> int:
    devices = trainer.devices  # a number, a list of GPUs, either as a string, `auto` or -1
    if isinstance(devices, str) and "," in devices:
        devices = [device for device in devices.split(",") if device.strip()]
    if isinstance(devices, list):
        return len(devices) * trainer.num_nodes
    return trainer.num_nodes * (max(1, int(devices)) if str(devices).isdigit() else 1)


def _test_tokens(trainer: Any) -> int:
    """Of the longest text at the end; one that is used whole is taken for WikiText-2's test split, of about 300,000."""
    endings = [callback for callback in trainer.callbacks or () if is_one_of(callback.class_path, Finish)]
    return max((callback.init_args.max_tokens or 300_000 for callback in endings), default=0)


def _steps(trainer: Any, data: Any, ranks: int) -> int:
    """Of the whole fit.

    Raises:
        InputError: neither steps nor epochs are limited, or the ranks' batches are more than the sequences.
    """
    batches = len(CalibrationBatches(torch.empty(data.num_sequences, 0), data.batch_size, world_size=ranks))
    check_limited(trainer)
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * -(-batches // (trainer.accumulate_grad_batches or 1)))
    if not limits:
        raise InputError("the fit has no last step: set trainer.max_steps or trainer.max_epochs")
    return min(limits)


def _plain(settings: Any) -> dict[str, Any]:
    """A dataclass or what the parser made of its settings, as a dictionary."""
    if hasattr(settings, "as_dict"):
        settings = settings.as_dict()
        return settings.get("init_args", settings)
    return asdict(settings)


def _shards(strategy: Any) -> bool:
    """Whether a Trainer's strategy spreads the weights."""
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    return "ModelParallel" in name


def _trial(model: Any) -> torch.optim.Optimizer:
    """The optimiser that a fit's settings name, of one orthogonal matrix."""
    path, settings = "torch.optim.Adam", {}
    if hasattr(model.optimizer, "class_path"):
        path, settings = model.optimizer.class_path, dict(model.optimizer.get("init_args") or {})
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)([torch.nn.Parameter(torch.eye(4))], **settings)


def _states(optimizer: torch.optim.Optimizer) -> int:
    """How many tensors as large as a parameter an optimiser keeps for it, as a step shows."""
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return sum(
        torch.is_tensor(state) and state.shape == parameter.shape for state in optimizer.state[parameter].values()
    )
