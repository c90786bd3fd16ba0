"""The dtype that `auto` stands for."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny

from experiments.__main__ import main
from experiments.plan_setup import read_setup
from rotpruner.allotment import Allotment
from rotpruner.compensation import compensate
from rotpruner.errors import InputError
from rotpruner.loading import load_model
from rotpruner.measures import sparsity_of
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.perplexity import summed_nll
from rotpruner.precision import fast_dtype, resolve_dtype
from rotpruner.pruners import resolve_pruner
from rotpruner.recovery import SparseRecovery
from rotpruner.statistics import gather_moments

CPU = torch.device("cpu")


@torch.no_grad()
def test_moments_and_likelihoods_of_16_bit_models_are_summed_up_in_more():
    model, ids = tiny("llama-2").bfloat16(), torch.arange(64).view(2, 32)
    name, seen = "model.layers.0.mlp.down_proj", []
    linear = model.get_submodule(name)
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].double().flatten(0, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gather_moments(model, {name: linear}, {name: linear.in_features}, ids.split(1))[name].full()
    x = torch.cat(seen)
    torch.testing.assert_close(found.double(), x.mT @ x / len(x), rtol=1e-5, atol=1e-6)
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    expected = -logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
    torch.testing.assert_close(summed_nll(logits, ids)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": False, "avx512_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_a_cpu_takes_bfloat16_where_it_has_instructions_for_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16, "what is asked for is taken"


def test_a_release_of_torch_that_does_not_tell_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_dtype(CPU) == torch.float32


def test_auto_is_not_the_slow_one_on_this_machine():
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(9):  # in turns, since the machine has more to do
        for dtype in seconds:
            x, weight = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            started = time.perf_counter()
            F.linear(x, weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    assert seconds[fast_dtype(CPU)] < 3 * min(seconds.values())


@pytest.mark.parametrize(
    ("gpu", "expected"), [("v100-32gb", torch.float32), ("h100-80gb", torch.bfloat16), ("cpu", fast_dtype(CPU))]
)
def test_plan_knows_what_auto_is_elsewhere(gpu, expected, model_directory, text_file):
    arguments = ["--model.model", str(model_directory), "--data.calibration", str(text_file), "--data.seq_len", "32"]
    setup, _ = read_setup([*arguments, "--trainer.max_steps", "2"], gpu, 1)
    assert setup.dtype == expected


@pytest.mark.filterwarnings("error:In CPU autocast")
@pytest.mark.parametrize("name", ["auto", "float32", "bfloat16"])
def test_prune_takes_statistics_in_every_dtype(name, model_directory, text_file, tmp_path):
    settings = {"model": model_directory, "calibration": text_file, "output": tmp_path / "pruned", "num_sequences": 2}
    settings |= {"pruner": "wanda", "pattern": "2:4", "seq_len": 32, "calibration_dtype": name}
    assert main(["prune", *(str(item) for key, value in settings.items() for item in (f"--{key}", value))]) == 0
    assert sparsity_of(load_model(str(tmp_path / "pruned"))) == 0.5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_products_are_taken_in_the_dtype_that_is_asked_for(dtype):
    seen: dict[str, set[torch.dtype]] = {}

    def watched(model, name):
        module = model.model.layers[0].mlp.up_proj
        module.register_forward_hook(lambda module, args, output: seen.setdefault(name, set()).add(output.dtype))
        return model

    ids = torch.arange(64).view(4, 16).split(1)
    pruned = tiny("llama-2")
    prune_model(pruned, resolve_pruner("magnitude"), parse_pattern("2:4"))
    recovery = SparseRecovery(watched(copy.deepcopy(pruned), "recovery"), tiny("llama-2"), compute_dtype=dtype)
    prune_model(watched(pruned, "pruner"), resolve_pruner("wanda"), parse_pattern("2:4"), ids, calibration_dtype=dtype)
    recovery.loss(ids[0])
    owl = Allotment(parse_pattern("0.5"), "owl")
    prune_model(watched(tiny("llama-2"), "owl"), resolve_pruner("magnitude"), owl, ids, calibration_dtype=dtype)
    compensate(pruned, watched(tiny("llama-2"), "compensation"), ids, calibration_dtype=dtype)
    assert seen.pop("recovery") == {dtype or fast_dtype(CPU)}
    assert seen == {name: {dtype or torch.float32} for name in ("pruner", "owl", "compensation")}


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown dtype 'int8'; choose one of auto, bfloat16"):
        resolve_dtype("int8", CPU)
