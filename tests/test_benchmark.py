"""The step benchmark on a tiny model: what it prints."""

from __future__ import annotations

import json

from experiments.__main__ import main


def test_step_benchmark_prints_its_parts(model_directory, text_file, capsys):
    arguments = f"--model {model_directory} --calibration {text_file} --seq_len 32 --repeats 2 --json".split()
    assert main(["benchmark", "step", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"ratio", "dense_seconds", "seconds", "parts", "peak_bytes", "dense_fp32_bytes"}
    assert sum(found["parts"].values()) == found["seconds"]
    assert found["ratio"] == found["seconds"] / found["dense_seconds"]
    assert main(["benchmark", "step", *arguments, "--learning_only", "--gradient_checkpointing"]) == 0
    assert "ratio" not in json.loads(capsys.readouterr().out)
    assert main(["benchmark", "flight"]) == 2
