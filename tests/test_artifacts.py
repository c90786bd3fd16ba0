"""Directories that appear whole or not at all; checkpoints that other programs read."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODELS, tiny
from transformers import AutoConfig, AutoTokenizer

from rotpruner.artifacts import check_new_directory, from_json, new_directory, save_model, to_json, write_text
from rotpruner.errors import InputError

NUMBERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["2:4", "infinity", "nan", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(NUMBERS)
def test_strict_readers_take_any_numbers_and_ours_give_them_back(value):
    text = to_json(value)
    json.loads(text, parse_constant=pytest.fail)
    assert repr(from_json(text)) == repr(value)  # NaN is not equal to itself


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "export"
    for content in ("old", "new"):
        with new_directory(target, replace=True) as scratch:
            (scratch / "file").write_text(content)
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755, "others may read it"


def test_what_was_there_stays_if_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    target = tmp_path / "export"
    target.mkdir()
    (target / "file").write_text("old")
    renamed, original = [], os.replace

    def fails_at_the_second(source, destination):
        renamed.append(source)
        if len(renamed) == 2:
            raise OSError("no")
        original(source, destination)

    monkeypatch.setattr(os, "replace", fails_at_the_second)
    with pytest.raises(OSError, match="no"), new_directory(target, replace=True) as scratch:
        (scratch / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_and_what_it_leads_to_is_made(there, tmp_path):
    (tmp_path / "other").mkdir()
    target = tmp_path / "other" / "model"
    if there:
        target.mkdir()
    (tmp_path / "link").symlink_to(target)
    with new_directory(tmp_path / "link") as scratch:
        assert scratch.parent == target.parent, "on the disk that the link leads to"
        (scratch / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (target / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"other", "link"}


def test_places_that_nothing_can_take_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, mention in ((".", "current directory"), ("/", "mount point"), ("a" * 240, "longer than 230 bytes")):
        with pytest.raises(InputError, match=mention):
            check_new_directory(place)


def test_names_of_other_encodings_are_spelt_out(tmp_path):
    write_text(os.fsdecode(b"caf\xe9.txt"), tmp_path / "card")
    assert (tmp_path / "card").read_text(encoding="utf-8") == "caf\\udce9.txt"


@pytest.mark.parametrize("name", MODELS)
def test_exports_have_the_names_of_transformers_4_too(name, tokenizer, tmp_path):
    """Version 4, and programs that bring it along, would take other rotary frequencies without a word."""
    model, tokenizer = tiny(name, vocab_size=320), copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    save_model(model, tokenizer, tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    config, rope = json.loads(path.read_text()), getattr(model.config, "rope_parameters", None)
    assert getattr(AutoConfig.from_pretrained(path.parent), "rope_parameters", None) == rope
    if rope is None:
        assert "rope_theta" not in config
    else:
        turning = rope.get("full_attention", rope)
        assert config["rope_theta"] == turning["rope_theta"]
        assert ("rope_scaling" in config) == (turning["rope_type"] != "default") == (name == "llama-3")
        del config["rope_parameters"]
        path.write_text(json.dumps(config))
        assert AutoConfig.from_pretrained(path.parent).rope_parameters == rope, "from the old names alone"
    settings = json.loads((path.parent / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|turn|>"]
    assert "extra_special_tokens" not in settings
    assert config["torch_dtype"] == "float32"
    if name != "qwen2":  # to which version 5 gives a tokenizer of its own, by either name
        again = AutoTokenizer.from_pretrained(path.parent)
        assert type(again) is type(tokenizer)
        assert again("the<|turn|> model").input_ids == tokenizer("the<|turn|> model").input_ids
        assert again.all_special_tokens == tokenizer.all_special_tokens


def test_a_tokenizer_that_is_saved_in_another_form_does_not_end_an_export(tokenizer, tmp_path):
    class Other(type(tokenizer)):
        def save_pretrained(self, directory):
            (Path(directory) / "tekken.json").write_text("{}")

    save_model(tiny("mistral"), Other(tokenizer_object=tokenizer.backend_tokenizer), tmp_path / "export")
    assert (tmp_path / "export" / "tekken.json").is_file()
