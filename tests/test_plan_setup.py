"""The settings of a plan: read, checked and counted as a fit would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.torch_version import TorchVersion

from experiments.__main__ import main
from experiments.plan_setup import read_setup
from experiments.planning.memory import memory_plan
from rotpruner.loading import load_model
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import random_rotations

FINISH = ["--trainer.callbacks+", "callbacks.finish.Finish", "--trainer.callbacks.seq_len", "32"]
SHARDED = ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy", "--count", "2"]
ON_THE_MANIFOLD = ["--model.optimizer", "{class_path: rotpruner.optimizers.CayleySGD, init_args: {lr: 0.1}}"]


@pytest.mark.parametrize(
    ("options", "count", "steps"),
    [
        (["--trainer.max_steps", "100"], 1, 100),
        (["--trainer.max_epochs", "2"], 1, 6),
        (["--trainer.max_epochs", "2", "--trainer.max_steps", "100"], 1, 6),
        (["--trainer.max_epochs", "2", "--trainer.max_steps", "4"], 1, 4),
        (["--trainer.max_epochs", "2"], 3, 2),
    ],
)
def test_steps_are_those_of_whichever_limit_comes_first(options, count, steps, model_directory, text_file):
    given = ["--model.model", str(model_directory), "--data.calibration", str(text_file), "--data.seq_len", "32"]
    given += ["--data.num_sequences", "10", "--data.batch_size", "3"]
    assert read_setup([*given, *options], "h100-80gb", count)[0].steps == steps


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        (["--data.batch_size", "11"], "batch_size 11 is more than 10 sequences"),
        (["--data.batch_size", "6", "--count", "2"], "batch_size 6 on each of 2 ranks is more than 10"),
        (["--data.statistics_sequences", "11"], "statistics_sequences 11 is not between 1 and num_sequences 10"),
        (["--data.calibration", "nowhere.txt"], "nowhere.txt"),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], "no last step"),
        ([], "nothing says how long to learn"),
        (["--model.init_rotations", "nowhere"], "nowhere"),
        (["--model.compensate", "11"], "compensate 11 is more than the 10"),
        ([*FINISH, "--trainer.callbacks.controls", "[no_update]"], "no_update is rotpruner itself"),
        ([*FINISH, "--trainer.callbacks.texts", "[nowhere.txt]"], "nowhere.txt"),
        ([*FINISH, "--trainer.callbacks.seq_len", "4096"], "seq_len 4096"),
        ([*SHARDED, "--model.surrogate.name", "gumbel"], "gumbel learns masks"),
        ([*SHARDED, "--model.orthogonal_map", "manifold", *ON_THE_MANIFOLD], "CayleySGD moves whole matrices"),
    ],
)
def test_plan_refuses_the_data_that_a_fit_refuses(options, mention, model_directory, text_file, capsys):
    given = ["--model.model", str(model_directory), "--data.calibration", str(text_file), "--data.seq_len", "32"]
    assert main(["plan", *given, "--data.num_sequences", "10", *options]) == 2
    assert mention in capsys.readouterr().err


def test_shards_need_a_torch_that_can_leave_parameters_out(model_directory, text_file, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.1+cu124"))
    given = ["--model.model", str(model_directory), "--data.calibration", str(text_file), "--data.seq_len", "32"]
    assert main(["plan", *given, "--data.num_sequences", "10", "--trainer.max_steps", "2", *SHARDED]) == 2
    assert "torch 2.7 or newer, this is 2.6.1" in capsys.readouterr().err


def test_orders_of_features_are_reckoned_with(model_directory, text_file):
    given = ["--model.model", str(model_directory), "--data.calibration", str(text_file), "--data.seq_len", "32"]
    setup, _ = read_setup([*given, "--trainer.max_steps", "1"], "h100-80gb", 1)
    assert "orders of features" not in memory_plan(setup).phases
    (term,) = memory_plan(replace(setup, start="permutation")).phases["orders of features"]
    assert term.amount == 12 * 48 * 32 + 16 * 2 * (32 + 16 + 16 + 48 + 48) * 32


def test_given_rotations_need_no_orders_of_features(model_directory, tmp_path):
    """The shipped config starts from permutations, which learning that goes on leaves out."""
    given = [
        "-c",
        "experiments/configs/smollm2-135m.yaml",
        "--model.model",
        str(model_directory),
        "--data.seq_len",
        "32",
        "--trainer.callbacks",
        "[]",
        "--second_fit",
        "null",
    ]
    model = load_model(model_directory)
    drawn = random_rotations(model.config, ["residual", "value_heads", "mlp"], seed=0)
    Rotations.of(drawn, model).save_pretrained(tmp_path / "drawn")
    going_on = ["--model.init_rotations", str(tmp_path / "drawn")]
    (begun, _), (gone_on, _) = (read_setup([*given, *more], "cpu", 1) for more in ([], going_on))
    assert (begun.start, gone_on.start) == ("permutation", "identity")
    again = read_setup([*given, *going_on, "--model.init_weights", str(model_directory)], "cpu", 1)[0]
    held, once = ({term.name: term.amount for term in memory_plan(each).resident} for each in (again, gone_on))
    assert held.pop("teacher weights") == held["frozen weights"]
    assert held == once
