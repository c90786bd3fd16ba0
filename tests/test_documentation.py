"""What README and documentation show runs as it stands, but for the size of the model."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from code_blocks import ROOT, in_small, python_blocks
from transformers import AutoModelForCausalLM

import rotpruner
from rotpruner.measures import sparsity_of

PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md") if python_blocks(str(page)))


def run(blocks, model_directory, **namespace) -> dict:
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


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_of_the_documentation_runs(page, model_directory, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rotpruner.families._FAMILIES", dict(rotpruner.families._FAMILIES))
    for name in ("my_text.txt", "other_text.txt"):
        (tmp_path / name).write_text(text_file.read_text())
    found = run(python_blocks(page), model_directory, rotpruner=rotpruner)
    if page == "docs/tutorial.md":
        assert len(found["losses"]) == 2
        assert [sparsity_of(found[name]) for name in ("control", "pruned", "again", "by_magnitude")] == [0.5] * 4
    if page == "docs/concepts/slicing.md":
        assert found["sliced"].config.hidden_size < found["model"].config.hidden_size
    if page == "docs/extending/pruner.md":
        assert sparsity_of(found["pruned"]) == 0.5


def test_every_file_that_is_named_exists():
    folders = "callbacks|datamodules|docs|experiments|lightning_modules|rotpruner|tests"
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        named = re.findall(rf"\b(?:{folders})/[\w./-]+\.(?:json|md|py|yaml)\b", page.read_text())
        assert not [name for name in named if not (ROOT / name).is_file()], page


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    for name in ("rotpruner.api.prune", "rotpruner.rotation_artifact.Rotations.push_to_hub"):
        assert f'id="{name}"' in reference
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)|<link[^>]* href="([^"]*)', page.read_text())
        assert not [address for pair in loaded for address in pair if address.startswith(("http", "//"))]
