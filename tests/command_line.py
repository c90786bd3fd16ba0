"""Arguments that work for a fit of a tiny model, and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def learning_arguments(model_directory, text_file, run, more: Mapping[str, Any]) -> list[str]:
    tiny = {
        "--model.model": model_directory,
        "--model.base_dtype": "float32",
        "--data.calibration": text_file,
        "--data.num_sequences": 4,
        "--data.seq_len": 32,
        "--trainer.accelerator": "cpu",
        "--trainer.default_root_dir": run,
        **more,
    }
    return [str(item) for pair in tiny.items() for item in pair]


def fit_arguments(model_directory, text_file, test_text_file, run) -> list[str]:
    measured = {
        "--trainer.max_steps": 2,
        "--trainer.callbacks.init_args.texts": f"[{test_text_file}]",
        "--trainer.callbacks.init_args.seq_len": 32,
        "--trainer.callbacks.init_args.max_tokens": 256,
    }
    return learning_arguments(model_directory, text_file, run, measured)


def refused(status: int, written: Path, capsys, *mentions: str) -> None:
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert all(mention in lines[0] for mention in mentions), lines[0]
    assert not written.exists()
