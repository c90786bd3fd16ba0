"""FSDP2: weights are spread over the ranks, and nothing else changes."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import (
    SignalAt,
    alone,
    assert_alike,
    assert_finished,
    command,
    finishing,
    recorded,
    start,
    start_ranks,
    together,
)
from wandb_file import OfflineRun

STRATEGY = """
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: %s}"""


def sharded(config: Path, files: bool) -> Path:
    """The same run on shards, its checkpoints a directory of `files` or one file."""
    path = config.with_name(f"sharded-{files}.yaml")
    path.write_text(config.read_text().replace("\n  strategy: ddp", STRATEGY % str(files).lower()))
    return path


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_shards_learn_what_one_process_learns(checkpointing, parallel_config, tmp_path):
    choice = ["--model.gradient_checkpointing", str(checkpointing)]
    assert start([*alone(parallel_config, tmp_path / "one"), *choice], exact=True) == 0
    assert start_ranks([*together(sharded(parallel_config, False), tmp_path / "two"), *choice], exact=True) == [0, 0]
    first, second = (recorded(tmp_path / "two", rank) for rank in (0, 1))
    assert_alike(first, recorded(tmp_path / "one"), 1e-9)
    assert_alike(second, first, 0)
    assert [(tmp_path / "two" / f"held-{rank}").read_text() for rank in (0, 1)] == ["0.5", "0.5"]
    assert (tmp_path / "one" / "held-0").read_text() == "1.0"


def test_a_dashboard_shows_of_shards_what_it_shows_of_one_process(parallel_config, tmp_path):
    overlay = tmp_path / "wandb.yaml"
    text = Path("experiments/configs/logging/wandb.yaml").read_text().replace("every_n_steps: 25", "every_n_steps: 4")
    overlay.write_text(text)
    found = []
    for name, runs in (("one", alone(parallel_config, tmp_path / "one")),
                       ("two", together(sharded(parallel_config, False), tmp_path / "two"))):  # fmt: skip
        log = ["-c", str(overlay), "--trainer.logger.init_args.save_dir", str(tmp_path / name)]
        ranks = 1 if name == "one" else 2
        assert start_ranks([*runs[:2], *log, *runs[2:]], ranks=ranks, exact=True) == [0] * ranks
        (directory,) = (tmp_path / name / "wandb").glob("offline-run-*")
        found.append(OfflineRun(directory))
    one, two = found
    for name in ("kept_mass/block_00", "kept_mass/block_01", "rotations/orthogonality_error"):
        assert len(one.values(name)) >= 2
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-9, abs=1e-12), name
    first, second = (run.table("sparsity")["data"] for run in found)
    for row, other in zip(first, second, strict=True):
        assert other[:-1] == row[:-1]
        assert other[-1] == pytest.approx(row[-1], rel=1e-9)


@pytest.mark.slow
def test_sigmoid_learns_on_shards_what_it_learns_on_one_process(parallel_config, tmp_path):
    choice = ["--model.surrogate.name", "sigmoid"]
    assert start([*alone(parallel_config, tmp_path / "one"), *choice], exact=True) == 0
    assert start_ranks([*together(sharded(parallel_config, False), tmp_path / "two"), *choice], exact=True) == [0, 0]
    assert_alike(recorded(tmp_path / "two"), recorded(tmp_path / "one"), 1e-7)


@pytest.mark.parametrize(
    "choice",
    [
        ["--model.surrogate.name", "gumbel"],
        ["--model.offload", "true", "--model.gradient_checkpointing", "true"],
        ["--model.orthogonal_map", "manifold", "--model.optimizer", "{class_path: rotpruner.optimizers.CayleySGD}"],
    ],
    ids=["masks that learn", "offload", "points of the manifold"],
)
def test_what_cannot_be_sharded_is_refused(choice, parallel_config, tmp_path):
    arguments = together(sharded(parallel_config, False), tmp_path / "run")
    assert start_ranks(["fit", *arguments, *choice], target=command) == [2, 2]
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("files", [False, True])
def test_checkpoints_go_on_under_any_number_of_ranks(files, parallel_config, tmp_path):
    parallel_config.write_text(parallel_config.read_text().replace("float64", "float32"))
    two = sharded(parallel_config, files)
    assert start_ranks(together(two, tmp_path / "whole")) == [0, 0]
    arguments = together(two, tmp_path / "ended")
    ended = start_ranks(arguments, None, SignalAt(5, "on_before_optimizer_step", signal.SIGTERM))
    assert ended == [128 + signal.SIGTERM, 0]
    checkpoint = tmp_path / "ended" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_dir() == files
    if not files:
        names = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert {name.split(".")[1] for name in names} == {"rotations"}
    shutil.copytree(tmp_path / "ended", tmp_path / "saved")

    def back() -> None:
        shutil.rmtree(tmp_path / "ended")
        shutil.copytree(tmp_path / "saved", tmp_path / "ended")

    assert start_ranks(arguments) == [0, 0]
    assert_alike(recorded(tmp_path / "ended"), recorded(tmp_path / "whole"), 0)
    back()
    place = ["--trainer.devices", "1", "--trainer.strategy.init_args.data_parallel_size", "1", "--data.batch_size", "4"]
    assert start_ranks([*arguments, *place], ranks=1) == [0]
    assert_alike(recorded(tmp_path / "ended"), recorded(tmp_path / "whole"), 1e-4)
    if files:
        back()
        assert start_ranks(["fit", *alone(parallel_config, tmp_path / "ended")], target=command, ranks=1) == [2]

    shutil.rmtree(tmp_path / "ended")
    ending = SignalAt(5, "on_before_optimizer_step", signal.SIGTERM)
    assert start_ranks([*arguments, *place], ending, ranks=1) == [128 + signal.SIGTERM]
    assert start_ranks(arguments) == [0, 0]
    assert_alike(recorded(tmp_path / "ended"), recorded(tmp_path / "whole"), 1e-4)


def test_a_sharded_fit_is_resumed_and_exported_as_a_plain_checkpoint(parallel_config, test_text_file, tmp_path):
    run = tmp_path / "run"
    arguments = finishing(sharded(parallel_config, True), test_text_file, 10, run)
    Path(arguments[-1]).write_text(
        Path(arguments[-1]).read_text()
        + f"    - {{class_path: processes.DieOnce, init_args: {{step: 6, mark: {tmp_path / 'died'}}}}}\n"
    )
    assert -signal.SIGKILL in start_ranks(arguments, target=command)
    assert start_ranks(arguments, target=command) == [0, 0]
    assert_finished(run)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "fsdp"])
def test_a_checkpoint_file_goes_on_under_the_other_strategy(first, parallel_config, tmp_path):
    parallel_config.write_text(parallel_config.read_text().replace("float64", "float32"))
    before, after = (parallel_config, sharded(parallel_config, False))[:: 1 if first == "ddp" else -1]
    assert start_ranks(together(before, tmp_path / "whole")) == [0, 0]
    ending = SignalAt(5, "on_before_optimizer_step", signal.SIGTERM)
    assert start_ranks(together(before, tmp_path / "run"), None, ending) == [128 + signal.SIGTERM, 0]
    assert start_ranks(together(after, tmp_path / "run")) == [0, 0]
    assert_alike(recorded(tmp_path / "run"), recorded(tmp_path / "whole"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_accumulated_gradients_are_those_of_one_process(strategy, parallel_config, tmp_path):
    choice = ["--trainer.accumulate_grad_batches", "2", "--model.spaces", "[value_heads, query_key]"]
    assert start([*alone(parallel_config, tmp_path / "one"), *choice], exact=True) == 0
    two = parallel_config if strategy == "ddp" else sharded(parallel_config, False)
    assert start_ranks([*together(two, tmp_path / "two"), *choice], exact=True) == [0, 0]
    assert_alike(recorded(tmp_path / "two"), recorded(tmp_path / "one"), 1e-9)
