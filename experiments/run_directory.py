"""What a run directory holds: the configuration that it belongs to, which is compared with that of a later start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.ending import Ending
from callbacks.rotation_checkpoint import RotationCheckpoint
from callbacks.terminal import ResultsTable, console
from rotpruner.artifacts import read_json, write_text
from rotpruner.errors import InputError
from rotpruner.precision import dtype_name

#: Settings of which `auto` asks the device. The record of a run holds the answer, so that it goes on in one dtype.
DTYPES = ("base_dtype", "compute_dtype")

#: Where a run directory keeps the id of its run of wandb.
WANDB_ID = Path("wandb", "run_id")


class RunRecord(Callback):
    """Write `config.yaml` into the run directory once the model and the texts have turned out to be usable."""

    def __init__(self, config: dict[str, Any], wandb_id: str | None = None) -> None:
        self.config, self.wandb_id = config, wandb_id

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whole or not at all: the file decides whether a later start is the same run."""
        for name in DTYPES:
            if self.config["model"].get(name) == "auto":
                self.config["model"][name] = dtype_name(getattr(pl_module, name))
        if trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            if self.wandb_id is not None:
                write_text(self.wandb_id, run / WANDB_ID)
            write_text(yaml.safe_dump(self.config, sort_keys=False), run / "config.yaml")
            for kind, lost in ((Ending, "exports or evaluates anything"), (RotationCheckpoint, "lets it be resumed")):
                if not any(isinstance(callback, kind) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                    console.print(f"warning: no callback of this run {lost}; see experiments/configs")


def processes(trainer: Any) -> int | None:
    """How many a Trainer's settings ask for; None where it is to find out itself."""
    devices = trainer.devices  # a number, a list of GPUs, either as a string, `auto` or -1
    if isinstance(devices, str) and "," in devices:
        devices = [device for device in devices.split(",") if device.strip()]
    if isinstance(devices, list):
        return len(devices) * trainer.num_nodes
    return trainer.num_nodes * max(1, int(devices)) if str(devices).isdigit() else None


def check_batches(run: Path, given: int) -> None:
    """Raise `InputError` if the processes of a finished run took other batches, all together, than is now asked for."""
    known = read_json(run / "results.json").get("budget", {}).get("global_batch", given)
    if known != given:
        raise InputError(
            f"the finished fit in '{run}' took {known} sequences at a time, and this one would take {given}: keep "
            "data.batch_size times the number of processes, or choose another --trainer.default_root_dir"
        )


#: Callbacks that change nothing of what a run writes but its logs.
_WATCHING = ("callbacks.dashboard.Dashboard", "callbacks.perplexity.Perplexity", "callbacks.progress.StepProgress")


def differences(known: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What two configurations of a run directory have otherwise; nothing if they are one run's."""
    return list(_differences(_what_is_learned(known), _what_is_learned(given)))


def _what_is_learned(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says where it runs and what is seen of it.

    A run may go on with other processes, and then with another `batch_size`, which counts one process's rows; that the
    batches of all of them stay alike is checked against the checkpoint, or by `check_batches`.
    """
    places = {
        "trainer": {
            *("accelerator", "strategy", "devices", "num_nodes", "default_root_dir"),
            *("logger", "log_every_n_steps", "profiler", "enable_progress_bar", "enable_model_summary"),
        },
        # Where weights wait and what is computed twice changes no number, and helps a run whose memory was too small.
        "model": {"cache_dense", "gradient_checkpointing", "offload"},
        "data": {"batch_size"},
    }
    trainer = config.get("trainer", {})
    if isinstance(trainer.get("callbacks"), list):
        others = [callback for callback in trainer["callbacks"] if callback["class_path"] not in _WATCHING]
        config = {**config, "trainer": {**trainer, "callbacks": others}}
    if exceptions := config.get("model", {}).get("exceptions"):  # the last match counts, so their order does
        config = {**config, "model": {**config["model"], "exceptions": list(exceptions.items())}}
    return {
        part: {key: value for key, value in settings.items() if key not in places[part]} if part in places else settings
        for part, settings in config.items()
    }


def with_defaults(known: Any, defaults: Any) -> Any:
    """A configuration with defaults where it says nothing; what names a class has arguments of its own."""
    if not isinstance(known, dict) or not isinstance(defaults, dict) or "class_path" in known:
        return known
    filled = {key: with_defaults(value, defaults.get(key)) for key, value in known.items()}
    return {**{key: value for key, value in defaults.items() if key not in known}, **filled}


def _differences(known: Any, given: Any, name: str = "") -> Iterator[str]:
    """What each setting is in a known configuration that a given one has otherwise."""
    if isinstance(known, dict) and isinstance(given, dict):
        for key in dict.fromkeys([*known, *given]):
            yield from _differences(known.get(key), given.get(key), f"{name}.{key}" if name else key)
    elif isinstance(known, list) and isinstance(given, list) and len(known) == len(given):
        for place, pair in enumerate(zip(known, given, strict=True)):
            yield from _differences(*pair, f"{name}[{place}]")
    elif known != given:
        short = len(f"{known}{given}") < 80
        yield f"{name} is {known} instead of {given}" if short else f"{name} is another"


def check_checkpoint(checkpoint: Path) -> None:
    """Raise `InputError` if a checkpoint cannot be read; of a directory of shards, whose index torch pickles, only
    the rest is read here: it is the run's own."""
    try:
        if checkpoint.is_dir() and not (checkpoint / ".metadata").is_file():
            raise FileNotFoundError(".metadata")
        file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # a recovery's is larger than its model
    except Exception as error:  # a damaged archive shows itself in many ways
        raise InputError(
            f"checkpoint '{checkpoint}' is damaged ({type(error).__name__}); remove it to begin the run again"
        ) from error


@rank_zero_only
def show(run: Path) -> None:
    """Print the results of a finished run."""
    results = read_json(run / "results.json")
    console.print(f"{run} is finished; remove it to run again")
    console.print(ResultsTable(results))


def wandb_settings(config: Any) -> list[Any]:
    """The arguments of each `WandbLogger` of a configuration."""
    given = config.get("trainer", {}).get("logger")
    loggers = given if isinstance(given, list) else [given]
    return [
        logger["init_args"]
        for logger in loggers
        if isinstance(logger, (dict, Namespace)) and logger["class_path"].endswith(".WandbLogger")
    ]
