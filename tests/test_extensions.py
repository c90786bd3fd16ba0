"""What comes from outside the package: families, pruners with arguments, modules that the command line is told of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_family
from tiny_models import GATED, tiny
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from experiments.__main__ import PLUGINS
from rotpruner import families
from rotpruner.errors import InputError
from rotpruner.families import LLAMA, OPT, LinearSpec, register_family
from rotpruner.loading import check_pattern
from rotpruner.model_card import pruner_name
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.pruners.sparsegpt import SparseGPT
from rotpruner.rotations import merge_rotations, random_rotations

q, k, v, o, gate, up, down = LLAMA.linears


@pytest.mark.parametrize(
    ("linears", "mention"),
    [
        ((q, k, replace(v, writes="value_head"), o, gate, up, down), "space value_head, which is none of residual"),
        ((q, k, v, o, gate, up, replace(down, reads="hidden")), "space hidden"),
        ((q, k, replace(v, writes="query_key"), o, gate, up, down), "reads value_heads, which none writes"),
        ((q, k, v, replace(o, reads="mlp"), gate, up, down), "writes value_heads, which none reads"),
        ((q, gate, k, v, o, up, down), "apart from each other"),
    ],
)
def test_a_table_that_would_compute_another_function_is_refused(linears: tuple[LinearSpec, ...], mention: str):
    with pytest.raises(InputError, match=f"table of mine .*{mention}"):
        replace(LLAMA, model_types=("mine",), linears=linears)


@pytest.mark.parametrize("field", ["constraints", "refusals"])
def test_a_table_refuses_what_it_says_of_unknown_spaces(field: str):
    with pytest.raises(InputError, match="space attic"):
        replace(LLAMA, **{field: {"attic": "none"}})


@pytest.fixture
def own_families(monkeypatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def test_a_table_of_other_modules_is_named(own_families):
    class Elsewhere(LlamaConfig):
        model_type = "elsewhere"

    model = LlamaForCausalLM(Elsewhere(**GATED))
    for name, changes in (
        ("out", {"linears": (*LLAMA.linears[:-1], replace(down, path="mlp.out"))}),
        ("norm_out", {"linears": (*LLAMA.linears[:4], *(replace(spec, norm="norm_out") for spec in (gate, up)), down)}),
        ("ln_f", {"final_norm": "model.ln_f"}),
        ("wte", {"embeddings": ("model.wte",)}),
    ):
        register_family(replace(LLAMA, model_types=("elsewhere",), **changes))
        with pytest.raises(InputError, match=f"family table of elsewhere.*{name}.*mend the table"):
            check_pattern(model, parse_pattern("2:4"))


def test_a_bias_that_no_linear_could_take_up_is_refused_before_anything_changes(own_families):
    class Unbiased(OPTConfig):
        model_type = "unbiased"

    register_family(replace(OPT, model_types=("unbiased",), refusals={}))
    settings = tiny("opt").config.to_dict() | {"model_type": "unbiased", "enable_bias": False}
    unbiased = OPTForCausalLM(Unbiased(**settings))
    before = {name: weight.clone() for name, weight in unbiased.state_dict().items()}
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj has no bias .* give the family a refusal"):
        merge_rotations(unbiased, random_rotations(unbiased.config, ["residual"], seed=0))
    for name, weight in unbiased.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_pruner_takes_arguments_by_name():
    pruner = resolve_pruner("sparsegpt(damping=0.5, mask_block=8)")
    assert isinstance(pruner, SparseGPT)
    assert (pruner.damping, pruner.mask_block) == (0.5, 8)
    assert pruner_name(pruner) == "sparsegpt(damping=0.5, mask_block=8)"
    assert pruner_name(resolve_pruner("sparsegpt")) == "sparsegpt"
    with pytest.raises(InputError, match="mask_block 0 must be at least 1"):
        resolve_pruner("sparsegpt(mask_block=0)")
    pruned = [tiny("llama-2") for _ in range(2)]
    for model, name in zip(pruned, ("rotpruner.pruners.ria.RIA(exponent=0.0)", "ria(exponent=0.0)"), strict=True):
        prune_model(model, resolve_pruner(name), parse_pattern("2:4"), torch.arange(64).view(2, 32).split(1))
    for one, other in zip(*(model.parameters() for model in pruned), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "mention"),
    [
        ("sparsegpt(0.1)", "not of the form name"),
        ("sparsegpt(damping=", "not of the form name"),
        ("sparsegpt(damping=open('x'))", "plain values"),
        ("sparsegpt(speed=1)", "cannot be made.*speed"),
        ("sparsegpt(damping=-1)", "damping -1 is not positive"),
        ("magic(x=1)", "unknown pruner 'magic'"),
    ],
)
def test_a_pruner_that_cannot_be_made_is_refused(name: str, mention: str):
    with pytest.raises(InputError, match=mention):
        resolve_pruner(name)


def test_modules_of_ones_own_reach_the_command_line(tmp_path: Path, tokenizer, test_text_file: Path):
    """In a process that knows of a family by the environment alone."""
    config = toy_family.ToyConfig(**{**GATED, "vocab_size": 320})
    toy_family.ToyForCausalLM(config).save_pretrained(tmp_path / "toy")
    tokenizer.save_pretrained(tmp_path / "toy")
    sizes = ["--seq_len", "32", "--max_tokens", "64"]
    arguments = ["--model", tmp_path / "toy", "--text", test_text_file, *sizes, "--json"]

    def run(command: str, *more: str, plugins: str = "toy_family") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), PLUGINS: plugins}
        given = [sys.executable, "-m", "experiments", command, *map(str, arguments), *more]
        return subprocess.run(given, capture_output=True, text=True, env=environment)

    dense = json.loads(run("evaluate").stdout)["ppl"]
    pruned = json.loads(run("prune", "--pruner", "magnitude", "--pattern", "2:4", plugins=" toy_family ,json").stdout)
    assert pruned["sparsity"] == 0.5
    assert dense.keys() == pruned["ppl"].keys()
    assert dense != pruned["ppl"]
    for plugins, mention in (("", "toy"), ("no_such_module", f"${PLUGINS} names 'no_such_module'")):
        refused = run("evaluate", plugins=plugins)
        assert refused.returncode == 2
        assert mention in refused.stderr
