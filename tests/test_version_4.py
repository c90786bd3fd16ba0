"""Exports are read by transformers 4 as by 5: programs that bring version 4 along are many."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import MODELS, tiny

from rotpruner.artifacts import save_model, write_json
from rotpruner.families import available_spaces
from rotpruner.rotations import merge_rotations, random_rotations

VERSION_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
ROPE = {"rope_type": "default", "rope_theta": 5e5}  # not the default of any family


@pytest.fixture(scope="module")
def version_4(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("version-4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory), *VERSION_4]
    subprocess.run(pip, check=True)
    return directory


@pytest.mark.slow
@torch.no_grad()
def test_every_family_computes_the_same_under_transformers_4(version_4, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    ids = torch.arange(24)[None]
    for name, (kind, settings, _) in MODELS.items():
        own = kind in ("OPT", "Gemma3") or "rope_parameters" in settings
        model = tiny(name, vocab_size=321, **({} if own else {"rope_parameters": ROPE}))
        merge_rotations(model, random_rotations(model.config, available_spaces(model.config), 0))
        directory = tmp_path / name.replace(", ", "-").replace(" ", "-")
        save_model(model, tokenizer, directory)
        (directory / "expected").mkdir()
        save_file({"ids": ids, "logits": model(input_ids=ids).logits}, directory / "expected" / "logits.safetensors")
        tokens = {text: tokenizer(text).input_ids for text in ("the model", "learns a<|turn|> basis")}
        write_json(tokens, directory / "expected" / "tokens.json")
    program = Path(__file__).with_name("as_version_4.py")
    finished = subprocess.run(
        [sys.executable, str(program), *map(str, sorted(tmp_path.iterdir()))],
        env={**os.environ, "PYTHONPATH": str(version_4)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert len(finished.stdout.splitlines()) == len(MODELS)
