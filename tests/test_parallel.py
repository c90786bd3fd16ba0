"""Several processes learn what one learns: the same statistics, masks and rotations, and the same run after a death."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import (
    SignalAt,
    alone,
    assert_alike,
    assert_finished,
    command,
    fail_at_the_end,
    finishing,
    recorded,
    start,
    start_ranks,
    together,
)
from safetensors.torch import load_file

from experiments.__main__ import main


def logged(run: Path) -> dict[str, list[float]]:
    """What the run has logged, by name, in order."""
    found: dict[str, list[float]] = {}
    with next(run.rglob("metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    found.setdefault(name, []).append(float(value))
    return found


@pytest.mark.parametrize(
    ("pruner", "offload"), [("wanda", True), pytest.param("sparsegpt", False, marks=pytest.mark.slow)]
)
def test_two_ranks_learn_what_one_process_learns(pruner, offload, parallel_config, tmp_path):
    choice = ["--model.pruner", pruner, "--model.start", "permutation"]
    choice += ["--model.spaces", "[residual, value_heads, mlp]"]
    waiting = ["--model.gradient_checkpointing", "true", "--model.offload", "true"] if offload else []
    assert start([*alone(parallel_config, tmp_path / "one"), *choice], exact=True) == 0
    assert start_ranks([*together(parallel_config, tmp_path / "two"), *choice, *waiting], exact=True) == [0, 0]
    first, second = (recorded(tmp_path / "two", rank) for rank in (0, 1))
    assert_alike(first, recorded(tmp_path / "one"), 1e-9)
    assert_alike(second, first, 0)
    sent = (tmp_path / "two" / "sent-0").read_text()
    assert "rotations" in sent
    assert "mask" not in sent
    losses, others = (logged(tmp_path / run) for run in ("one", "two"))
    assert len(losses["train/loss"]) == 10
    # Five windows of text for two ranks.
    assert len(set(losses["ppl/other_words"])) == 2
    for name, values in losses.items():
        assert others[name] == pytest.approx(values, rel=1e-6, abs=1e-12), name


@pytest.mark.parametrize("name", ["gumbel", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_two_ranks_draw_and_anneal_like_one_process(name, parallel_config, tmp_path):
    choice = ["--model.surrogate", f"{{name: {name}, lr: 0.2}}"]
    assert start([*alone(parallel_config, tmp_path / "one"), *choice], exact=True) == 0
    assert start_ranks([*together(parallel_config, tmp_path / "two"), *choice], exact=True) == [0, 0]
    first, second = (recorded(tmp_path / "two", rank) for rank in (0, 1))
    assert_alike(first, recorded(tmp_path / "one"), 1e-7)
    assert_alike(second, first, 0)
    temperatures = logged(tmp_path / "two")["surrogate/temperature"]
    assert temperatures == pytest.approx([0.1 ** (step / 9) for step in range(10)])


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_and_ends_all_and_one_process_goes_on(parallel_config, tmp_path):
    assert start_ranks(together(parallel_config, tmp_path / "whole"), exact=True) == [0, 0]
    ended = start_ranks(
        together(parallel_config, tmp_path / "ended"),
        None,
        SignalAt(5, "on_before_optimizer_step", signal.SIGTERM),
        exact=True,
    )
    assert ended == [128 + signal.SIGTERM, 0]
    checkpoint = torch.load(tmp_path / "ended" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6, "the step that the signal came in is the last"
    # Other processes, the same global batch.
    assert start(alone(parallel_config, tmp_path / "ended"), exact=True) == 0
    assert_alike(recorded(tmp_path / "ended"), recorded(tmp_path / "whole"), 1e-9)


def test_a_rank_that_fails_in_work_of_its_own_ends_those_that_wait():
    assert start_ranks([], target=fail_at_the_end) == [1, 40]


def test_batches_that_the_ranks_cannot_share_are_refused_by_all(parallel_config, tmp_path):
    arguments = ["fit", *together(parallel_config, tmp_path / "run"), "--data.batch_size", "5"]
    assert start_ranks(arguments, target=command) == [2, 2]
    assert not (tmp_path / "run" / "config.yaml").exists()


def _number(path: Path) -> int:
    """Another one for each file that takes the place."""
    return path.stat().st_ino if path.exists() else 0


# -- the command line ------------------------------------------------------------------------------


def test_a_config_file_alone_fits_on_two_ranks_and_goes_on_after_a_kill(parallel_config, test_text_file, tmp_path):
    run, steps = tmp_path / "run", 16

    def kill(victim: int):
        def at_first_checkpoint(processes):
            known, deadline = _number(checkpoint), time.monotonic() + 120
            while _number(checkpoint) == known:
                assert time.monotonic() < deadline
                assert all(process.is_alive() for process in processes)
                time.sleep(0.005)
            os.kill(processes[victim].pid, signal.SIGKILL)

        return at_first_checkpoint

    checkpoint = run / "checkpoints" / "last.ckpt"
    arguments = finishing(parallel_config, test_text_file, steps, run)
    for victim in (1, 0):
        ended = start_ranks(arguments, target=command, meanwhile=kill(victim))
        assert ended[victim] == -signal.SIGKILL
        assert ended[1 - victim] == 1
    assert not (run / "results.json").exists()
    assert start_ranks(arguments, target=command) == [0, 0]
    assert_finished(run)
    resumed = load_file(run / "rotations" / "rotations.safetensors")

    unfinished = ["--trainer.max_steps", str(steps), "--model.base_dtype", "float32"]
    assert start_ranks([*together(parallel_config, tmp_path / "whole"), *unfinished]) == [0, 0]
    for space, Q in load_file(tmp_path / "whole" / "rotations" / "rotations.safetensors").items():
        assert torch.equal(resumed[space], Q), space


@pytest.mark.parametrize(
    "own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ranks of a launcher", "ranks of its own"]
)
def test_two_ranks_make_a_second_fit_after_the_update(own, parallel_config, test_text_file, tmp_path):
    """The second fit runs in the processes, and the process group, of the first."""

    def arguments(name: str) -> list[str]:
        both = ["--model.compensate", "2", "--second_fit.steps", "3", "--model.base_dtype", "float64"]
        return [*finishing(parallel_config, test_text_file, 4, tmp_path / name), *both]

    if own:
        fit = [sys.executable, "-m", "experiments", *arguments("two")]
        done = subprocess.run(
            fit, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
    else:
        assert start_ranks(arguments("two"), target=command) == [0, 0]
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--data.batch_size", "4"]
    assert main([*arguments("one"), *one]) == 0
    (tmp_path / "two" / "results.json").unlink()
    assert main([*arguments("two"), *one]) == 0, "the second fit goes on with other processes"
    for part in ("first-fit", "."):
        rotations = {
            name: load_file(tmp_path / name / part / "rotations" / "rotations.safetensors") for name in ("one", "two")
        }
        assert_alike(rotations["two"], rotations["one"], 1e-5)


SMOLLM2 = """
data: {num_sequences: 4, seq_len: 64}
trainer:
  max_steps: 2
  default_root_dir: %s
  enable_progress_bar: false
  callbacks:
    - {class_path: callbacks.repruning.Repruning, init_args: {every_n_steps: 1}}
    - {class_path: callbacks.rotation_checkpoint.RotationCheckpoint, init_args: {every_n_steps: 1}}
"""


@pytest.mark.slow
def test_smollm2_on_two_ranks_of_its_own_goes_on_after_a_kill(tmp_path):
    """The command starts its second process by itself; if that one is killed, it says so and ends."""

    def configs(name: str) -> tuple[Path, list[str]]:
        path, run = tmp_path / f"{name}.yaml", tmp_path / name
        path.write_text(SMOLLM2 % run)
        shipped = [f"experiments/configs/{shipped}.yaml" for shipped in ("quickstart", "hardware/2xcpu")]
        return run, [item for config in (*shipped, str(path)) for item in ("-c", config)]

    run, given = configs("run")
    fit = [sys.executable, "-m", "experiments", "fit", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said, subprocess.Popen(fit, stderr=said, env=environment) as first:
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert first.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.01)
        (second,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(second), signal.SIGKILL)
        first.wait(60)
    # Of itself, or by Lightning's observer if it was in the middle of something long.
    assert first.returncode in (1, -signal.SIGKILL)
    line = (tmp_path / "said").read_text().strip().splitlines()[-1]
    assert "another process of this run has ended" in line or f"{second} terminated with code -9" in line
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 2
    resumed = subprocess.run(fit, capture_output=True, text=True, timeout=200, env=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr

    whole, given = configs("whole")
    assert start_ranks(given) == [0, 0]
    found = load_file(run / "rotations" / "rotations.safetensors")
    for space, Q in load_file(whole / "rotations" / "rotations.safetensors").items():
        assert torch.equal(found[space], Q), space
        assert (Q - torch.eye(Q.shape[-1])).abs().max() > 1e-3, "nothing was learned"
