"""The configs for kinds of machines stack on those of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import fit_arguments
from processes import command, start_ranks

from experiments.__main__ import main

CONFIGS = Path("experiments/configs")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml")))
def test_a_large_models_config_runs_two_steps_on_every_machine(
    name, model_directory, text_file, test_text_file, tmp_path
):
    hardware = CONFIGS / "hardware" / f"{name}.yaml"
    trainer = yaml.safe_load(hardware.read_text())["trainer"]
    ranks = min(2, trainer["devices"])
    given = fit_arguments(model_directory, text_file, test_text_file, tmp_path / "run")
    few = ["--data.statistics_sequences", "4", "--model.compensate", "2"]
    few += ["--trainer.callbacks.init_args.controls", "[]"]
    arguments = ["fit", "-c", str(CONFIGS / "llama3-8b.yaml"), "-c", str(hardware), *given, *few]
    if ranks == 1:
        assert main(arguments) == 0
    else:
        shards = ["--trainer.strategy.init_args.data_parallel_size", "2"]
        place = ["--trainer.devices", "2", *(shards if trainer["strategy"] != "ddp" else [])]
        assert start_ranks([*arguments, *place], target=command, ranks=ranks) == [0, 0]
    ran = json.loads((tmp_path / "run" / "results.json").read_text())["config"]["trainer"]["strategy"]
    wanted = trainer.get("strategy", "auto")
    assert (ran["class_path"] == wanted["class_path"]) if isinstance(wanted, dict) else ran == wanted
