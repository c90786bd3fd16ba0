"""The wheel alone: it holds the core, and the README's example runs where nothing but its requirements is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from code_blocks import ROOT, in_small, python_blocks
from transformers import AutoModelForCausalLM

from rotpruner.measures import sparsity_of

pytestmark = pytest.mark.slow

ABSENT = ("lightning", "wandb", "datasets", "lm_eval", "jsonargparse", "torchmetrics", "experiments", "callbacks")


def shell(*command: str | Path, **settings) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_readmes_example_runs_from_the_wheel_alone(tmp_path, model_directory, text_file):
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    shell(sys.executable, *pip, *build, ROOT)
    (wheel,) = tmp_path.glob("rotpruner-*.whl")
    assert {Path(name).parts[0].split("-")[0] for name in zipfile.ZipFile(wheel).namelist()} == {"rotpruner"}

    shell(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    shell(python, *pip, "install", "--no-compile", "--constraint", ROOT / "constraints.txt", wheel)
    (tmp_path / "my_text.txt").write_text(text_file.read_text())
    example = in_small(python_blocks("README.md", "From Python")[0], model_directory)
    absent = f"import importlib.util\nassert not [name for name in {ABSENT} if importlib.util.find_spec(name)]\n"
    (tmp_path / "example.py").write_text(absent + example)
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    shell(python, "example.py", cwd=tmp_path, env=alone)
    assert sparsity_of(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")) == 0.5
