"""Several processes learn what one learns: the same statistics, masks and rotations, and the same run after a death."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import SignalAt, command, recorded, start, start_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rotpruner.oneshot import sparsity_of

STEPS = 10


@pytest.fixture
def config(tmp_path, model_directory, text_file, test_text_file) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"""
model:
  model: {model_directory}
  base_dtype: float64
  optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.01}}}}
data: {{calibration: {text_file}, num_sequences: 9, seq_len: 32, batch_size: 2}}
trainer:
  max_steps: {STEPS}
  accelerator: cpu
  devices: 2
  strategy: ddp
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {{class_path: callbacks.repruning.Repruning, init_args: {{every_n_steps: 3}}}}
    - {{class_path: callbacks.rotation_checkpoint.RotationCheckpoint, init_args: {{every_n_steps: 4}}}}
    - class_path: callbacks.perplexity.Perplexity
      init_args: {{texts: [{test_text_file}], every_n_steps: 5, seq_len: 32, max_tokens: 160}}
""")
    return path


def alone(config: Path, run: Path) -> list[str]:
    """The same run in one process: the same global batches."""
    place = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--data.batch_size", "4"]
    return ["-c", str(config), "--trainer.default_root_dir", str(run), *place]


def together(config: Path, run: Path) -> list[str]:
    return ["-c", str(config), "--trainer.default_root_dir", str(run)]


def logged(run: Path) -> dict[str, list[float]]:
    """What the run has logged, by name, in order."""
    found: dict[str, list[float]] = {}
    with next(run.rglob("metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    found.setdefault(name, []).append(float(value))
    return found


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if tensor.dtype == torch.bool:
            assert torch.equal(found[name], tensor), name
        else:
            assert (found[name] - tensor).abs().max() <= tolerance, name
            assert (tensor - torch.eye(tensor.shape[-1])).abs().max() > 0.01, "nothing was learned"


@pytest.mark.parametrize("pruner", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_two_ranks_learn_what_one_process_learns(pruner, config, tmp_path):
    choice = ["--model.pruner", pruner]
    assert start([*alone(config, tmp_path / "one"), *choice], exact=True) == 0
    assert start_ranks([*together(config, tmp_path / "two"), *choice], exact=True) == [0, 0]
    first, second = (recorded(tmp_path / "two", rank) for rank in (0, 1))
    assert_alike(first, recorded(tmp_path / "one"), 1e-9)
    assert_alike(second, first, 0)
    losses, others = (logged(tmp_path / run) for run in ("one", "two"))
    assert len(losses["train/loss"]) == STEPS
    # Five windows of text for two ranks.
    assert len(set(losses["ppl/other_words"])) == 2
    for name, values in losses.items():
        assert others[name] == pytest.approx(values, rel=1e-6, abs=1e-12), name


def test_sigterm_to_one_rank_saves_and_ends_all_and_one_process_goes_on(config, tmp_path):
    assert start_ranks(together(config, tmp_path / "whole"), exact=True) == [0, 0]
    ended = start_ranks(
        together(config, tmp_path / "ended"),
        None,
        SignalAt(5, "on_before_optimizer_step", signal.SIGTERM),
        exact=True,
    )
    assert ended == [128 + signal.SIGTERM, 0]
    checkpoint = torch.load(tmp_path / "ended" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6, "the step that the signal came in is the last"
    # Other processes, the same global batch.
    assert start(alone(config, tmp_path / "ended"), exact=True) == 0
    assert_alike(recorded(tmp_path / "ended"), recorded(tmp_path / "whole"), 1e-9)


def test_batches_that_the_ranks_cannot_share_are_refused_by_all(config, tmp_path):
    arguments = ["fit", *together(config, tmp_path / "run"), "--data.batch_size", "5"]
    assert start_ranks(arguments, target=command) == [2, 2]
    assert not (tmp_path / "run" / "config.yaml").exists()


# -- the command line ------------------------------------------------------------------------------


def finishing(config: Path, test_text_file: Path, steps: int, run: Path) -> list[str]:
    """A config file that says all: two processes, where the run lives and how it ends."""
    text = config.read_text().replace(f"max_steps: {STEPS}", f"max_steps: {steps}\n  default_root_dir: {run}")
    finish = f"init_args: {{texts: [{test_text_file}], seq_len: 32, max_tokens: 256}}"
    text += f"    - class_path: callbacks.finish.Finish\n      {finish}\n"
    path = config.with_name("all.yaml")
    path.write_text(text.replace("float64", "float32"))
    return ["fit", "-c", str(path)]


def assert_finished(run: Path) -> None:
    rows = [row["name"] for row in json.loads((run / "results.json").read_text())["rows"]]
    assert rows == ["dense", "pruner", "random_rotation", "rotpruner"]
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert sparsity_of(exported) == 0.5


def test_a_config_file_alone_fits_on_two_ranks_and_goes_on_after_a_kill(config, test_text_file, tmp_path):
    run, steps = tmp_path / "run", 40

    def kill_second(processes):
        while not (run / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.005)
        os.kill(processes[1].pid, signal.SIGKILL)

    arguments = finishing(config, test_text_file, steps, run)
    killed = start_ranks(arguments, target=command, meanwhile=kill_second)
    assert killed[1] == -signal.SIGKILL
    assert killed[0] != 0
    assert not (run / "results.json").exists()
    assert start_ranks(arguments, target=command) == [0, 0]
    assert_finished(run)
    resumed = load_file(run / "rotations" / "rotations.safetensors")

    whole = finishing(config, test_text_file, steps, tmp_path / "whole")
    assert start_ranks(whole, target=command) == [0, 0]
    for space, Q in load_file(tmp_path / "whole" / "rotations" / "rotations.safetensors").items():
        assert torch.equal(resumed[space], Q), space


SMOLLM2 = """
data: {num_sequences: 4, seq_len: 128}
trainer:
  max_steps: 5
  devices: 2
  strategy: ddp
  default_root_dir: %s
  callbacks:
    - {class_path: callbacks.repruning.Repruning, init_args: {every_n_steps: 2}}
    - {class_path: callbacks.rotation_checkpoint.RotationCheckpoint, init_args: {every_n_steps: 1}}
    - {class_path: callbacks.finish.Finish, init_args: {texts: [wikipedia_test], seq_len: 128, max_tokens: 512}}
"""


@pytest.mark.slow
def test_smollm2_on_two_ranks_of_its_own_goes_on_after_a_kill(tmp_path):
    """The command starts its second process by itself."""
    run, config = tmp_path / "run", tmp_path / "two.yaml"
    config.write_text(SMOLLM2 % run)
    fit = [sys.executable, "-m", "experiments", "fit", "-c", "experiments/configs/quickstart.yaml", "-c", str(config)]
    with subprocess.Popen(fit) as first:
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert first.poll() is None
            time.sleep(0.01)
        (second,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(second), signal.SIGKILL)
    assert first.returncode != 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 5
    resumed = subprocess.run(fit, capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stderr
    assert_finished(run)
