"""Perplexities of models that many runs are compared with are measured once."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_llama

from datamodules.evaluation import perplexities


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(320, (200,), generator=generator) for name in ("here", "there")}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path))
    return tmp_path / "perplexity"


def measured(model, texts, seq_len=32, max_tokens=160):
    """The values, and the texts whose perplexity was computed for them."""
    seen = []

    def progress(windows, description):
        seen.append(description.removeprefix("perplexity on "))
        return windows

    return perplexities(model, texts, seq_len, max_tokens, progress, keep=True), seen


def test_a_second_call_measures_nothing_and_says_the_same(texts, cache):
    model = tiny_llama()
    expected = perplexities(model, texts, 32, 160, lambda windows, description: windows)
    assert measured(model, texts) == (expected, ["here", "there"])
    assert measured(model, texts) == (expected, [])
    assert measured(tiny_llama(), texts) == (expected, []), "the same weights in another object"
    assert len(list(cache.glob("*.json"))) == 2


def test_whatever_changes_the_value_is_measured_again(texts, cache):
    model = tiny_llama()
    measured(model, texts)
    assert measured(model, texts, seq_len=16)[1] == ["here", "there"]
    assert measured(model, texts, max_tokens=128)[1] == ["here", "there"]
    assert measured(model, {**texts, "here": texts["here"].flip(0)})[1] == ["here"]
    assert measured(tiny_llama(rms_norm_eps=1e-2), texts)[1] == ["here", "there"], "the same weights, another config"
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 5] += 1e-6
    assert measured(model, texts)[1] == ["here", "there"], "one weight"
    assert measured(model.double(), texts)[1] == ["here", "there"], "another dtype"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"perplexity": null}', '{"perplexity": "much"}'])
def test_what_is_damaged_is_measured_again(texts, cache, content):
    expected, _ = measured(tiny_llama(), texts)
    paths = list(cache.glob("*.json"))
    for path in paths:
        path.write_text(content)
    assert measured(tiny_llama(), texts) == (expected, ["here", "there"])
    assert all(json.loads(path.read_text())["perplexity"] in expected.values() for path in paths)
