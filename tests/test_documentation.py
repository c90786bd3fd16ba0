"""What README and documentation show runs as it stands, but for the size of the model."""

from __future__ import annotations

import torch
from code_blocks import in_small, python_blocks
from transformers import AutoModelForCausalLM

import rotpruner
from rotpruner.oneshot import sparsity_of


def run(blocks, model_directory) -> dict:
    namespace: dict = {}
    for block in blocks:
        exec(compile(in_small(block, model_directory), "documentation", "exec"), namespace)
    return namespace


def test_the_readmes_example_runs(model_directory, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text.txt").write_text(text_file.read_text())
    example, kept = python_blocks("README.md", "From Python")
    assert len(example.splitlines()) <= 10
    assert "steps=100)" in example
    keeping = example.replace("steps=100)", 'steps=100, rotations_directory="rotations")')
    found = run([keeping, kept], model_directory)
    pruned = AutoModelForCausalLM.from_pretrained("pruned")
    assert sparsity_of(pruned) == 0.5
    ids = found["tokenizer"](text_file.read_text(), return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        logits, expected = found["model"](ids).logits, rotpruner.load_model(str(model_directory))(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert set(found["rotations"]) == {"residual", "value_heads"}
