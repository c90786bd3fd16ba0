"""What a run directory keeps, refuses and takes up again."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch
import yaml
from command_line import learning_arguments

from callbacks.finish import Finish
from experiments.__main__ import main
from rotpruner.errors import InputError
from rotpruner.oneshot import prune_model


def test_a_fit_does_not_write_over_the_rotations_that_it_starts_from(fit, prune, capsys, tmp_path):
    _, run = fit()
    (tmp_path / "again").mkdir()
    shutil.move(run / "rotations", tmp_path / "again" / "rotations")
    more = ["--trainer.default_root_dir", str(tmp_path / "again")]
    assert fit(*more, "--model.init_rotations", str(tmp_path / "again" / "rotations"))[0] == 2
    assert "would be replaced by what it writes" in " ".join(capsys.readouterr().err.split())


def test_an_end_that_was_cut_short_goes_on_with_its_rows(fit, monkeypatch, tmp_path):
    def cut(*_):
        raise KeyError("cut short")

    with monkeypatch.context() as here:
        here.setattr("callbacks.finish.write_card", cut)
        here.setattr("callbacks.ending.commit", lambda: "where it began")
        with pytest.raises(KeyError, match="cut short"):
            fit("--trainer.callbacks+", "callbacks.rotation_checkpoint.RotationCheckpoint")
    kept = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "run" / "rows").iterdir()}
    assert set(kept) == {"dense", "pruner", "random_rotation", "rotpruner"}
    monkeypatch.setattr("callbacks.finish.prune_and_compensate", lambda *_, **__: pytest.fail("built again"))
    monkeypatch.setattr("callbacks.ending.commit", lambda: "where it goes on")
    status, run = fit("--trainer.callbacks+", "callbacks.rotation_checkpoint.RotationCheckpoint")
    assert status == 0
    assert {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]} == kept
    assert json.loads((run / "results.json").read_text())["commit"] == "where it began"
    assert "commit where it began" in (run / "export" / "README.md").read_text()


@pytest.mark.parametrize("offload", ["false", "true"])
def test_weights_that_have_served_are_gone_when_the_end_needs_memory(offload, fit, monkeypatch):
    gather, finish, held = Finish.gather, Finish.finish, []

    def watched(callback, module):
        tensors = (tensor for linear in module.rotated.linears for tensor in (linear.weight, linear.mask))
        held.extend(weakref.ref(tensor) for tensor in tensors)
        gather(callback, module)

    def checked(*given):
        gc.collect()
        assert len(held) == 28
        assert not any(reference() is not None for reference in held)
        finish(*given)

    monkeypatch.setattr(Finish, "gather", watched)
    monkeypatch.setattr(Finish, "finish", checked)
    assert fit("--model.gradient_checkpointing", "true", "--model.offload", offload)[0] == 0


def test_a_run_at_home_is_found_again(fit, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fit("--trainer.default_root_dir=~/mine")[0] == 0
    assert (tmp_path / "mine" / "results.json").is_file()
    assert fit("--trainer.default_root_dir=~/mine")[0] == 0
    assert "mine is finished" in " ".join(capsys.readouterr().err.split())


def test_a_control_that_cannot_be_made_does_not_cost_what_was_learned(fit, monkeypatch, capsys):
    def overflows(model, *arguments, rotations=None, moments=None, **settings):
        if moments is None:
            raise InputError("inputs overflow float16")
        return prune_model(model, *arguments, rotations=rotations, moments=moments, **settings)

    monkeypatch.setattr("rotpruner.oneshot.prune_model", overflows)
    status, run = fit()
    assert status == 0
    assert "pruner: inputs overflow float16" in capsys.readouterr().err
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "rotpruner"]
    assert (run / "export" / "model.safetensors").is_file()
    assert not (run / "rows").exists()


@pytest.mark.parametrize("late", [False, True])
def test_only_a_run_without_a_step_is_removed_when_its_input_is_refused(late, fit, monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise InputError("the cache is full")

    monkeypatch.setattr(
        "callbacks.finish.write_card" if late else "rotpruner.rotated_model.RotatedModel.calibrate", refuse
    )
    status, run = fit("--trainer.callbacks+", "callbacks.rotation_checkpoint.RotationCheckpoint")
    assert status == 2
    assert "the cache is full" in capsys.readouterr().err
    assert run.exists() is (run / "checkpoints" / "last.ckpt").is_file() is late


def test_a_run_keeps_the_dtype_that_its_first_device_chose(fit, monkeypatch):
    """One that goes on elsewhere, in another dtype, would end as neither of the two."""
    chosen = ["--model.base_dtype", "auto", "--trainer.callbacks+", "callbacks.rotation_checkpoint.RotationCheckpoint"]
    with monkeypatch.context() as here:
        here.setattr("rotpruner.precision.fast_dtype", lambda device: torch.float64)
        here.setattr("callbacks.finish.write_card", lambda *_: pytest.fail("cut short"))
        with pytest.raises(pytest.fail.Exception):
            fit(*chosen)
    monkeypatch.setattr("rotpruner.precision.fast_dtype", lambda device: torch.float32)
    status, run = fit(*chosen)
    assert status == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["base_dtype"] == "float64"
    assert json.loads((run / "results.json").read_text())["config"]["model"]["base_dtype"] == "float64"
    assert fit(*chosen, "--model.base_dtype", "float32")[0] == 2


def test_the_same_run_directory_may_be_spelled_otherwise(fit, tmp_path):
    assert fit()[0] == 0
    assert fit("--trainer.default_root_dir", f"{tmp_path}/../{tmp_path.name}/run/")[0] == 0


def test_a_run_that_would_replace_its_own_model_is_refused(fit, model_directory, capsys, tmp_path):
    shutil.copytree(model_directory, tmp_path / "run" / "export")
    assert fit("--model.model", str(tmp_path / "run" / "export"))[0] == 2
    assert "would be replaced" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_that_would_leave_nothing_behind_says_so(model_directory, text_file, tmp_path, capsys):
    settings = {"--trainer.max_steps": 1, "--trainer.callbacks": "callbacks.repruning.Repruning"}
    assert main(["fit", *learning_arguments(model_directory, text_file, tmp_path / "run", settings)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no callback of this run exports or evaluates anything" in said
    assert "no callback of this run lets it be resumed" in said


def test_what_is_seen_of_a_run_may_change_and_options_may_be_younger_than_it(fit, capsys):
    _, run = fit()
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["model"]["offload"], config["trainer"]["accumulate_grad_batches"]
    del config["trainer"]["callbacks"][-1]["init_args"]["first_fit"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert fit("--trainer.log_every_n_steps", "7", "--trainer.logger", "false")[0] == 0
    watched = ["--trainer.callbacks+", "callbacks.perplexity.Perplexity", "--trainer.callbacks.init_args.texts"]
    assert fit(*watched, "[more]")[0] == 0
    assert fit("--trainer.default_root_dir", "null")[0] == 2
    assert fit("--trainer.accumulate_grad_batches", "2")[0] == 2
    assert fit("--data.batch_size", "2")[0] == 2
    assert "took 1 sequences at a time, and this one would take 2" in " ".join(capsys.readouterr().err.split())
    two = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
    assert fit(*two)[0] == 2
    assert "this one would take 2" in " ".join(capsys.readouterr().err.split())
    assert fit("--trainer.devices", "auto", "--trainer.accelerator", "cpu")[0] == 0


def test_the_order_of_exceptions_belongs_to_a_run(fit, capsys):
    """Of two that match, the last one counts."""
    both = {"*.mlp.*": "2:4", "*.down_proj": 0.0}
    given = ["--model.pattern", "1:4", "--model.exceptions"]
    assert fit(*given, json.dumps(both))[0] == 0
    assert fit(*given, json.dumps(both))[0] == 0
    assert fit(*given, json.dumps(dict(reversed(both.items()))))[0] == 2
    assert "where model.exceptions[0] is" in " ".join(capsys.readouterr().err.split())
