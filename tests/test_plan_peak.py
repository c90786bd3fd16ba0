"""The plan against what the kernel counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peak_memory import needs_linux
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.planning.memory import memory_plan
from experiments.planning.sizes import Setup
from rotpruner.loading import load_config
from rotpruner.precision import fast_dtype
from rotpruner.pruners import resolve_pruner


def measured(model: str, seq_len: int, steps: int, calibration: str, run: Path, **settings) -> dict[str, int]:
    """Peak resident bytes of a few steps, above what imports take, in a process that gives memory back at once."""
    trimmed = dict(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    data = dict(num_sequences=2, seq_len=seq_len, calibration=calibration)
    what = json.dumps({"model": {"model": model, **settings}, "data": data, "steps": steps})
    environment = {**os.environ, **trimmed, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "tests/peak_memory.py", str(run), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def planned(model: str, seq_len: int, steps: int, **settings) -> int:
    sizes = dict(seq_len=seq_len, steps=steps, num_sequences=2)
    dtype = fast_dtype(torch.device("cpu"))
    setup = Setup(load_config(model), resolve_pruner("wanda"), **sizes, dtype=dtype, device="cpu")
    return memory_plan(replace(setup, **settings)).learning


@needs_linux
@pytest.mark.slow
def test_the_plan_predicts_the_peak_of_smollm2(tmp_path):
    found = measured("smollm2-135m", 512, 2, "wikipedia_calibration", tmp_path)
    assert planned("smollm2-135m", 512, 2) == pytest.approx(found["peak"], rel=0.15)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("width", "checkpointing"), [(2048, False), (1024, True)])
def test_the_plan_predicts_the_peak_of_a_wide_model(width, checkpointing, tmp_path, tokenizer, text_file):
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=16000,
        max_position_embeddings=1024,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    del model
    path = str(tmp_path / "wide")
    found = measured(path, 256, 2, str(text_file), tmp_path, gradient_checkpointing=checkpointing)
    assert planned(path, 256, 2, gradient_checkpointing=checkpointing) == pytest.approx(found["peak"], rel=0.15)
