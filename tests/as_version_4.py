"""Run by `test_version_4.py` under transformers 4, which is first on its path: what do exports compute there?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4."), transformers.__version__
for directory in map(Path, sys.argv[1:]):
    expected = load_file(directory / "expected" / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(input_ids=expected["ids"]).logits
    assert (logits - expected["logits"]).abs().max() < 1e-3, directory
    tokens = json.loads((directory / "expected" / "tokens.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert {text: tokenizer(text).input_ids for text in tokens} == tokens, directory
    assert tokenizer.additional_special_tokens == ["<|turn|>"], directory
    print(directory.name)
