"""Texts become tokens without additions; perplexities of models that many runs are compared with are measured once."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import tiny_llama
from perplexity_oracle import independent_perplexity
from tokenizers.processors import TemplateProcessing

import rotpruner
from datamodules.evaluation import perplexities, text_windows, token_ids
from datamodules.tokens import calibration_tokens
from rotpruner.progress import unseen


@pytest.fixture
def adding(tokenizer):
    """A tokenizer that puts a token before every text if it may, as LLaMA's do."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": "<s>"})
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    assert own("a model").input_ids[0] == own.bos_token_id
    return own


def test_no_special_token_is_added(adding, text_file, test_text_file):
    assert adding.bos_token_id not in token_ids(str(test_text_file), adding)
    sizes = dict(num_sequences=8, seq_len=32, seed=0, tokenizer_name="adding")
    assert adding.bos_token_id not in calibration_tokens(str(text_file), adding, **sizes)
    model = tiny_llama(vocab_size=len(adding))
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    rotpruner.prune(model, adding, [text_file.read_text()], rotate="none", num_sequences=4, seq_len=32)
    assert seen
    assert not any((ids == adding.bos_token_id).any() for ids in seen)


def test_two_texts_of_one_name_are_refused(tokenizer, text_file, tmp_path):
    other = tmp_path / text_file.name
    other.write_text(text_file.read_text())
    with pytest.raises(rotpruner.InputError, match="two texts are called 'words'"):
        text_windows([str(text_file), str(other)], tokenizer, 32, None)


def test_values_are_those_of_the_definition(tokenizer, test_text_file, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = text_windows([str(test_text_file)], tokenizer, 32, 256)
    (found,) = perplexities(model, texts, unseen).values()
    assert found == pytest.approx(independent_perplexity(tmp_path / "model", test_text_file.read_text(), 32, 256), 1e-6)


def test_a_cache_that_cannot_be_written_ends_nothing(texts, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / "file"))
    assert measured(tiny_llama(), texts)[1] == ["here", "there"]
    assert "is not kept" in caplog.text


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(320, (5, 32), generator=generator) for name in ("here", "there")}


def measured(model, texts):
    """The values, and the texts whose perplexity was computed for them."""
    seen = []

    def progress(windows, description):
        seen.append(description.removeprefix("perplexity on "))
        return windows

    return perplexities(model, texts, progress, keep=True), seen


def test_a_second_call_measures_nothing_and_says_the_same(texts, cache):
    model = tiny_llama()
    expected = perplexities(model, texts, unseen)
    assert measured(model, texts) == (expected, ["here", "there"])
    assert measured(model, texts) == (expected, [])
    assert measured(tiny_llama(), texts) == (expected, []), "the same weights in another object"
    assert len(list((cache / "perplexity").glob("*.json"))) == 2


def test_whatever_changes_the_value_is_measured_again(texts, cache):
    model = tiny_llama()
    measured(model, texts)
    assert measured(model, {name: cut.view(10, 16) for name, cut in texts.items()})[1] == ["here", "there"]
    assert measured(model, {name: cut[:4] for name, cut in texts.items()})[1] == ["here", "there"]
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
    paths = list((cache / "perplexity").glob("*.json"))
    for path in paths:
        path.write_text(content)
    assert measured(tiny_llama(), texts) == (expected, ["here", "there"])
    assert all(json.loads(path.read_text())["perplexity"] in expected.values() for path in paths)
