"""The benchmarks on tiny models: what they time, print and refuse."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_llama
from tiny_models import tiny

from experiments.__main__ import main
from experiments.benchmark_inference import measure, timed_generation
from rotpruner.errors import InputError
from rotpruner.loading import load_model
from rotpruner.measures import parameter_count
from rotpruner.oneshot import prune_model
from rotpruner.packed import pack
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.semi_structured import semi_structured, two_four_linears


def test_step_benchmark_prints_its_parts(model_directory, text_file, capsys):
    arguments = f"--model {model_directory} --calibration {text_file} --seq_len 32 --repeats 2 --json".split()
    assert main(["benchmark", "step", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"peak_bytes", "dense_fp32_bytes", "device", "threads"} < set(found)
    assert (found["batch_size"], found["seq_len"], found["gradient_checkpointing"]) == (2, 32, False)
    assert sum(found["parts"].values()) == found["seconds"]
    assert found["ratio"] == found["seconds"] / found["dense_seconds"]
    assert main(["benchmark", "step", *arguments, "--learning_only", "--gradient_checkpointing"]) == 0
    assert "ratio" not in json.loads(capsys.readouterr().out)
    assert str(model_directory) not in found["command"]
    assert main(["benchmark", "step", *arguments, "--pattern", "3:7"]) == 2
    assert "is not divisible by 7" in " ".join(capsys.readouterr().err.split())
    assert main(["benchmark", "flight"]) == 2
    assert main(["benchmark", "--help"]) == 0
    assert "inference" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["smollm2", "opt", "gemma-3"])
def test_decoding_is_greedy_generation(name):
    model, prompts = tiny(name), torch.arange(12).view(2, 6)
    tokens, prefill, decode = timed_generation(model, prompts, 7)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=8)
    assert torch.equal(tokens, expected[:, 6:])
    assert prefill > 0
    assert decode > 0


def test_models_is_dues_and_the_first_turn_is_not_counted():
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.model, self.number = tiny("llama-2"), number

        def forward(self, **arguments):
            seen.append((self.number, arguments["input_ids"].shape[1]))
            return self.model(**arguments)

    prefill, decode = measure([Spy(0), Spy(1), Spy(2)], torch.ones(1, 5, dtype=torch.long), 2, 3)
    assert prefill.shape == decode.shape == (3, 3)
    assert seen == [(number, length) for number in (0, 1, 2) for length in (5, 1, 1)] * 4


@pytest.fixture
def pruned_directory(tmp_path):
    model = tiny_llama()
    prune_model(model, resolve_pruner("magnitude"), parse_pattern("2:4"))
    model.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_inference_benchmark_prints_rows(model_directory, pruned_directory, tmp_path, capsys):
    pack(pruned_directory, tmp_path / "packed")
    models = [str(model_directory), str(pruned_directory), str(tmp_path / "packed")]
    options = ["--seq_len=8", "--new_tokens=3", "--repeats=5", "--batch_size=2", "--threads=1", "--device=cpu"]
    assert main(["benchmark", "inference", *models, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {"batch_size": 2, "seq_len": 8, "new_tokens": 3, "repeats": 5}
    assert set(found) == {"device", "threads", "dtype", "rows", "note", "command", "commit"} | set(sizes)
    assert str(tmp_path) not in found["command"]
    assert {name: found[name] for name in sizes} == sizes
    assert (found["device"], found["threads"], found["dtype"]) == ("cpu", 1, "float32")
    assert "zeros buy no time" in found["note"].lower()
    assert [row["model"] for row in found["rows"]] == [model_directory.name, "pruned", "packed"]
    dense, pruned, packed = found["rows"]
    assert dense["parameters"] == parameter_count(load_model(model_directory))
    assert all(row["bytes"] == 4 * row["parameters"] for row in found["rows"])
    assert dense["parameters"] < pruned["parameters"] == packed["parameters"]
    for part in ("prefill", "decode"):
        assert dense[part]["ratio"] == 1
        for row in found["rows"]:
            low, high = row[part]["spread"]
            assert 0 < low <= row[part]["tokens_per_second"] <= high
            assert row[part]["ratio_spread"][0] <= row[part]["ratio"] <= row[part]["ratio_spread"][1]
    assert main(["benchmark", "inference", *models[:2], "--name", "one", "--name", "two", *options]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("one", "two", "prefill", "decode", "Zeros"))


def test_rates_and_ratios_are_those_of_the_seconds(model_directory, monkeypatch, capsys):
    """Medians and quartiles over the turns; a ratio above 1 is faster than the first model, in the same turn."""
    prefill = torch.tensor([[1.0, 0.5], [2.0, 0.5], [4.0, 2.0]], dtype=torch.float64)
    monkeypatch.setattr("experiments.benchmark_inference.measure", lambda *_: (prefill, 2 * prefill))
    models = [str(model_directory)] * 2
    options = ["--name", "a", "--name", "b", "--batch_size", "3", "--seq_len", "8", "--new_tokens", "5", "--json"]
    assert main(["benchmark", "inference", *models, *options]) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert (first["prefill"]["tokens_per_second"], first["prefill"]["spread"]) == (12, [9, 18])
    assert (second["prefill"]["tokens_per_second"], second["prefill"]["spread"]) == (48, [30, 48])
    assert (second["prefill"]["ratio"], second["prefill"]["ratio_spread"]) == (2, [2, 3])
    assert second["decode"]["tokens_per_second"] == 3 * 5
    assert second["decode"]["ratio"] == 2


def test_two_four_is_recognised(model_directory, pruned_directory):
    pruned = load_model(pruned_directory)
    assert len(two_four_linears(pruned)) == 14
    assert not two_four_linears(load_model(model_directory))
    other = pruned.model.layers[1].mlp.down_proj
    other.weight.data[3, 4:8] = 1.0
    assert len(two_four_linears(pruned)) == 13
    assert all(linear is not other for linear in two_four_linears(pruned))


def test_semi_structured_form_needs_2_of_4_on_cuda(model_directory, pruned_directory):
    with pytest.raises(InputError, match="no decoder linear is 2:4"):
        semi_structured(load_model(model_directory))
    with pytest.raises(InputError, match="weights in float32 have no 2:4 form"):
        semi_structured(load_model(pruned_directory, torch.float32))
    pruned, same = (load_model(pruned_directory, torch.bfloat16) for _ in range(2))
    with pytest.raises(InputError, match="needs a GPU"):
        semi_structured(pruned)
    assert all(torch.equal(one, other) for one, other in zip(pruned.parameters(), same.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_semi_structured_form_computes_the_same():
    model = tiny_llama(hidden_size=128, intermediate_size=256).half().cuda()
    prune_model(model, resolve_pruner("magnitude"), parse_pattern("2:4"))
    ids = torch.arange(64, device="cuda").view(1, 64)
    expected = model(ids).logits
    torch.testing.assert_close(semi_structured(model)(ids).logits, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        (["/no/such/model"], ["/no/such/model"]),
        (["--seq_len", "0"], ["seq_len", "0"]),
        (["--repeats", "0"], ["repeats", "0"]),
        (["--new_tokens", "0"], ["new_tokens", "0"]),
        (["--seq_len", "120", "--new_tokens", "9"], ["129", "128"]),
        (["--name", "a", "--name", "b"], ["2", "1"]),
        (["--dtype", "int8"], ["int8"]),
        (["--device", "attic"], ["attic"]),
    ],
    ids=lambda value: "".join(value[:2]),
)
def test_inference_benchmark_refuses(changes, mentions, model_directory, capsys):
    assert main(["benchmark", "inference", str(model_directory), *changes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert all(mention in captured.err for mention in mentions)
