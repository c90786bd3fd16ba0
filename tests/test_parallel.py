"""Several processes learn what one learns: the same statistics, masks and rotations, and the same run after a death."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from processes import SignalAt, recorded, start, start_ranks

STEPS = 10


@pytest.fixture
def config(tmp_path, model_directory, text_file) -> Path:
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
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {{class_path: callbacks.repruning.Repruning, init_args: {{every_n_steps: 3}}}}
    - {{class_path: callbacks.rotation_checkpoint.RotationCheckpoint, init_args: {{every_n_steps: 4}}}}
""")
    return path


def alone(config: Path, run: Path) -> list[str]:
    """The same run in one process: the same global batches."""
    place = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--data.batch_size", "4"]
    return ["-c", str(config), "--trainer.default_root_dir", str(run), *place]


def together(config: Path, run: Path) -> list[str]:
    return ["-c", str(config), "--trainer.default_root_dir", str(run)]


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if tensor.dtype == torch.bool:
            assert torch.equal(found[name], tensor), name
        else:
            assert (found[name] - tensor).abs().max() <= tolerance, name
            assert (tensor - torch.eye(tensor.shape[-1])).abs().max() > 0.01, "nothing was learned"


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_two_ranks_learn_what_one_process_learns(pruner, config, tmp_path):
    choice = ["--model.pruner", pruner]
    assert start([*alone(config, tmp_path / "one"), *choice], exact=True) == 0
    assert start_ranks([*together(config, tmp_path / "two"), *choice], exact=True) == [0, 0]
    first, second = (recorded(tmp_path / "two", rank) for rank in (0, 1))
    assert_alike(first, recorded(tmp_path / "one"), 1e-9)
    assert_alike(second, first, 0)


def test_a_run_goes_on_after_the_death_of_one_rank(config, tmp_path):
    assert start_ranks(together(config, tmp_path / "whole")) == [0, 0]
    arguments = together(config, tmp_path / "killed")
    killed = start_ranks(arguments, None, SignalAt(6, "on_before_optimizer_step"))
    assert killed[1] == -signal.SIGKILL
    assert killed[0] not in (0, -signal.SIGKILL), "the other rank must end by itself"
    assert start_ranks(arguments) == [0, 0]
    for rank in (0, 1):
        assert_alike(recorded(tmp_path / "killed", rank), recorded(tmp_path / "whole", rank), 0)
