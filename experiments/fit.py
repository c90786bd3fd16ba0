"""`python -m experiments fit`: learn rotations from a config file, then prune, export and compare.

Options are LightningCLI's: `-c` stacks config files, and every argument can be overridden, as in
`--model.pattern 4:8 --trainer.max_steps 50 --data.calibration my_text.txt`.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.dashboard import Dashboard
from callbacks.ending import Ending
from callbacks.rotation_checkpoint import last_checkpoint
from callbacks.terminal import console
from datamodules.calibration import CalibrationDataModule
from experiments.report_runs import FIRST_FIT
from experiments.run_directory import (
    DTYPES,
    WANDB_ID,
    RunRecord,
    check_batches,
    check_checkpoint,
    differences,
    processes,
    show,
    wandb_settings,
    with_defaults,
)
from experiments.second_fit import first_settings, second_settings
from lightning_modules.rotation_module import RotationModule
from rotpruner.distributed import lost_rank
from rotpruner.errors import InputError
from rotpruner.kept_weights import check_takes_weights
from rotpruner.learning import SecondFit


class FitCLI(LightningCLI):
    """LightningCLI over one run directory, `trainer.default_root_dir`.

    A run directory belongs to one configuration: a finished run is shown again, an unfinished one goes on
    from its last checkpoint, and another configuration is refused. With `second_fit` it is two fits
    (`experiments.second_fit`): what is built here is the second one, and the first is run before it.
    """

    finished = False
    resume_from: Path | None = None
    wandb_id: str | None = None
    _first: dict[str, Any] | None = None

    def __init__(
        self,
        arguments: list[str] | dict[str, Any],
        module: type[LightningModule] = RotationModule,
        command: str = "fit",
        is_first: bool = False,
    ) -> None:
        # Lightning's notes on seeds and accelerators would stand between a mistake and its one line of explanation.
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # But where a process ends, the one that has started it is killed within seconds: this says why.
        logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
        # Lightning 2.6 asks torch 2.13 about pytrees in a way that torch has deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        #: Whether it is the first of two fits, of which the whole run says what may change and what is shown.
        self.command, self.is_first = command, is_first
        super().__init__(
            module,
            CalibrationDataModule,
            args=arguments,
            run=False,
            save_config_callback=None,  # it writes before the model has been checked: see RunRecord
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the rotations exist only after configure_model
            parser_kwargs={"exit_on_error": False, "prog": f"python -m experiments {command}"},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One model name and one seed for all parts."""
        parser.link_arguments("model.model", "data.model")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        if self.command == "fit":
            parser.add_argument(
                "--second_fit", type=SecondFit | None, default=None, help="a second fit, after the first one's update"
            )
        parser.set_defaults({"trainer.default_root_dir": f"runs/{self.command}", "trainer.barebones": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with one-line errors."""
        try:
            self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)
        except ArgumentError as error:
            raise InputError(f"{error}; see python -m experiments {self.command} --help") from error

    def before_instantiate_classes(self) -> None:
        """Look at the run directory before anything is built."""
        check_limited(self.config.trainer)
        if self.config.trainer.default_root_dir is None:
            raise InputError("trainer.default_root_dir is null, and a run has to live somewhere: give a directory")
        # Lightning writes to what `~` stands for, and there the run has to be found again.
        self.config.trainer.default_root_dir = os.path.expanduser(self.config.trainer.default_root_dir)
        self.run_directory = Path(self.config.trainer.default_root_dir)
        if self.config.trainer.accelerator == "auto" and torch.backends.mps.is_available():
            self.config.trainer.accelerator = "cpu"  # `check_trainer` would refuse what Lightning takes
        self.config_record = self.recorded()
        recorded = self.run_directory / "config.yaml"
        known = yaml.safe_load(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {}
        if (given := self.config_record.get("second_fit")) is not None:
            self._first = first_settings(self.config_record, self.run_directory)
            second = second_settings(self.config_record, self.run_directory, SecondFit(**given))
            self.config = self.parser.parse_object(second)
        elif not known and (first := self.run_directory / FIRST_FIT / "config.yaml").is_file():
            raise InputError(
                f"run directory '{self.run_directory}' has begun with the first of two fits ({first}), and second_fit "
                "is null; choose another --trainer.default_root_dir, or remove it"
            )
        self._house_wandb()
        if not known:
            return
        for name in DTYPES:
            if self.config_record["model"].get(name) == "auto":
                self.config.model[name] = self.config_record["model"][name] = known["model"].get(name, "auto")
        known, finished = self._complete(known), (self.run_directory / "results.json").is_file()
        if differing := differences(known, self.config_record):
            raise InputError(
                f"run directory '{self.run_directory}' belongs to another configuration ({recorded}), where "
                f"{', '.join(differing)}; choose another --trainer.default_root_dir, or remove it"
            )
        if finished:
            self.finished = True
            if not self.is_first:
                if (count := processes(self.config.trainer)) is not None:
                    check_batches(self.run_directory, self.config.data.batch_size * count)
                show(self.run_directory)
            return
        self.resume_from = last_checkpoint(self.run_directory)
        if self.resume_from is not None:
            check_checkpoint(self.resume_from)
            rank_zero_only(console.print)(f"resuming from {self.resume_from}")

    def recorded(self) -> dict[str, Any]:
        """The configuration as a run directory keeps it."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False, skip_none=False))
        return {key: value for key, value in config.items() if key != "config"}

    def _house_wandb(self) -> None:
        """Let one run of wandb live in one run directory, however often that is resumed.

        The recorded configuration stays as it was given: in another directory, it is another run.
        """
        recorded = self.run_directory / WANDB_ID
        for settings in wandb_settings(self.config):
            if settings.get("save_dir") == ".":  # Lightning's default
                settings["save_dir"] = str(self.run_directory)
            # Users may say which run it is, and agents of wandb's sweeps do, in the environment.
            if not (settings.get("id") or settings.get("version") or os.environ.get("WANDB_RUN_ID")):
                self.wandb_id = recorded.read_text(encoding="utf-8") if recorded.is_file() else uuid.uuid4().hex[:8]
                settings["id"] = self.wandb_id

    def _complete(self, known: dict[str, Any]) -> dict[str, Any]:
        """A recorded configuration with today's defaults for options that are younger than it."""
        defaults = yaml.safe_load(self.parser.dump(self.parser.get_defaults(), skip_validation=True, skip_none=False))
        return with_defaults(known, defaults)

    def instantiate_classes(self) -> None:
        """Build everything, of a run that has not ended."""
        if self.finished:
            return
        if self._first is not None:
            self._run_first(self._first)
            self._set_seed()  # as if this fit were alone
        with plain_refusals():
            super().instantiate_classes()

    def _run_first(self, settings: dict[str, Any]) -> None:
        """Run the first of two fits, once it is known that the second can go on from it."""
        existed = self.run_directory.exists()
        try:
            first = FitCLI(settings, is_first=True)
            if not first.finished:
                sharded = isinstance(first.trainer.strategy, ModelParallelStrategy)
                module = first.model
                check_takes_weights("second_fit", module.surrogate, module.objective, module.pattern, sharded)
            run_to_the_end(first)
        except InputError:
            if not existed and self.run_directory.is_dir() and not any(self.run_directory.iterdir()):
                self.run_directory.rmdir()
            raise
        if not first.finished and first.trainer.is_global_zero:
            for logger in first.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()  # or the second fit would log into its run
        for name in DTYPES:  # of both alike, wherever the second one runs
            if self.config_record["model"].get(name) == "auto":
                self.config.model[name] = self.config_record["model"][name] = first.config_record["model"][name]
        del first
        gc.collect()  # now, before a model is loaded again: modules and trainers refer to each other

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Log to CSV files in the run directory, from which reports are made, besides loggers that are asked for."""
        own = CSVLogger(self.run_directory, name="logs")
        if self.config.trainer.logger is None:
            kwargs["logger"] = own
        trainer: Any = super().instantiate_trainer(**kwargs)
        if self._first is not None:
            check_batches(self.run_directory / FIRST_FIT, self.config.data.batch_size * trainer.world_size)
        others = [getattr(logger, "root_dir", None) for logger in trainer.loggers]
        if others and own.root_dir not in others and not trainer.fast_dev_run:
            trainer.loggers = [*trainer.loggers, own]
        trainer.callbacks.append(RunRecord(self.config_record, self.wandb_id))
        sharded = self.resume_from is not None and self.resume_from.is_dir()
        if sharded and not isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError(
                f"checkpoint '{self.resume_from}' is a directory of shards; go on with the ModelParallelStrategy, "
                "under any number of processes"
            )
        return trainer


@contextmanager
def plain_refusals() -> Iterator[None]:
    """For a `with` block: the parser wraps what a constructor refuses, once for each type it tries."""
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None


def check_limited(trainer: Any) -> None:
    """Raise `InputError` if nothing in a Trainer's settings says how long it trains, or if that is no step at all.

    Lightning would go on for 1000 epochs; without a step it does not even come to where learning starts from.
    """
    for name in ("max_steps", "max_epochs"):
        if getattr(trainer, name) == 0:
            raise InputError(f"trainer.{name} 0 learns nothing; give 1 or more, or use prune")
    if trainer.max_steps < 0 and trainer.max_epochs is None and trainer.max_time is None and not trainer.fast_dev_run:
        raise InputError(
            "nothing says how long to learn: give a config with -c, as those in experiments/configs, or "
            "--trainer.max_steps"
        )


def main(arguments: list[str]) -> None:
    """Parse, check, fit; everything lands in the run directory."""
    run_to_the_end(FitCLI(arguments))


def run_to_the_end(cli: FitCLI) -> None:
    """Train, with the configuration recorded; what refuses its input before a step leaves no run directory behind."""
    if cli.finished:
        return
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (Ending, Dashboard)):
            callback.config = cli.config_record
    existed = cli.run_directory.exists()
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    except InputError:
        # Lightning makes the loggers' directories before it looks at the model.
        if not existed and cli.trainer.global_step == 0:
            shutil.rmtree(cli.run_directory, ignore_errors=True)
        raise
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        found = last_checkpoint(cli.run_directory)
        mend = f"to resume from {found}" if found else "to start over"
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]  # without gloo's own place
        print(
            f"error: another process of this run has ended ({reason}); run the same command again {mend}",
            file=sys.stderr,
        )
        sys.exit(1)
