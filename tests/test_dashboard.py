"""The dashboard: an offline wandb run, read back from its file; sweeps that wandb's agent would start."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import learning_arguments
from PIL import Image
from processes import SignalAt, start
from wandb_file import OfflineRun

from callbacks.dashboard import Dashboard, without_secrets
from experiments.__main__ import main
from experiments.fit import FitCLI
from experiments.plan_setup import PlanCLI
from rotpruner.errors import InputError

SWEEPS = sorted(Path("experiments/sweeps/wandb").glob("*.yaml"))
SECRETS = {"WANDB_API_KEY": "5ec4e7" * 6 + "abcd", "HF_TOKEN": "hf_thisMustNotBeLogged", "HARMLESS": "but-not-logged"}


@pytest.fixture
def settings(model_directory, text_file, test_text_file, tmp_path):
    """A fit of six steps with a dashboard, and its run directory."""
    finish = {"texts": [str(test_text_file)], "seq_len": 32, "max_tokens": 256}
    callbacks = [
        {"class_path": "callbacks.repruning.Repruning", "init_args": {"every_n_steps": 2}},
        {
            "class_path": "callbacks.perplexity.Perplexity",
            "init_args": {**finish, "every_n_steps": 3, "max_tokens": 64},
        },
        {"class_path": "callbacks.finish.Finish", "init_args": finish},
    ]
    config = tmp_path / "fit.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "enable_model_summary": False}}))
    overlay = tmp_path / "often.yaml"
    text = Path("experiments/configs/logging/wandb.yaml").read_text().replace("every_n_steps: 25}", "every_n_steps: 3}")
    overlay.write_text(text)
    six_steps = {"--trainer.max_steps": 6, "--trainer.log_every_n_steps": 1}
    given = learning_arguments(model_directory, text_file, tmp_path / "run", six_steps)
    return ["-c", str(config), "-c", str(overlay), *given], tmp_path / "run"


def documented_keys() -> set[str]:
    """The keys that the panels of the documented report read; words in capitals stand for names."""
    section = Path("docs/concepts/reports.md").read_text().split("## A layout of a wandb report")[1].split("\n## ")[0]
    return {key for row in re.findall(r"^\|.*\|$", section, re.M) for key in re.findall(r"`([^`]+)`", row)}


def test_an_offline_run_holds_metrics_tables_and_pictures_and_no_secrets(settings):
    arguments, run = settings
    # Not the wandb service of this process, should an earlier test have started one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**own, **SECRETS, "WANDB_SILENT": "true", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments", "fit", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (directory,) = (run / "wandb").glob("offline-run-*")
    found = OfflineRun(directory)

    assert found.config["model"]["pattern"] == "2:4"
    assert found.config["trainer"]["max_steps"] == 6
    assert len(found.values("train/loss")) == 6
    assert all(math.isfinite(value) and value > 0 for value in found.values("train/loss"))
    assert all(value > 0 for value in found.values("throughput/tokens_per_second"))
    assert all(0 <= value < 1e-5 for value in found.values("rotations/orthogonality_error"))
    assert len(set(found.values("ppl/other_words"))) == 2
    for block in ("block_00", "block_01"):
        assert len(found.values(f"kept_mass/{block}")) == 2
        assert all(0.5 < value < 1 for value in found.values(f"kept_mass/{block}"))
        assert all(0 <= value < 0.5 for value in found.values(f"flips/{block}"))
    assert max(found.values("flips/block_00")) > 0

    rows = json.loads((run / "results.json").read_text())["rows"]
    assert found.values("results/rotpruner/other_words") == [pytest.approx(rows[3]["ppl"]["other_words"])]
    results = found.table("results")
    assert results["columns"][-1] == "gap"
    assert [row[0] for row in results["data"]] == ["dense", "pruner", "random_rotation", "rotpruner"]
    assert results["data"][0][-1] == 0
    sparsity = found.table("sparsity")
    assert len(sparsity["data"]) == 14
    assert {row[sparsity["columns"].index("sparsity")] for row in sparsity["data"]} == {0.5}
    assert len(found.table("layers")["data"]) == 14
    for space, size in (("residual", 32), ("value_heads", 8)):
        image = Image.open(found.picture(f"rotations/{space}"))
        assert image.size == (size, size)
        levels = [image.convert("L").getpixel((column, 0)) for column in range(size)]
        assert levels[0] == max(levels) > 250, "near the identity, the diagonal is brightest"
        assert 0 < max(levels[1:]) < 250

    names = {name.removesuffix("._type") for row in found.history for name in row}
    documented = documented_keys()
    assert len(documented) > 12
    for key in documented:
        assert fnmatch.filter(names, re.sub("[A-Z]{2,}", "*", key)), f"no run logs {key}"

    written = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    for name, secret in SECRETS.items():
        assert not any(secret.encode() in content for content in written), name


def test_a_resumed_run_goes_on_with_its_run_of_wandb(settings, monkeypatch):
    arguments, run = settings
    monkeypatch.setenv("WANDB_SILENT", "true")
    checkpoint = {"class_path": "callbacks.rotation_checkpoint.RotationCheckpoint", "init_args": {"every_n_steps": 2}}
    arguments = [*arguments, "--trainer.callbacks+", json.dumps(checkpoint)]
    assert start(arguments, SignalAt(4, "on_train_batch_start")) == -signal.SIGKILL
    assert start(arguments) == 0
    parts = sorted((run / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    (recorded,) = {part.name.split("-")[-1] for part in parts}
    assert OfflineRun(parts[1]).values("trainer/global_step")[0] == 4

    again = run.with_name("again")  # as the report says to make it once more
    config = ["-c", str(run / "config.yaml"), "--trainer.default_root_dir", str(again)]
    assert start(config) == 0
    (other,) = (again / "wandb").glob("offline-run-*")
    assert other.name.split("-")[-1] != recorded


def test_a_run_that_an_agent_of_wandb_names_gets_no_other_name(settings, monkeypatch):
    arguments, _ = settings
    assert FitCLI(arguments).wandb_id
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2")
    assert FitCLI(arguments).wandb_id is None


def test_two_fits_of_one_command_are_two_runs_of_wandb(settings, monkeypatch):
    arguments, run = settings
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert start([*arguments, "--model.compensate", "2", "--second_fit.steps", "3"]) == 0
    (first,), (second,) = (sorted((part / "wandb").glob("offline-run-*")) for part in (run / "first-fit", run))
    assert first.name.split("-")[-1] != second.name.split("-")[-1]
    assert [OfflineRun(part).values("trainer/global_step")[-1] for part in (first, second)] == [6, 3]


def test_secrets_are_left_out_of_the_settings():
    config = {
        "trainer": {"logger": [{"init_args": {"api_key": "abc", "project": "p"}}]},
        "HF_TOKEN": "x",
        "max_tokens": 65536,
    }
    shown = without_secrets(config)
    assert shown == {
        "trainer": {"logger": [{"init_args": {"api_key": "(not logged)", "project": "p"}}]},
        "HF_TOKEN": "(not logged)",
        "max_tokens": 65536,
    }


def test_a_dashboard_without_wandb_is_refused_in_one_line(settings, capsys):
    arguments, run = settings
    assert main(["fit", *arguments, "--trainer.logger", "null"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "WandbLogger" in line
    assert not run.exists()
    with pytest.raises(InputError, match="every_n_steps 0"):
        Dashboard(0)


def test_a_dashboard_that_would_see_no_results_is_refused(settings, capsys):
    arguments, run = settings
    other = [{"class_path": f"callbacks.{name}"} for name in ("dashboard.Dashboard", "finish.Finish")]
    assert main(["fit", *arguments, "--trainer.callbacks", json.dumps(other)]) == 2
    assert "Dashboard stands before Finish" in capsys.readouterr().err
    assert not run.exists()


def agent_command(sweep: dict, choice: dict) -> list[str]:
    """What wandb's agent runs for one choice of parameters, by its own code."""
    from wandb.sdk.launch.sweeps import utils

    variables = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in choice.items()}})
    found = []
    for part in utils.create_sweep_command(sweep["command"]):
        found += variables[part[2:-1]] if part.startswith("${") else [part]
    return found


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_start_fits(path, tmp_path):
    """The command is run as the agent would; a stand-in for `python` writes down what it was asked for."""
    sweep = yaml.safe_load(path.read_text())
    assert {"program", "method", "metric", "parameters", "command"} <= set(sweep)
    assert sweep["method"] in ("grid", "random", "bayes")
    choices = [
        {
            name: space["values"][end] if "values" in space else space["max"]
            for name, space in sweep["parameters"].items()
        }
        for end in (0, -1)
    ]
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$ASKED"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "a1b2"}
    for choice in choices:
        subprocess.run(agent_command(sweep, choice), env={**environment, "ASKED": str(tmp_path / "asked")}, check=True)
        module, name, command, *arguments = (tmp_path / "asked").read_text().splitlines()
        assert (module, name, command) == ("-m", "experiments", "fit")
        config = PlanCLI(arguments).config
        assert config.trainer.default_root_dir == "runs/sweeps/a1b2"
        callbacks = {each.class_path.split(".")[-1]: each.get("init_args") for each in config.trainer.callbacks}
        assert list(callbacks)[-1] == "Dashboard"
        assert callbacks["Finish"].controls == []
        watched, tested = set(callbacks["Perplexity"].texts), set(callbacks["Finish"].texts)
        assert sweep["metric"]["name"] in {f"ppl/{text}" for text in watched}
        assert not watched & {*tested, config.data.calibration}, "settings are not chosen by the texts of results"
        assert not config.trainer.logger.init_args.offline
        for parameter, value in choice.items():
            assert config[parameter] == value
