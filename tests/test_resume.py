"""A run that is killed anywhere and started again ends with the rotations of the run that was not."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import SignalAt, start
from safetensors.torch import load_file

from experiments.__main__ import main
from rotpruner.errors import InputError
from rotpruner.loading import load_model

STEPS = 12
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end")


@pytest.fixture
def config(tmp_path, model_directory, text_file) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"""
seed_everything: 3
model:
  model: {model_directory}
  spaces: [residual, value_heads, mlp]
  start: permutation
  surrogate: {{name: sr_ste}}
  optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.01}}}}
data: {{calibration: {text_file}, num_sequences: 10, seq_len: 32, batch_size: 2}}
trainer:
  max_steps: {STEPS}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  accumulate_grad_batches: 1
  callbacks:
    - {{class_path: callbacks.repruning.Repruning, init_args: {{every_n_steps: 5}}}}
    - {{class_path: callbacks.rotation_checkpoint.RotationCheckpoint, init_args: {{every_n_steps: 2}}}}
""")
    return path


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_end_bit_for_bit_alike(kills, config, tmp_path):
    whole = ["-c", str(config), "--trainer.default_root_dir", str(tmp_path / "whole")]
    assert start(whole) == 0
    expected = load_file(tmp_path / "whole" / "rotations" / "rotations.safetensors")

    chooser = random.Random(kills)
    per_run = 3
    for attempt in range(0, kills, per_run):
        run = tmp_path / f"killed-{attempt}"
        arguments = ["-c", str(config), "--trainer.default_root_dir", str(run)]
        for step in sorted(chooser.randrange(1, STEPS) for _ in range(min(per_run, kills - attempt))):
            assert start(arguments, SignalAt(step, chooser.choice(HOOKS))) == -signal.SIGKILL
        assert start(arguments) == 0
        found = load_file(run / "rotations" / "rotations.safetensors")
        for space, Q in expected.items():
            assert torch.equal(found[space], Q), f"{space} differs"
            rest = torch.eye(Q.shape[-1]) if Q.is_floating_point() else torch.arange(Q.shape[-1])
            assert not torch.equal(Q, rest.expand_as(Q)), "nothing was learned"


def test_a_pruner_that_draws_its_masks_goes_on_with_those_that_it_drew(config, tmp_path):
    """Killed after a checkpoint of step 8, whose masks are those of step 5."""
    config.write_text(config.read_text().replace("start: permutation", "start: random\n  pruner: processes.Drawing"))
    found = []
    for run, kills in (("whole", []), ("killed", [SignalAt(9, "on_before_optimizer_step")])):
        arguments = ["-c", str(config), "--trainer.default_root_dir", str(tmp_path / run)]
        assert [start(arguments, kill) for kill in kills] == [-signal.SIGKILL] * len(kills)
        assert start(arguments) == 0
        found.append(load_file(tmp_path / run / "rotations" / "rotations.safetensors"))
    for space, Q in found[0].items():
        assert torch.equal(found[1][space], Q), space


@pytest.mark.parametrize("name", ["gumbel", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_surrogates_that_anneal_go_on_bit_for_bit(name, config, tmp_path):
    config.write_text(config.read_text().replace("{name: sr_ste}", f"{{name: {name}, lr: 0.2}}"))
    states = []
    for run, kills in (("whole", []), ("killed", [SignalAt(7, "on_before_optimizer_step")])):
        arguments = ["-c", str(config), "--trainer.default_root_dir", str(tmp_path / run)]
        for kill in kills:
            assert start(arguments, kill) == -signal.SIGKILL
        assert start(arguments) == 0
        states.append(torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True))
    whole, resumed = states
    assert set(whole["state_dict"]) == set(resumed["state_dict"])
    for entry, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][entry], value), entry
    assert {entry.split(".")[1] for entry in whole["state_dict"]} >= (
        {"rotations", "relaxation"} if name == "gumbel" else {"rotations"}
    )
    logged = (tmp_path / "whole").rglob("metrics.csv")
    assert "surrogate/temperature" in next(logged).read_text().splitlines()[0]


def test_checkpoints_hold_no_base_weights_and_load_without_unpickling(config, tmp_path):
    assert start(["-c", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.split(".")[1] for name in checkpoint["state_dict"]} == {"rotations"}
    assert set(checkpoint["mask_rotations"]) == {"residual", "value_heads", "mlp"}
    assert {"rng_state", "optimizer_states", "lr_schedulers"} <= set(checkpoint)


def test_a_damaged_checkpoint_is_refused_by_name(config, tmp_path, capsys):
    arguments = ["-c", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]
    assert start(arguments, SignalAt(5, "on_train_batch_start")) == -signal.SIGKILL
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert main(["fit", *arguments]) == 2
    assert "last.ckpt' is damaged" in capsys.readouterr().err


class Marker:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("shards", [False, True])
def test_nothing_of_a_checkpoint_is_unpickled_by_the_command_line(shards, config, tmp_path, capsys):
    arguments = ["-c", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]
    assert start(arguments, SignalAt(5, "on_train_batch_start")) == -signal.SIGKILL
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.unlink()
    if shards:
        checkpoint.mkdir()
        (checkpoint / ".metadata").touch()
    torch.save({"state_dict": Marker(tmp_path / "mark")}, checkpoint / "meta.pt" if shards else checkpoint)
    assert main(["fit", *arguments]) == 2
    assert "last.ckpt' is damaged" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "mark").exists()


def test_a_model_in_a_bin_file_loads_without_unpickling(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    weights = load_model(model_directory).state_dict()
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    for name, weight in load_model(tmp_path / "bin").state_dict().items():
        assert torch.equal(weight, weights[name]), name
    torch.save({**weights, "more": Marker(tmp_path / "mark")}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load"):
        load_model(tmp_path / "bin")
    assert not (tmp_path / "mark").exists()


def test_same_seed_same_rotations_other_seed_others(config, tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = tmp_path / name
        arguments = [
            "-c",
            str(config),
            "--seed_everything",
            str(seed),
            "--trainer.default_root_dir",
            str(run),
        ]
        assert start([*arguments, "--trainer.max_steps", "3"]) == 0
        found.append(load_file(run / "rotations" / "rotations.safetensors")["residual"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
