"""Callbacks in a real Trainer: what they log, write and leave alone."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import time
from importlib import import_module
from pathlib import Path

import pytest
import rich.progress
import torch
from conftest import tiny_llama
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.live import Live
from transformers import AutoModelForCausalLM

from callbacks.finish import Finish
from callbacks.perplexity import Perplexity, WindowPerplexity
from callbacks.progress import StepProgress
from callbacks.repruning import Repruning
from callbacks.rotation_checkpoint import RotationCheckpoint, last_checkpoint
from callbacks.rotation_checkpoint import _replace as replace_checkpoint
from callbacks.steps import EverySteps
from callbacks.terminal import ResultsTable
from datamodules.calibration import CalibrationDataModule
from datamodules.evaluation import token_ids
from experiments.report_runs import read_curves
from lightning_modules.rotation_module import RotationModule
from rotpruner.errors import InputError
from rotpruner.loading import load_model
from rotpruner.perplexity import of_mean, perplexity
from rotpruner.replay import final_states
from rotpruner.rotation_artifact import Rotations


@pytest.fixture
def fit(model_directory, text_file, tmp_path):
    """`fit(callbacks, logger)` → the trainer and module after six steps on a tiny model."""

    def run(
        callbacks, logger=False, max_steps=6, log_every_n_steps=1, accumulate=1, **settings
    ) -> tuple[Trainer, RotationModule]:
        limits = {name: settings.pop(name) for name in ("max_epochs", "max_time") if name in settings}
        trainer = Trainer(
            default_root_dir=tmp_path / "run",
            max_steps=max_steps,
            **limits,
            accelerator="cpu",
            logger=logger,
            log_every_n_steps=log_every_n_steps,
            accumulate_grad_batches=accumulate,
            callbacks=callbacks,
            enable_progress_bar=any(isinstance(callback, StepProgress) for callback in callbacks),
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, RotationCheckpoint) for callback in callbacks),
        )
        module = RotationModule(str(model_directory), base_dtype="float32", **settings)
        data = CalibrationDataModule(str(text_file), 6, 32, 2, model=str(model_directory))
        trainer.fit(module, data)
        return trainer, module

    return run


def test_window_perplexity_equals_a_double_precision_computation():
    generator = torch.Generator().manual_seed(0)
    metric, total, count = WindowPerplexity(), 0.0, 0
    for _ in range(3):
        logits, ids = torch.randn(2, 9, 50, generator=generator), torch.randint(0, 50, (2, 9), generator=generator)
        metric.update(logits, ids)
        log_p = logits.double().log_softmax(-1)
        total -= sum(log_p[b, t, ids[b, t + 1]].item() for b in range(2) for t in range(8))
        count += 16
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(math.exp(total / count), rel=1e-6)


def test_logits_that_are_no_numbers_have_no_perplexity():
    metric = WindowPerplexity()
    metric.update(torch.full((1, 4, 5), math.nan), torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="logits are NaN"):
        metric.compute()
    assert of_mean(800.0) == math.inf


def test_a_broken_row_does_not_cost_the_others(capsys):
    model, ending = tiny_llama(), Finish(["wikipedia_test"])
    model.model.layers[1].mlp.up_proj.weight.data[0] = math.nan
    ending._windows = {"words": torch.arange(64).view(2, 32)}
    assert ending.evaluated("pruner", None, model, 0.0)["ppl"] == {"words": math.inf}
    assert "pruner: the model's logits are NaN" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("checkpoint", "mention"), [(6, "rotations are NaN"), (1, "NaN or infinite at step 3")])
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(checkpoint, mention, fit, tmp_path):
    class Diverge(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                next(pl_module.rotated.rotations.parameters()).data.fill_(math.nan)

    with pytest.raises(InputError, match=mention):
        fit([Repruning(2), RotationCheckpoint(checkpoint), Diverge()])
    if checkpoint == 1:
        kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        assert kept["global_step"] == 2
        assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_callbacks_log_and_masks_follow_the_schedule(fit, test_text_file, tmp_path):
    chosen = []

    class Spy(Repruning):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = pl_module.rotated.linears[0].mask
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if pl_module.rotated.linears[0].mask is not before:
                chosen.append(trainer.global_step)

    watch = Perplexity([str(test_text_file)], every_n_steps=3, seq_len=32, max_tokens=128)
    fit([Spy(every_n_steps=2), watch], CSVLogger(tmp_path / "csv"))
    assert chosen == [2, 4]  # the module has chosen those of the first step
    header = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    expected = {"train/loss", "train/kl", "masks/flipped", "rotations/orthogonality_error", "ppl/other_words"}
    assert expected <= set(header)


def test_rotation_checkpoint_writes_loadable_rotations(fit, model_directory, tmp_path):
    _, module = fit([Repruning(2), RotationCheckpoint(4)])
    found = Rotations.from_pretrained(tmp_path / "run" / "rotations")
    found.check_model(load_model(str(model_directory)))
    for space, Q in module.rotated.rotations().items():
        assert torch.equal(found[space], Q)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not list((tmp_path / "run").glob(".*")), "temporary files were left"


def test_training_leaves_the_base_weights_alone(fit, model_directory):
    _, module = fit([Repruning(2)], spaces=["value_heads"])
    dense = AutoModelForCausalLM.from_pretrained(model_directory).state_dict()
    for name, weight in module.rotated.base.state_dict().items():
        assert torch.equal(weight, dense[name]), name


def test_wandb_offline_takes_two_runs_in_one_directory(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    for _ in range(2):
        fit([Repruning(2)], WandbLogger(project="rotpruner", offline=True, save_dir=tmp_path))
        wandb.finish()
    assert len(list(Path(tmp_path, "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize("build", [Repruning, RotationCheckpoint, lambda n: Perplexity([], every_n_steps=n)])
def test_callbacks_refuse_intervals_below_one(build):
    with pytest.raises(InputError, match="every_n_steps 0"):
        build(0)


def test_the_end_of_a_fit_runs_block_by_block_where_learning_did(fit, test_text_file, tmp_path, monkeypatch):
    """A device by another name, so that blocks visit it: what is written is what the CPU as a whole has given."""
    found = []
    for device in ("cpu", "cpu:0"):
        monkeypatch.setattr("callbacks.ending.training_device", lambda trainer, device=device: torch.device(device))
        monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / device))
        visited: list[torch.device] = []

        def spied(*given, visited=visited, **settings):
            visited.append(settings["device"])
            return final_states(*given, **settings)

        monkeypatch.setattr(import_module("rotpruner.perplexity"), "final_states", spied)
        fit([Finish([str(test_text_file)], 32, 256, controls=[])], compensate=4)
        assert bool(visited) is (device == "cpu:0")
        found.append(json.loads((tmp_path / "run" / "results.json").read_text())["rows"])
        shutil.rmtree(tmp_path / "run")
    for one, other in zip(*found, strict=True):
        assert one["ppl"] == pytest.approx(other["ppl"], rel=1e-5)


def test_a_run_that_epochs_limit_ends_with_a_checkpoint(model_directory, text_file, tmp_path):
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[RotationCheckpoint(25)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = CalibrationDataModule(str(text_file), 6, 32, 2, model=str(model_directory))
    trainer.fit(RotationModule(str(model_directory), base_dtype="float32"), data)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_the_rate_falls_along_a_cosine_step_by_step(fit):
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    fit([Rates()])  # three batches an epoch
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


def test_perplexity_is_logged_at_its_own_steps(fit, test_text_file, tmp_path, tokenizer):
    """Whatever Lightning's interval is: it would log what it finds at its own steps, and repeat it."""
    watch = Perplexity([str(test_text_file)], every_n_steps=2, seq_len=32, max_tokens=128)
    trainer, module = fit([Repruning(5), watch], CSVLogger(tmp_path, name="logs"), log_every_n_steps=50)
    curves = read_curves(tmp_path)
    assert [step for step, _ in curves["ppl/other_words"]] == [2, 4, 6]
    assert [step for step, _ in curves["masks/flipped"]] == [5]
    assert 0 < curves["masks/flipped"][0][1] < 1
    ids = token_ids(str(test_text_file), tokenizer)
    expected = perplexity(module.rotated, ids, seq_len=32, max_tokens=128)
    assert curves["ppl/other_words"][-1][1] == pytest.approx(expected, rel=1e-5)
    assert trainer.progress_bar_metrics["ppl/other_words"] == pytest.approx(expected, rel=1e-5)


def test_turns_come_once_a_step():
    steps = EverySteps(2, "Nobody")
    asked = [0, 0, 1, 1, 2, 2, 3, 4]  # two batches a step
    assert [step for step in asked if steps.is_due(step)] == [2, 4]
    assert not steps.is_due(0), "another fit"
    steps.resume_at(6)
    assert not steps.is_due(6)
    assert steps.is_due(8)


def test_seconds_of_training_are_those_of_all_its_parts():
    finish = Finish()
    finish.load_state_dict({"training_seconds": 100.0, "commit": "where it began"})
    assert finish.state_dict() == {"training_seconds": 100, "commit": "where it began"}
    finish._started = time.perf_counter() - 5
    assert finish.state_dict()["training_seconds"] == pytest.approx(105, abs=1)


@pytest.mark.parametrize("fails", [1, 2])
def test_one_checkpoint_is_whole_at_every_moment(fails, tmp_path, monkeypatch):
    place = tmp_path / "checkpoints"
    for name in ("last.ckpt", "new"):  # directories of shards
        (place / name).mkdir(parents=True)
        (place / name / "meta.pt").touch()
    moves, move = [], os.replace

    def cut(*given):
        moves.append(given)
        if len(moves) == fails:
            raise KeyboardInterrupt
        move(*given)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        replace_checkpoint(place / "new", place / "last.ckpt", place / "previous.ckpt")
    assert (last_checkpoint(tmp_path) / "meta.pt").is_file()


def test_rows_of_an_earlier_training_are_dropped(fit, test_text_file, tmp_path):
    rows = tmp_path / "run" / "rows"
    rows.mkdir(parents=True)
    (rows / "rotpruner.json").write_text('{"name": "of another run"}')
    fit([Finish([str(test_text_file)], 32, 256, controls=[])], max_steps=1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["name"] for row in found] == ["dense", "rotpruner"]


@pytest.mark.parametrize("settings", [{}, {"lr_scheduler": "constant"}])
def test_a_run_without_a_last_step_needs_no_schedule_that_asks_for_it(settings, fit):
    if settings:
        trainer, _ = fit([StepProgress()], max_steps=-1, max_epochs=-1, max_time="00:00:00:01", **settings)
        assert trainer.global_step > 0
    else:
        with pytest.raises(InputError, match="this run has none: set trainer"):
            fit([], max_steps=-1, max_epochs=-1, max_time="00:00:00:01")


def test_nothing_is_saved_between_batches_whose_gradients_accumulate(fit, monkeypatch):
    saved = []
    monkeypatch.setattr(RotationCheckpoint, "_save", lambda self, trainer, module: saved.append(trainer.global_step))
    fit([RotationCheckpoint(2)], accumulate=3)
    assert saved == [2, 4, 6]


def test_any_scheduler_steps_once_an_optimiser_step(fit):
    trainer, _ = fit([], lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-3 * 0.5**6)


def test_on_a_terminal_one_bar_follows_the_other(fit, monkeypatch):
    """Features are put in order when training starts; two bars at once are an error in older versions of rich."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    live: list[object] = []

    class One(Live):
        def start(self, *given, **named):
            live.append(self)
            assert len(live) == 1
            super().start(*given, **named)

        def stop(self):
            live.clear()
            super().stop()

    monkeypatch.setattr(rich.progress, "Live", One)
    for module in ("callbacks.progress", "callbacks.terminal"):
        monkeypatch.setattr(f"{module}.console", screen)
    fit([StepProgress()], start="permutation", spaces=["residual", "value_heads", "mlp"])
    said = screen.file.getvalue()
    assert said.index("calibration") < said.index("ordering features") < said.index("6/6")


def test_a_log_file_is_told_what_learns_and_how_far_it_has_come(fit, capsys):
    fit([StepProgress()])
    said = capsys.readouterr().err
    assert f"{32 * 31 // 2 + 2 * 2 * 8 * 7 // 2:,} parameters learn" in said
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == [f"step {step} of 6" for step in range(1, 7)]
    assert all(re.search(r"loss \d+\.\d+", line) for line in lines)


@pytest.mark.parametrize("online_flops", [0, 19_900_000])
@pytest.mark.parametrize("texts", [1, 2, 3, 4])
def test_a_narrow_terminal_cuts_and_breaks_nothing(texts, online_flops):
    ppl = {f"wikitext2_raw_train_{number}MB": 1_234_567.8 + number for number in range(texts)}
    row = {"pattern": "2:4", "sparsity": 0.5, "ppl": ppl, "parameters": 162_826_560, "seconds": 12345.6}
    names = ["dense", "random_rotation", "first_fit", "rotpruner"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ResultsTable({"rows": [{"name": name, "online_flops": online_flops, **row} for name in names]}))
    said = [line.split() for line in console.export_text().splitlines()]
    for name in names:
        words = [word for line in said if line[:1] == [name] for word in line[1:]]
        flops = ["19.9", "M"] if online_flops else []
        expected = [*(f"{value:,.0f}" for value in ppl.values()), "2:4", "0.5000", "162.8", "M", *flops, "12346"]
        assert sorted(words) == sorted(expected)
