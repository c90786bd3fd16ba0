"""The end of a fit: prune with the learned rotations, export, and compare with the controls."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from transformers import AutoModelForCausalLM

from callbacks.ending import Ending, Row
from callbacks.first_fit import FirstFit
from callbacks.terminal import console, track
from rotpruner.artifacts import read_json, save_model, write_json
from rotpruner.diagnostics import write_diagnostics
from rotpruner.errors import InputError
from rotpruner.kept_weights import MASKS_ONLY, take_kept_weights
from rotpruner.loading import load_model, load_tokenizer
from rotpruner.memory import home_of
from rotpruner.model_card import Origin, pruner_name, write_card
from rotpruner.oneshot import Learned, prune_and_compensate
from rotpruner.patterns import Slice
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import random_rotations


class Finish(Ending):
    """After the last step, write `rotations/`, `export/`, `layers.json`, `heatmap.safetensors` and `results.json`.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.finish.Finish
          init_args: {texts: [wikipedia_test], max_tokens: 16384}
    ```

    The rows of `results.json`: `dense`, the model as it came; `pruner`, the same pruner on the
    untouched model (neither fused nor untied), or `pca` for a slice; `random_rotation`, the same pruner in a
    random basis of the same spaces; `rotpruner`, in the learned one. `start`, if it is asked for, is the same pruner in
    the basis that learning started from, such as that of a permutation; `no_update`, if it is asked for and
    `compensate` is set, is `rotpruner` without the weight update. Every row but the first is saved, loaded
    again by plain `transformers` and evaluated in float32; `export/README.md` is a model card with all rows.
    Finished rows survive an interruption. A second fit names the first one by `first_fit`, and has its rows, too, with
    what that has made as `first_fit`; steps, tokens and seconds are then those of both.

    Args:
        texts: names or paths of test texts, none of which calibrated anything.
        seq_len: tokens per window.
        max_tokens: the first tokens of each text that are used; None takes all.
        controls: which of the control rows `pruner`, `start`, `random_rotation` and `no_update` to make.
        first_fit: run directory of the fit that this one continues, which was evaluated likewise.
    """

    def __init__(
        self,
        texts: list[str] = ["wikipedia_test"],  # noqa: B006 - read by the command line, never changed
        seq_len: int = 1024,
        max_tokens: int | None = 16384,
        controls: list[Literal["pruner", "start", "random_rotation", "no_update"]] = ["pruner", "random_rotation"],  # noqa: B006
        first_fit: str | None = None,
    ) -> None:
        super().__init__(texts, seq_len, max_tokens)
        self.controls = controls
        self._first = None if first_fit is None else FirstFit.read(Path(first_fit))
        self._learned = Learned()

    def check(self, module: Any) -> None:
        """Refuse also a control that would be what it is a control of."""
        super().check(module)
        if "no_update" in self.controls and not module.compensate:
            raise InputError("controls: no_update is rotpruner itself where compensate is 0: leave it out")
        if self._first is not None:
            self._first.check_begins(module.init_weights)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a first fit that was evaluated otherwise."""
        super().on_fit_start(trainer, pl_module)
        if self._first is not None:
            self._first.check_evaluated(list(self._windows), self.evaluation)

    def described(self, trainer: Trainer) -> Row:
        """Steps and tokens of both fits, if there was one before."""
        found = super().described(trainer)
        if self._first is not None:
            found["second_steps"] = found["steps"]
            found |= {name: found[name] + self._first.budget[name] for name in ("steps", "training_tokens")}
        return found

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Delete rows left by an earlier finish; they describe older rotations."""
        if trainer.is_global_zero:
            shutil.rmtree(Path(trainer.default_root_dir) / "rows", ignore_errors=True)

    def gather(self, module: Any) -> None:
        """What was learned; sharded rotations come together. Decoder weights, if each rank has all of them, leave main
        memory, and statistics the devices: both have served, and the module does not run any more."""
        rotated = module.rotated
        learned = rotated.learned()
        if module.device_mesh is None:
            rotated.give_up_weights()
        if module.ranks.rank:  # the first one works alone
            rotated.moments = {}
            return
        rotated.moments = {group: moment.to("cpu") for group, moment in rotated.moments.items()}
        moments = None if learned.moments is None else rotated.moments
        self._learned = learned._replace(moments=moments).to("cpu")

    def finish(self, run: Path, trainer: Trainer, module: Any, seconds: float) -> None:
        """Prune in the learned space and as the controls do; export, evaluate and describe."""
        learned = self._learned
        name, pruner, pattern, dtype = module.model_name, module.pruner, module.pattern, module.base_dtype
        shown = str(module.allotment)
        tokenizer, tokens = load_tokenizer(name), trainer.datamodule.statistics_tokens  # type: ignore[attr-defined]
        for left in (*run.glob(".export.*"), *run.glob(".rotations.*")):  # by an ending that was killed
            shutil.rmtree(left, ignore_errors=True)
        started = {space: Q.cpu() for space, Q in module.rotated.rotations.started().items()}
        drawn = random_rotations(module.rotated.base.config, module.spaces, module.seed, placement=module.placement)
        running: dict[str, Any] = {"calibration_dtype": dtype, "device": self._device, "progress": track}

        def pruned(basis: Learned, updated: int, directory: Path) -> Row:
            model, found, chooser = load_model(name), Row(), pruner
            if basis is learned and module.init_weights is not None:
                take_kept_weights(model, *module.kept_weights())
                chooser = MASKS_ONLY
            home = home_of(model, self._device, tokens.numel(), tokens[:updated].numel())
            model.to(home)  # type: ignore[arg-type]
            batches = tokens.to(home).split(1)
            dense = partial(load_model, name, device=home)
            length = prune_and_compensate(model, chooser, module.allotment, batches, basis, updated, dense, **running)
            if length is not None:
                found["step_length"] = length
            save_model(model, tokenizer, directory, replace=True)
            return found

        Rotations.of(learned.rotations or {}, module.rotated.base).save_pretrained(run / "rotations", replace=True)
        rows = [self._kept(run, "dense", lambda: self._dense(name))]
        if self._first is not None:
            rows += self._first.rows
            seconds += self._first.seconds
        made = {
            # The controls have the same sparsity in each block, as OWL may have shared it out.
            "pruner": (Learned(patterns=learned.patterns), module.compensate, 0.0),
            "start": (Learned(started, patterns=learned.patterns), module.compensate, 0.0),
            "random_rotation": (Learned(drawn, patterns=learned.patterns), module.compensate, 0.0),
            "no_update": (learned, 0, seconds),
            "rotpruner": (learned, module.compensate, seconds),
        }
        for row, (basis, updated, spent) in made.items():
            if row in (*self.controls, "rotpruner"):
                row = "pca" if row == "pruner" and isinstance(pattern, Slice) else row
                build = partial(self._pruned, run, row, shown, partial(pruned, basis, updated), spent)
                try:
                    rows.append(self._kept(run, row, build))
                except InputError as error:
                    if row == "rotpruner":
                        raise
                    console.print(f"{row}: {error}")  # a control must not cost what was learned
        exported = AutoModelForCausalLM.from_pretrained(run / "export")
        known = learned.rotations or {}, module.rotated.moments, pruner, module.rotated.patterns
        write_diagnostics(run, load_model(name), exported, *known, track, self._device)
        write_card(run / "export", self._origin(trainer, module, rows), module.rotated.base.config, self._commit)
        self.record(run, rows, trainer)
        shutil.rmtree(run / "rows")

    def _origin(self, trainer: Trainer, module: Any, rows: list[Row]) -> Origin:
        return Origin(
            base_model=module.model_name,
            **module.allotment.in_words(),
            pruner=None if isinstance(module.pattern, Slice) else pruner_name(module.pruner),
            basis="learned",
            taken_over=None if self._first is not None else module.init_weights,
            spaces=module.spaces,
            update="compensation" if module.compensate or (self._first and self._first.updated) else None,
            learned_masks=module.surrogate.learns_masks,
            num_sequences=trainer.datamodule.statistics_sequences,  # type: ignore[attr-defined]
            seed=module.seed,
            rows=rows,
            command="python -m experiments fit -c config.yaml" if self.config else None,
            **self.described(trainer),
        )

    def _dense(self, name: str) -> Row:
        return self.evaluated("dense", None, load_model(name, torch.float32), 0.0, reference=True)

    def _pruned(self, run: Path, name: str, pattern: str, build: Callable[[Path], Row], learning_seconds: float) -> Row:
        """Build, reload, evaluate; `build` may add to the row."""
        started = time.perf_counter()
        (run / "rows").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=run / "rows") as scratch:
            directory = run / "export" if name == "rotpruner" else Path(scratch) / name
            console.print(f"{name}: prune, save, load again")
            found = build(directory)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            seconds = learning_seconds + time.perf_counter() - started
            return self.evaluated(name, pattern, model, seconds) | found

    @staticmethod
    def _kept(run: Path, name: str, make: Callable[[], Row]) -> Row:
        """A row, or what an interrupted finish has left of it."""
        kept = run / "rows" / f"{name}.json"
        if kept.is_file():
            return read_json(kept)
        row = make()
        write_json(row, kept)
        return row
