"""Packed checkpoints: nothing is lost, every pattern gets smaller, and damage is one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM

import rotpruner
from experiments.__main__ import main
from rotpruner.layout import linear_modules
from rotpruner.packed import pack_mask, read_packed, unpack_mask
from rotpruner.patterns import parse_pattern

IN_A_FRESH_PROCESS = """
import sys, torch, rotpruner
assert "lightning" not in sys.modules
torch.set_num_threads(1)
model = rotpruner.load(sys.argv[1])
ids = torch.arange(16).view(2, 8)
with torch.no_grad():
    torch.save((model(input_ids=ids).logits, model.generate(ids, do_sample=False, max_new_tokens=12)), sys.argv[2])
"""


@torch.no_grad()
def pruned(model, pattern):
    for linear in linear_modules(model).values():
        linear.weight.mul_(parse_pattern(pattern).mask(linear.weight.abs()))
    return model


def same_tensors(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def test_the_first_weight_is_the_lowest_bit():
    """As all packed files have it."""
    assert pack_mask(torch.tensor([True] + [False] * 8 + [True])).tolist() == [1, 2]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_masks_of_any_size_come_back(bits):
    mask = torch.tensor(bits)
    packed = pack_mask(mask)
    assert packed.shape == (-(-len(bits) // 8),)
    assert torch.equal(unpack_mask(packed, [len(bits)]), mask)


@pytest.mark.parametrize("name", ["llama-3", "smollm2", "opt", "gemma-2"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "1:8"])
def test_packing_and_unpacking_keep_every_value(name, pattern, tmp_path):
    pruned(tiny(name).half(), pattern).save_pretrained(tmp_path / "plain", max_shard_size="15KB")
    (tmp_path / "plain" / "additional_chat_templates").mkdir()
    (tmp_path / "plain" / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    # Valid only as it is: with anything added, it is checked again when it is saved, and refused.
    (tmp_path / "plain" / "generation_config.json").write_text('{"temperature": 0.9}')
    sizes = rotpruner.pack(tmp_path / "plain", tmp_path / "packed")
    rotpruner.unpack(tmp_path / "packed", tmp_path / "again")
    plain = {path.name: load_file(path) for path in (tmp_path / "plain").glob("*.safetensors")}
    again = {path.name: load_file(path) for path in (tmp_path / "again").glob("*.safetensors")}
    assert plain.keys() == again.keys()
    for file in plain:
        same_tensors(plain[file], again[file])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    loaded = rotpruner.load(tmp_path / "packed")
    same_tensors(model.state_dict(), loaded.state_dict())
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": loaded.config._name_or_path}
    loaded.save_pretrained(tmp_path / "saved")
    assert "trust_remote_code" not in (tmp_path / "saved" / "generation_config.json").read_text()
    for directory in ("packed", "again"):
        assert (tmp_path / directory / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"
    linears = linear_modules(model).values()
    assert sizes["weights"] == len(linears)
    assert sizes["dense_bytes"] == sum(linear.weight.nbytes for linear in linears)
    kept = sum(int((linear.weight != 0).sum()) for linear in linears)
    assert sizes["packed_bytes"] == 2 * kept + sizes["dense_bytes"] // 16
    assert sizes["ratio"] <= 0.60
    on_disk = [sum(path.stat().st_size for path in (tmp_path / d).glob("*.safetensors")) for d in ("plain", "packed")]
    assert on_disk[1] < on_disk[0]


@torch.no_grad()
def test_a_fresh_process_computes_the_same(tmp_path):
    pruned(tiny_llama(tie_word_embeddings=True).to(torch.bfloat16), "2:4").save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert main(["pack", "--model", str(tmp_path / "plain"), "--output", str(tmp_path / "packed")]) == 0
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, tmp_path / "packed", tmp_path / "found.pt"], check=True)
    logits, tokens = torch.load(tmp_path / "found.pt", weights_only=True)
    ids = torch.arange(16).view(2, 8)
    assert torch.equal(logits, model(input_ids=ids).logits)
    assert torch.equal(tokens, model.generate(ids, do_sample=False, max_new_tokens=12))


def test_commands_take_packed_models(tmp_path, tokenizer, test_text_file, capsys):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    pruned(tiny_llama(), "0.5").save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    assert main(["pack", "--model", str(plain), "--output", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == pytest.approx(0.5 + 1 / 32)
    ppl = []
    for model in (plain, packed):
        arguments = ["--model", str(model), "--text", str(test_text_file), "--seq_len", "32", "--json"]
        assert main(["evaluate", *arguments]) == 0
        ppl.append(json.loads(capsys.readouterr().out)["ppl"])
    assert ppl[0] == ppl[1]
    assert main(["unpack", "--model", str(packed), "--output", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / "again"), "weights": 14}


def truncate(directory):
    path = directory / "packed-model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(directory):
    path = directory / "packed-model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(directory):
    (directory / "packed-model.safetensors").unlink()


def cut_config(directory):
    path = directory / "packed_config.json"
    path.write_text(path.read_text()[:100])


def lie_about_shapes(directory):
    path = directory / "packed_config.json"
    path.write_text(path.read_text().replace("32", "31"))


def strange_format(directory):
    path = directory / "packed_config.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))


def lead_out(directory):
    path = directory / "packed_config.json"
    path.write_text(path.read_text().replace('"model.safetensors"', '"../model.safetensors"'))


def a_list(directory):
    (directory / "packed_config.json").write_text("[]")


DAMAGES = [truncate, flip_a_bit, remove, cut_config, lie_about_shapes, strange_format, lead_out, a_list]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line(damage, tmp_path, capsys):
    pruned(tiny_llama(), "2:4").save_pretrained(tmp_path / "plain")
    rotpruner.pack(tmp_path / "plain", tmp_path / "packed")
    damage(tmp_path / "packed")
    with pytest.raises(rotpruner.InputError):
        rotpruner.load(tmp_path / "packed")
    assert main(["unpack", "--model", str(tmp_path / "packed"), "--output", str(tmp_path / "again")]) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    assert str(tmp_path / "packed") in message
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("make", "mention"),
    [
        (lambda path: None, "no config.json"),
        (lambda path: tiny_llama().save_pretrained(path), "pruned"),
        (lambda path: (pruned(tiny_llama(), "2:4").save_pretrained(path), truncate_plain(path)), "damaged"),
    ],
    ids=["missing", "dense", "truncated"],
)
def test_pack_refuses(make, mention, tmp_path, capsys):
    make(tmp_path / "plain")
    assert main(["pack", "--model", str(tmp_path / "plain"), "--output", str(tmp_path / "packed")]) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert mention in message[-1]
    assert not (tmp_path / "packed").exists()


def truncate_plain(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def test_zeros_lose_their_sign_and_nothing_else(tmp_path):
    weight = torch.tensor([[0.0, -0.0, 1e-45, -7.0], [0.0, 0.0, float("inf"), 0.0]])
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    save_file({"a": weight, "b": torch.arange(4)}, tmp_path / "plain" / "model.safetensors")
    rotpruner.pack(tmp_path / "plain", tmp_path / "packed")
    found = read_packed(tmp_path / "packed")
    assert torch.equal(found["a"], weight)
    assert not found["a"].signbit()[0, 1]
    assert torch.equal(found["b"], torch.arange(4))
    with pytest.raises(rotpruner.InputError, match="packed already"):
        rotpruner.pack(tmp_path / "packed", tmp_path / "twice")
