"""A fit of two: rotations go on learning behind the weight update, by one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import refused
from safetensors.torch import load_file

from callbacks.finish import Finish
from rotpruner.layout import linear_modules
from rotpruner.loading import load_model
from rotpruner.patterns import parse_pattern

UPDATED = ["--model.compensate", "2", "--model.optimizer.lr", "0.01"]
BOTH = [*UPDATED, "--learn_on.steps", "3"]


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
    assert list(rows) == ["dense", "pruner", "random_rotation", "not_learned_on", "rotpruner"]
    assert {name: rows[name] for name in ("pruner", "random_rotation")} == {
        name: first[name] for name in ("pruner", "random_rotation")
    }
    assert rows["not_learned_on"] == {**first["rotpruner"], "name": "not_learned_on"}
    assert rows["rotpruner"]["seconds"] > first["rotpruner"]["seconds"]
    results = json.loads((run / "results.json").read_text())
    assert (results["budget"]["steps"], results["budget"]["training_tokens"]) == (5, 5 * 32)
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded == results["config"]
    assert recorded["learn_on"] == {"steps": 3, "lr_factor": 0.1}
    assert (recorded["model"]["compensate"], recorded["trainer"]["max_steps"]) == (2, 2), "as they were given"
    card = (run / "export" / "README.md").read_text()
    assert "before its rotations learned on" in card
    assert "learned on from" in card


def test_it_goes_on_wherever_it_was_stopped(fit, monkeypatch, capsys):
    def cut(*_):
        raise KeyError("cut short")

    checkpoints = ["--trainer.callbacks+", "callbacks.rotation_checkpoint.RotationCheckpoint"]
    expected = {space: Q.clone() for space, Q in learned(fit(*BOTH, *checkpoints)[1]).items()}
    run = fit(*BOTH, *checkpoints)[1]
    assert "is finished; remove it to run again" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(run)
    finish = Finish.finish

    def ends(callback, directory, *rest):
        return finish(callback, directory, *rest) if directory.name == "first-fit" else cut()

    for place, method in (("finish", cut), ("finish", ends)):
        with monkeypatch.context() as here:
            here.setattr(Finish, place, method)
            with pytest.raises(KeyError, match="cut short"):
                fit(*BOTH, *checkpoints)
    assert (run / "first-fit" / "results.json").is_file()
    monkeypatch.setattr("callbacks.finish.compensate", lambda *_, **__: pytest.fail("the first fit is done"))
    assert fit(*BOTH, *checkpoints)[0] == 0
    assert all(torch.equal(Q, expected[space]) for space, Q in learned(run).items())


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"--model.compensate": 0}, ["model.compensate is 0", "learn_on null"]),
        ({"--learn_on.steps": 0}, ["learn_on.steps 0"]),
        ({"--learn_on.lr_factor": -1}, ["learn_on.lr_factor -1"]),
        ({"--model.surrogate.name": "gumbel"}, ["learn_on", "surrogate gumbel"]),
        ({"--trainer.fast_dev_run": "true"}, ["fast_dev_run"]),
        ({"--trainer.callbacks": "[callbacks.repruning.Repruning]"}, ["callbacks.finish.Finish"]),
        ({"--learn_on.step": 3}, ["step"]),
    ],
)
def test_what_cannot_be_learned_on_is_refused_before_anything_is_learned(changes, mentions, fit, tmp_path, capsys):
    status, run = fit(*BOTH, *(str(item) for pair in changes.items() for item in pair))
    refused(status, run, capsys, *mentions)


def test_rows_of_another_evaluation_do_not_stand_beside(fit, tmp_path, capsys):
    assert fit()[0] == 0
    first = (tmp_path / "run").rename(tmp_path / "first")
    before = ["--trainer.callbacks.init_args.before"]
    longer = ["--trainer.callbacks.init_args.max_tokens", "512"]
    capsys.readouterr()
    status, run = fit(*before, str(first), *longer)
    assert status == 2
    assert "the first 256 tokens of each text), and this fit is" in " ".join(capsys.readouterr().err.split())
    status, run = fit(*before, str(tmp_path / "none"))
    refused(status, run, capsys, "holds no results of a fit")
