"""A run of two fits: the second continues to train the rotations of the first, after its weight update."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from experiments.report_runs import FIRST_FIT
from experiments.run_directory import wandb_settings
from rotpruner.errors import InputError
from rotpruner.learning import SecondFit

_FINISH = "callbacks.finish.Finish"


def first_settings(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """The settings of the first fit of a run, from the whole run's configuration; it has a directory inside the run's.

    Raises:
        InputError: no second fit could continue from it.
    """
    check(config)
    settings = _own(config)
    settings["trainer"]["default_root_dir"] = str(run / FIRST_FIT)
    for arguments in wandb_settings(settings):  # one run of wandb holds one fit
        for name in ("id", "version"):
            arguments.pop(name, None)
    return settings


def second_settings(config: dict[str, Any], run: Path, given: SecondFit) -> dict[str, Any]:
    """The settings of the second fit of a run, whose first one has ended; controls are taken from there."""
    settings, first = _own(config), run / FIRST_FIT
    model, trainer = settings["model"], settings["trainer"]
    model |= {"compensate": 0, "init_rotations": str(first / "rotations"), "init_weights": str(first / "export")}
    model["optimizer"]["init_args"]["lr"] *= given.lr_factor
    limits = ("max_epochs", "max_time", "min_steps", "min_epochs")
    trainer |= {"max_steps": given.steps, **dict.fromkeys(limits)}
    for callback in _callbacks(settings):
        if callback["class_path"] == _FINISH:
            callback["init_args"] |= {"controls": [], "first_fit": str(first)}
    return settings


def check(config: dict[str, Any]) -> None:
    """Raise `InputError` if no second fit could continue from the first one of a configuration."""
    model, trainer = config["model"], config["trainer"]
    if not model["compensate"]:
        raise InputError(
            "second_fit comes after the weight update, and model.compensate is 0: give it the sequences to fit on, or "
            "second_fit null"
        )
    if model["init_weights"] is not None:
        raise InputError("second_fit sets model.init_weights itself: give second_fit null to continue from your own")
    if not isinstance((model["optimizer"].get("init_args") or {}).get("lr"), (int, float)):
        raise InputError(
            "second_fit lowers the rate lr of model.optimizer, which says none: give it one, or second_fit null"
        )
    if model["lr_scheduler"] not in ("constant", "cosine"):
        raise InputError(
            "second_fit has steps and a rate of its own, to which this model.lr_scheduler would not keep: give "
            "constant or cosine, or second_fit null"
        )
    if trainer["fast_dev_run"]:
        raise InputError("trainer.fast_dev_run leaves nothing to continue from: give second_fit null, too")
    if not any(callback["class_path"] == _FINISH for callback in _callbacks(config)):
        raise InputError(
            f"second_fit continues from what {_FINISH} exports, which is not among trainer.callbacks: add it"
        )
    if os.environ.get("WANDB_RUN_ID") and wandb_settings(config):
        raise InputError(
            "WANDB_RUN_ID names one run of wandb, and with second_fit there are two fits: give second_fit null"
        )


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of one fit, without what the parser links itself."""
    settings = copy.deepcopy(config) | {"second_fit": None}
    for part, name in (("data", "model"), ("data", "seed"), ("model", "seed")):
        del settings[part][name]
    return settings


def _callbacks(settings: dict[str, Any]) -> list[dict[str, Any]]:
    given = settings["trainer"]["callbacks"] or []
    return given if isinstance(given, list) else [given]
