"""A fit of two: rotations go on learning after the weight update, by one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import refused
from safetensors.torch import load_file

from experiments.report_runs import read_curves
from lightning_modules.rotation_module import RotationModule
from rotpruner.layout import linear_modules
from rotpruner.loading import load_model
from rotpruner.patterns import parse_pattern

UPDATED = ["--model.compensate", "2", "--model.optimizer.lr", "0.01"]
BOTH = [*UPDATED, "--second_fit.steps", "3"]
EVERY_STEP = {"class_path": "callbacks.rotation_checkpoint.RotationCheckpoint", "init_args": {"every_n_steps": 1}}
CHECKPOINTS = ["--trainer.callbacks+", json.dumps(EVERY_STEP)]
SCHEDULER = '{"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}'


def learned(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "rotations" / "rotations.safetensors")


def rows_of(run: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]}


def test_one_command_learns_what_two_do(fit, tmp_path):
    assert fit(*UPDATED)[0] == 0
    first = (tmp_path / "run").rename(tmp_path / "first")
    going_on = {
        "--model.init_rotations": first / "rotations",
        "--model.init_weights": first / "export",
        "--model.compensate": 0,
        "--model.optimizer.lr": 0.001,
        "--trainer.max_steps": 3,
        "--trainer.callbacks.init_args.controls": "[]",
    }
    assert fit(*UPDATED, *(str(item) for pair in going_on.items() for item in pair))[0] == 0
    second = (tmp_path / "run").rename(tmp_path / "second")
    status, run = fit(*BOTH)
    assert status == 0
    for one, other in ((first, run / "first-fit"), (second, run)):
        assert learned(one).keys() == learned(other).keys() == {"residual", "value_heads"}
        for space, Q in learned(one).items():
            torch.testing.assert_close(learned(other)[space], Q, rtol=0, atol=0)
    assert not torch.equal(learned(first)["residual"], learned(second)["residual"])
    assert rows_of(run)["rotpruner"]["ppl"] == rows_of(second)["rotpruner"]["ppl"]
    pattern, model = parse_pattern("2:4"), load_model(run / "export")
    assert all(pattern.holds(linear.weight) for linear in linear_modules(model).values())


def test_its_results_are_those_of_both(fit):
    status, run = fit(*BOTH)
    assert status == 0
    first = rows_of(run / "first-fit")
    rows = rows_of(run)
    assert list(rows) == ["dense", "pruner", "random_rotation", "first_fit", "rotpruner"]
    assert {name: rows[name] for name in ("pruner", "random_rotation")} == {
        name: first[name] for name in ("pruner", "random_rotation")
    }
    assert rows["first_fit"] == {**first["rotpruner"], "name": "first_fit", "training_tokens": 2 * 32}
    assert rows["rotpruner"]["seconds"] > first["rotpruner"]["seconds"]
    results = json.loads((run / "results.json").read_text())
    assert (results["budget"]["steps"], results["budget"]["training_tokens"]) == (5, 5 * 32)
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded == results["config"]
    assert recorded["second_fit"] == {"steps": 3, "lr_factor": 0.1}
    assert (recorded["model"]["compensate"], recorded["trainer"]["max_steps"]) == (2, 2), "as they were given"
    card = (run / "export" / "README.md").read_text()
    assert "what the first of its two fits has made" in card
    assert "weights updated by compensation" in card
    assert "5 steps, 160 tokens; the last 3 steps in a second fit" in card


def stopped_in_the_second(fit, monkeypatch, step: int, *more: str) -> None:
    """The second fit is cut short in one of its steps."""
    training_step = RotationModule.training_step

    def cut(module, batch, place):
        if module.init_weights is not None and module.trainer.global_step == step:
            raise KeyError("cut short")
        return training_step(module, batch, place)

    with monkeypatch.context() as here:
        here.setattr(RotationModule, "training_step", cut)
        with pytest.raises(KeyError, match="cut short"):
            fit(*BOTH, *CHECKPOINTS, *more)


def test_it_goes_on_wherever_it_was_stopped(fit, monkeypatch, capsys):
    run = fit(*BOTH, *CHECKPOINTS)[1]
    rotations, ppl = learned(run), rows_of(run)["rotpruner"]["ppl"]
    assert fit(*BOTH, *CHECKPOINTS)[0] == 0
    assert "is finished; remove it to run again" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(run)
    with monkeypatch.context() as here:
        here.setattr("rotpruner.oneshot.compensate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(*BOTH, *CHECKPOINTS)
    stopped_in_the_second(fit, monkeypatch, 2)
    assert (run / "first-fit" / "results.json").is_file()
    capsys.readouterr()
    monkeypatch.setattr("rotpruner.oneshot.compensate", lambda *_, **__: pytest.fail("the first fit is done"))
    assert fit(*BOTH, *CHECKPOINTS)[0] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "resuming from" in said
    assert "step 3 of 3" in said
    assert "step 2 of 3" not in said
    assert "remove it" not in said
    assert all(torch.equal(Q, rotations[space]) for space, Q in learned(run).items())
    assert rows_of(run)["rotpruner"]["ppl"] == ppl


@pytest.mark.parametrize("step", [0, 2])
def test_both_fits_take_the_same_batches(step, fit, monkeypatch, capsys):
    """That they may be dealt out otherwise: test_parallel.py."""
    stopped_in_the_second(fit, monkeypatch, step, "--data.batch_size", "2")
    assert fit(*BOTH, *CHECKPOINTS, "--data.batch_size", "1")[0] == 2
    assert "took 2 sequences at a time, and this one would take 1" in " ".join(capsys.readouterr().err.split())
    assert fit(*BOTH, *CHECKPOINTS, "--data.batch_size", "2")[0] == 0


def test_both_fits_have_the_dtype_that_the_first_ones_device_chose(fit, tmp_path, monkeypatch):
    chosen = ["--model.base_dtype", "auto"]
    with monkeypatch.context() as here:
        here.setattr("rotpruner.precision.fast_dtype", lambda device: torch.float64)
        here.setattr(RotationModule, "kept_weights", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(*BOTH, *chosen)
    (tmp_path / "run" / "config.yaml").unlink()  # as if it had been stopped before the second fit began
    monkeypatch.setattr("rotpruner.precision.fast_dtype", lambda device: torch.float32)
    status, run = fit(*BOTH, *chosen)
    assert status == 0
    for part in (run, run / "first-fit"):
        assert yaml.safe_load((part / "config.yaml").read_text())["model"]["base_dtype"] == "float64"


def test_a_directory_with_a_first_fit_is_not_begun_with_one_alone(fit, monkeypatch, capsys):
    with monkeypatch.context() as here:
        here.setattr("rotpruner.oneshot.compensate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(*BOTH)
    assert fit(*UPDATED)[0] == 2
    assert "has begun with the first of two fits" in " ".join(capsys.readouterr().err.split())


def test_a_report_draws_both(fit):
    _, run = fit(*BOTH, "--trainer.log_every_n_steps", "1")
    curves = read_curves(run)
    assert [step for step, _ in curves["train/loss"]] == [0, 1, 2, 3, 4]
    assert read_curves(run / "first-fit")["train/loss"] == curves["train/loss"][:2]


def test_one_run_of_wandb_does_not_hold_two_fits(fit, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2")
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True}}
    status, run = fit(*BOTH, "--trainer.logger", json.dumps(logger))
    refused(status, run, capsys, "WANDB_RUN_ID", "second_fit null")


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"--model.compensate": 0}, ["model.compensate is 0", "second_fit null"]),
        ({"--second_fit.steps": 0}, ["second_fit.steps 0"]),
        ({"--second_fit.lr_factor": -1}, ["second_fit.lr_factor -1"]),
        ({"--model.surrogate.name": "gumbel"}, ["second_fit", "surrogate gumbel"]),
        ({"--trainer.fast_dev_run": "true"}, ["fast_dev_run"]),
        ({"--trainer.callbacks": "[callbacks.repruning.Repruning]"}, ["callbacks.finish.Finish"]),
        ({"--second_fit.step": 3}, ["Option 'step' is not accepted"]),
        ({"--model.lr_scheduler": SCHEDULER}, ["model.lr_scheduler"]),
    ],
)
def test_a_second_fit_that_cannot_be_is_refused_before_anything_is_learned(changes, mentions, fit, tmp_path, capsys):
    status, run = fit(*BOTH, *(str(item) for pair in changes.items() for item in pair))
    refused(status, run, capsys, *mentions)


def test_rows_of_another_run_or_evaluation_do_not_stand_beside(fit, tmp_path, capsys):
    assert fit()[0] == 0
    first = (tmp_path / "run").rename(tmp_path / "first")
    before = ["--trainer.callbacks.init_args.first_fit", str(first)]
    going_on = ["--model.init_rotations", str(first / "rotations"), "--model.init_weights", str(first / "export")]
    for more, complaint in (
        (before, "set model.init_weights to its export"),
        (
            [*before, *going_on, "--trainer.callbacks.init_args.max_tokens", "512"],
            "each text), and this fit is to be on",
        ),
        ([before[0], str(tmp_path / "none"), *going_on], "holds no results of a fit"),
    ):
        capsys.readouterr()
        assert fit(*more)[0] == 2
        assert complaint in " ".join(capsys.readouterr().err.split())
    status, run = fit(*before, *going_on)
    assert status == 0
    assert "weights updated" not in (run / "export" / "README.md").read_text()
