"""The plan against what autograd keeps, what the kernel counts, and arithmetic done by hand."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peak_memory import needs_linux
from tiny_models import tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.__main__ import main
from rotpruner.costs import MAP_COSTS, step_flops
from rotpruner.loading import load_config
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.optimizers import CayleySGD
from rotpruner.orthogonal import OrthogonalMatrices
from rotpruner.patterns import parse_pattern
from rotpruner.planning import block_activations, memory_plan, rotated_weights
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import LearnedRotations
from rotpruner.sizes import Setup, total
from rotpruner.slicing import _residual_groups, residual_pca
from rotpruner.statistics import Moment
from rotpruner.surrogates import Surrogate

SHAPES = {
    "llama": dict(hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "opt": dict(hidden_size=96, ffn_dim=160, num_attention_heads=4),
}


def model_of(family: str):
    shape = {**SHAPES[family], "num_hidden_layers": 3, "vocab_size": 320, "max_position_embeddings": 128}
    return tiny_llama(**shape) if family == "llama" else tiny("opt", **shape)


def rotated_model(
    base,
    dtype,
    spaces,
    surrogate="constant",
    pruner="wanda",
    pattern="2:4",
    orthogonal_map="cayley",
    placement="shared",
    **settings,
) -> RotatedModel:
    rotated = RotatedModel(
        base.to(dtype),
        LearnedRotations(base.config, spaces, orthogonal_map, placement=placement),
        resolve_pruner(pruner),
        parse_pattern(pattern),
        Surrogate(surrogate),
        **settings,
    )
    rotated.calibrate([torch.arange(64)[None]])
    rotated.refresh_masks()
    return rotated


def setup_of(rotated: RotatedModel, spaces, seq_len: int, **settings) -> Setup:
    base = rotated.base
    return Setup(base.config, rotated.pruner, spaces, dtype=base.dtype, seq_len=seq_len, device="cpu", **settings)


def kept_bytes(rotated: RotatedModel, seq_len: int) -> int:
    """Bytes of all storages that autograd keeps from the forward to the backward pass, besides the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*rotated.parameters(), *rotated.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.arange(seq_len)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rotated._enter_rotated(pruned=True)
        states = rotated._states(ids)
    assert states.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("family", "spaces", "surrogate"),
    [
        ("llama", ("residual", "value_heads"), "constant"),
        ("llama", ("residual", "value_heads"), "sr_ste"),
        ("llama", ("residual",), "straight_through"),
        ("llama", ("residual", "value_heads", "query_key"), "constant"),
        ("opt", ("residual", "value_heads"), "constant"),
    ],
)
def test_activations_and_rotated_weights_are_what_autograd_keeps(family, spaces, surrogate, dtype):
    """Two lengths tell what grows with tokens (activations) from what does not (weights, the solve)."""
    rotated = rotated_model(model_of(family), dtype, spaces, surrogate)
    short, long = kept_bytes(rotated, 64), kept_bytes(rotated, 128)
    setup = setup_of(rotated, spaces, 128, keeps_unmasked=surrogate == "sr_ste")
    per_token, _ = block_activations(setup)
    ends = setup.config.hidden_size * (4 + 2 * setup.s)  # the states of teacher and pupil are the objective's
    assert (long - short) / 64 == pytest.approx(setup.layers * per_token + ends, rel=0.04)
    cayley = next(term for term in memory_plan(setup).phases["logits"] if term.name == "orthogonal map")
    assert 2 * short - long == pytest.approx(setup.layers * rotated_weights(setup)[0] + cayley.amount, rel=0.12)


@pytest.mark.parametrize(
    ("pruner", "pattern", "orthogonal_map", "offload"),
    [
        ("magnitude", "2:4", "cayley", False),
        ("wanda", "2:4", "cayley", True),
        ("sparsegpt", "2:4", "exponential", False),
        ("wanda", "2:4", "manifold", False),
        ("magnitude", "slice:0.25", "cayley", False),
        ("wanda", "slice:0.25", "manifold", False),
    ],
)
def test_resident_terms_are_what_the_model_holds(pruner, pattern, orthogonal_map, offload):
    spaces = ("residual",) if pattern.startswith("slice") else ("residual", "value_heads")
    choices = dict(pruner=pruner, pattern=pattern, orthogonal_map=orthogonal_map)
    waiting = dict(gradient_checkpointing=offload, offload=offload)
    rotated = rotated_model(model_of("llama"), torch.bfloat16, spaces, **choices, **waiting)
    kind = CayleySGD if orthogonal_map == "manifold" else torch.optim.Adam
    optimizer = kind(rotated.rotations.parameters())
    rotated.loss(torch.arange(64)[None], torch.tensor([3]))["loss"].backward()
    optimizer.step()
    states = 1 if orthogonal_map == "manifold" else 2
    choices = dict(pattern=rotated.pattern, orthogonal_map=orthogonal_map, optimizer_states=states)
    plan = memory_plan(setup_of(rotated, spaces, 64, num_sequences=9, steps=1, **choices, **waiting))
    terms = {term.name: term.amount for term in (*plan.resident, *plan.kept_by_host)}
    held = {
        "frozen weights": list(rotated.base.parameters()),
        "decoder weights": [linear.weight for linear in rotated.linears if offload],
        "masks": [linear.mask for linear in rotated.linears if linear.mask is not None],
        "statistics H": [moment.blocks for moment in rotated.moments.values()],
        "teacher states": list(rotated._dense_states.kept.values()),
        "rotations": [
            *rotated.rotations.parameters(),
            *rotated.rotations.buffers(),
            *rotated.mask_rotations.values(),
            *(parameter.grad for parameter in rotated.rotations.parameters()),
        ],
        "optimiser states": [
            state for of in optimizer.state.values() for state in of.values() if torch.is_tensor(state) and state.dim()
        ],
    }
    assert ("masks" in terms) == (pattern == "2:4")
    for name, tensors in held.items():
        assert terms.get(name, 0) == sum(tensor.numel() * tensor.element_size() for tensor in tensors), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("placement", ["shared", "per_layer", "per_block"])
@pytest.mark.parametrize("pattern", ["2:4", "slice:0.25"])
def test_the_export_has_the_size_that_is_planned(pattern, placement, tied):
    spaces, model = ("residual",), tiny_llama(**{**SHAPES["llama"], "tie_word_embeddings": tied})
    chosen, pruner = parse_pattern(pattern), resolve_pruner("magnitude")
    setup = Setup(copy.deepcopy(model.config), pruner, spaces, placement=placement, pattern=chosen)
    rotations = LearnedRotations(model.config, spaces, placement=placement)()
    prune_model(model, pruner, chosen, rotations={space: Q.detach() for space, Q in rotations.items()})
    assert setup.exported_parameters == sum(tensor.numel() for tensor in model.state_dict().values())


def memory_of(call) -> tuple[int, int]:
    """(peak, what stays) of a call, bytes, by PyTorch's count of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # noqa: F841 - until the count is taken
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held), held[-1]


@pytest.mark.parametrize("name", ["cayley", "exponential", "manifold"])
def test_what_orthogonal_maps_take_is_what_torch_allocates(name):
    cost, n = MAP_COSTS[name], 256
    copy, matrices = 4 * n * n, OrthogonalMatrices(1, 1, n, name)
    if name != "manifold":
        torch.nn.init.normal_(matrices.turn, std=0.05)
    found = []
    _, kept = memory_of(lambda: found.append(matrices()))
    assert kept == pytest.approx((cost.kept + 2 * cost.indices) * copy, rel=0.05)
    gradient = torch.randn(1, 1, n, n)
    peak, _ = memory_of(lambda: found[0].backward(gradient))
    assert 0.75 * peak <= (cost.backward + cost.backward_one) * copy <= 1.3 * peak
    optimizer = CayleySGD(matrices.parameters()) if cost.step else torch.optim.Adam(matrices.parameters())
    optimizer.step()
    peak, _ = memory_of(optimizer.step)
    assert peak == pytest.approx((cost.step or 2 * matrices.turn.numel() / n**2) * copy, rel=0.12)


def test_principal_directions_take_what_is_planned():
    d = 256
    X = torch.randn(d, d)
    config, moments = tiny_llama(hidden_size=d).config, defaultdict(lambda: Moment((X @ X.mT)[None]))
    list(map(moments.__getitem__, _residual_groups(config)))  # gathered before
    peak, _ = memory_of(lambda: residual_pca(config, moments))
    assert peak <= 48 * d * d + 2 * 4 * d * d


@pytest.mark.parametrize("placement", ["per_layer", "per_block"])
def test_basis_changes_keep_a_stream_and_two_matrices_each(placement):
    spaces = ("residual",)
    found, setups = [], []
    for each in (placement, "shared"):
        rotated = rotated_model(model_of("llama"), torch.bfloat16, spaces, placement=each)
        short, long = kept_bytes(rotated, 64), kept_bytes(rotated, 128)
        setup = setup_of(rotated, spaces, 128, placement=each)
        cayley = next(term for term in memory_plan(setup).phases["logits"] if term.name == "orthogonal map")
        found.append(((long - short) / 64, 2 * short - long - cayley.amount))
        setups.append(setup)
    changes, d = setups[0].basis_changes, setups[0].config.hidden_size
    assert changes == {"per_layer": 1, "per_block": 2}[placement] * setups[0].layers
    term = next(term for term in memory_plan(setups[0]).phases["logits"] if term.name == "basis changes")
    measured = 128 * (found[0][0] - found[1][0]) + found[0][1] - found[1][1]
    assert term.amount <= measured <= term.amount + 1.1 * d * d * 4  # and a copy of one matrix, however many there are


@pytest.mark.parametrize("placement", ["shared", "per_block"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [Objective(), Objective(kl=0, cross_entropy=1)], ids=["kl", "cross_entropy"])
def test_operations_are_those_that_torch_counts(objective, checkpointing, placement):
    spaces = ("residual", "value_heads")
    settings = {"placement": placement, "objective": objective, "gradient_checkpointing": checkpointing}
    rotated = rotated_model(model_of("llama"), torch.float32, spaces, **settings)
    with FlopCounterMode(display=False) as counter:
        rotated.loss(torch.arange(128)[None], torch.tensor([0]))["loss"].backward()
    setup = setup_of(rotated, spaces, 128, steps=1, **settings)
    counted = {str(operator).split(".")[1]: count for operator, count in counter.get_flop_counts()["Global"].items()}
    products = sum(counted.get(name, 0) for name in ("mm", "bmm", "addmm", "baddbmm"))
    terms = {term.name: term.amount for term in step_flops(setup)}
    expected = terms["linears"] + terms["rotated weights"] + terms["logits"] + terms["ends of the stream"]
    expected += terms.get("basis changes", 0)
    expected += terms["orthogonal map"] * 6 // (32 / 3)  # the products; torch does not count solves
    if objective.needs_teacher:
        expected += 2 * 128 * sum(outputs * inputs for _, outputs, inputs in setup.linears)
    assert products == pytest.approx(expected, rel=0.01)


# -- the command -------------------------------------------------------------------------------------

HEADS = dict(num_hidden_layers=32, num_attention_heads=32, hidden_size=4096, max_position_embeddings=4096)
LARGE = {
    "llama2-7b": LlamaConfig(**HEADS, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000),
    "llama3-8b": LlamaConfig(**HEADS, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
    "llama3-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
}


@pytest.fixture
def plan(tmp_path, capsys):
    """`plan(name, *options)` → the JSON plan of a large config, its model a directory with nothing but a config."""

    def run(name: str, *options: str) -> dict:
        LARGE[name].save_pretrained(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["config.json"]
        config = ["-c", f"experiments/configs/{name}.yaml", "--model.model", str(tmp_path / name)]
        assert main(["plan", *config, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_llama2_7b_by_hand(plan):
    found = plan("llama2-7b", "--gpu", "a100-80gb")
    assert found["parameters"] == 6_738_415_616
    d, f, L, V = 4096, 11008, 32, 32000
    M = L * (4 * d * d + 3 * d * f)
    terms = {term["name"]: term["amount"] for term in found["memory"]["resident"]}
    assert terms["frozen weights"] == 2 * (M + 2 * V * d + (2 * L + 1) * d)
    assert terms["masks"] == M
    # Residual inputs whole, value heads by head, the MLP's by entry.
    assert terms["statistics H"] == 4 * L * (2 * d * d + 32 * 128 * 128 + f)
    assert terms["optimiser states"] == 2 * 4 * (d * (d - 1) // 2 + L * 32 * 128 * 127 // 2)
    phases = {name: sum(term["amount"] for term in terms) for name, terms in found["memory"]["phases"].items()}
    assert found["memory"]["peak"] == sum(terms.values()) + max(phases.values())
    assert found["fits"]
    assert found["changes"] == []
    assert found["seconds_per_step"] > 0
    linears = next(term["amount"] for term in found["flops"] if term["name"] == "linears")
    assert linears == 2 * 2048 * (4 * M - L * d * f)  # recomputed, but for the last linear of each block


def calculated(formula: str) -> float:
    """The numbers of `symbols = numbers: remark`."""
    numbers = re.split(r"[:;,] ", formula.split(" = ", 1)[1])[0].replace(",", "")
    for written, meant in {"·": "*", "−": "-", "²": "**2", "³": "**3"}.items():
        numbers = numbers.replace(written, meant)
    return eval(numbers, {"__builtins__": {}})


SLICE = ["--model.pattern", "slice:0.25", "--model.spaces", "[residual]", "--model.start", "pca"]
OFFLOAD = ["--model.gradient_checkpointing", "true", "--model.offload", "true"]
SHARDS = ["--count", "8", "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama2-7b", []),
        ("llama3-8b", []),
        ("llama3-70b", SHARDS),
        ("llama3-8b", ["--model.gradient_checkpointing", "false", "--model.surrogate.name", "sr_ste"]),
        ("llama3-8b", ["--model.pruner", "sparsegpt", "--model.placement", "per_block"]),
        ("llama3-8b", ["--model.orthogonal_map", "exponential"]),
        ("llama3-8b", ["--model.pattern", "0.5", "--model.layer_sparsity", "owl"]),
        ("llama3-8b", ["--model.compensate", "32"]),
        ("llama3-8b", OFFLOAD),
        ("llama3-8b", [*OFFLOAD, "--gpu", "cpu"]),
        ("llama3-8b", [*OFFLOAD, "--model.pattern", "0.5", "--model.layer_sparsity", "owl"]),
        ("llama3-8b", SLICE),
    ],
    ids=[
        "7b",
        "8b",
        "70b",
        "sr_ste",
        "sparsegpt",
        "exponential",
        "owl",
        "compensate",
        "offload",
        "offload on a cpu",
        "offload and owl",
        "slice",
    ],
)
def test_the_numbers_of_every_formula_give_its_amount(name, options, plan):
    found = plan(name, *options)
    memory, terms = found["memory"], [*found["flops"], *found["disk"]]
    for part in (
        memory["resident"],
        memory["kept_by_host"],
        *memory["phases"].values(),
        *memory["host_phases"].values(),
    ):
        terms += part
    for term in terms:
        if term["name"] != "runtime":  # of libraries: no formula has it
            assert calculated(term["formula"]) == pytest.approx(term["amount"], rel=1e-9, abs=1), term


def test_what_does_not_fit_is_told_what_to_change(plan):
    assert not plan("llama2-7b", "--gpu", "rtx4090-24gb")["fits"]
    found = plan("llama3-8b", "--gpu", "rtx4090-24gb", "--model.gradient_checkpointing", "false")
    changes = {change["change"]: change for change in found["changes"]}
    assert not found["fits"]
    assert changes["--model.gradient_checkpointing true"]["peak"] < found["memory"]["peak"]
    assert changes["--gpu h100-80gb"]["fits"]
    again = plan("llama3-8b", "--gpu", "rtx4090-24gb", "--model.gradient_checkpointing", "true")
    assert again["memory"]["peak"] == changes["--model.gradient_checkpointing true"]["peak"]

    huge = plan("llama3-70b")
    shared = [change for change in huge["changes"] if "--count" in change["change"] and change["fits"]]
    assert not huge["fits"]
    assert "h200-141gb" in shared[0]["change"]
    sharded = plan("llama3-70b", "--gpu", "h200-141gb", *SHARDS)
    assert sharded["hardware"]["sharded"]
    assert sharded["fits"]


def test_offload_by_hand(plan):
    d, f, L, s = 4096, 14336, 32, 2
    block = 2 * d * (d + 1024) + 3 * d * f
    without = plan("llama3-8b", "--gpu", "rtx4090-24gb", "--model.gradient_checkpointing", "false")
    found = plan("llama3-8b", "--gpu", "rtx4090-24gb", *OFFLOAD)
    memory, weights = found["memory"], 2 * 128256 * d + (2 * L + 1) * d
    terms = {term["name"]: term["amount"] for term in memory["resident"]}
    assert terms["frozen weights"] == s * weights
    phase = {term["name"]: term["amount"] for term in memory["phases"]["blocks, backward"]}
    assert phase["one block's own weights"] == s * block
    host = {term["name"]: term["amount"] for term in memory["kept_by_host"]}
    assert host["decoder weights"] == L * (2 * 2**25 + 2 * 2**23 + 3 * 2**27), "up to powers of two"
    assert memory["host"] > host["decoder weights"]
    changes = {change["change"]: change["peak"] for change in without["changes"]}
    assert changes["--model.gradient_checkpointing true --model.offload true"] == memory["peak"]
    copied = plan("llama3-8b", *OFFLOAD)["seconds_per_step"] - plan("llama3-8b", *OFFLOAD[:2])["seconds_per_step"]
    assert copied == pytest.approx(2 * s * L * block / 64e9)

    twice = plan("llama3-8b", *OFFLOAD, "--count", "2", "--trainer.strategy", "ddp")["memory"]["kept_by_host"]
    assert twice[-1]["amount"] == 2 * host["decoder weights"]
    cpu = [plan("llama3-8b", "--gpu", "cpu", *options)["memory"]["learning"] for options in (OFFLOAD, OFFLOAD[:2])]
    assert cpu[0] == cpu[1], "main memory holds them either way"


def test_the_plan_for_a_person_shows_the_same_numbers(plan, capsys, tmp_path):
    found = plan("llama3-8b")
    config = ["-c", "experiments/configs/llama3-8b.yaml", "--model.model", str(tmp_path / "llama3-8b")]
    assert main(["plan", *config]) == 0
    text = capsys.readouterr().out
    assert f"{found['parameters']:,} parameters" in text
    assert f"peak {found['memory']['peak'] / 2**30:.2f} GiB of 80 GiB: fits" in text
    assert f"2 · {found['parameters']:,}" in text or f"{found['parameters']:,} · 2" in text
    lines = "\n".join(re.findall("^(?:P|K|time:) .*", text, re.M))
    results = re.findall(r"([\d(][\d ·+,²/.()]*) = ([\d,.]*\d)", lines)
    assert len(results) == 3, "M, K and the seconds of a step"
    for numbers, result in results:
        assert calculated(f" = {numbers}") == pytest.approx(float(result.replace(",", "")), rel=0.01)


def test_slices_and_manifolds_by_hand(plan):
    d, L, K = 4096, 32, 4096**2
    found = plan("llama3-8b", *SLICE)
    terms = {term["name"]: term["amount"] for term in found["memory"]["resident"]}
    assert "masks" not in terms
    assert terms["statistics H"] == 4 * 2 * L * d * d
    phases = {name: sum(term["amount"] for term in terms) for name, terms in found["memory"]["phases"].items()}
    assert phases["principal directions"] == 48 * d * d + 2 * 4 * K
    assert phases["mask refresh"] == 4 * K
    disk = {term["name"]: term["amount"] for term in found["disk"]}
    sliced = 2 * 128256 * 3072 + L * (3072 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 3072) + 3072
    assert disk["export"] == sliced * found["memory"]["host_phases"]["loading"][1]["amount"] // found["parameters"]

    heads = 32 * 8 * 128**2
    moved = ["--model.orthogonal_map", "manifold", "--model.optimizer", "rotpruner.optimizers.CayleySGD"]
    found = plan("llama3-8b", *moved)
    terms = {term["name"]: term["amount"] for term in found["memory"]["resident"]}
    assert found["trainable_parameters"] == K + heads
    assert terms["optimiser states"] == 4 * (K + heads), "the momentum alone"
    phases = {
        name: {term["name"]: term["amount"] for term in terms} for name, terms in found["memory"]["phases"].items()
    }
    assert phases["logits"]["orthogonal map"] == 4 * (K + heads)
    assert phases["optimiser step"]["optimiser step"] == 9 * 4 * K
    flops = {term["name"]: term["amount"] for term in found["flops"]}
    assert flops["orthogonal map"] == 50 * (d**3 + 32 * 8 * 128**3) // 3

    block = 2 * d * (d + 1024) + 3 * d * 14336
    found = plan("llama3-8b", "--model.pattern", "0.5", "--model.layer_sparsity", "owl")
    assert found["memory"]["phases"]["outlier ratios"][0]["amount"] == 8 * block


def test_epochs_count_as_steps(plan):
    def rows(*options: str) -> str:
        return plan("llama3-8b", *options)["memory"]["kept_by_host"][0]["formula"]

    assert rows("--trainer.max_steps", "5").startswith("rows · T · d · s = 5 ·")
    assert rows("--trainer.max_steps", "-1", "--trainer.max_epochs", "2").startswith("rows · T · d · s = 128 ·")


def test_optimizers_and_spaces_count(plan):
    adam = plan("llama3-8b")["memory"]["resident"]
    sgd = plan("llama3-8b", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9")
    heads = plan("llama3-8b", "--model.spaces", "[value_heads]")
    states = [next(term["amount"] for term in terms if term["name"] == "optimiser states")
              for terms in (adam, sgd["memory"]["resident"], heads["memory"]["resident"])]  # fmt: skip
    assert states[1] * 2 == states[0]
    assert states[2] == 2 * 4 * 32 * 8 * 128 * 127 // 2


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--gpu", "abacus"], ["abacus", "h100-80gb"]),
        (["--count", "0"], ["0"]),
        (["--model.spaces", "[attic]"], ["attic"]),
        (["--model.pattern", "2:5"], ["2:5"]),
        (["--model.pattern", "slice:0.3"], ["slice:0.3", "[residual]"]),
        (["--model.orthogonal_map", "manifold"], ["manifold", "CayleySGD"]),
        (["--model.layer_sparsity", "owl"], ["owl", "2:4"]),
        (["--model.surrogate.name", "gumbel"], ["gumbel"]),
        (["--model.gradient_checkpointing", "false", "--model.offload", "true"], ["offload", "gradient_checkpointing"]),
        ([*OFFLOAD, *SHARDS], ["offload", "ModelParallelStrategy"]),
        (["--data.seq_len", "100000"], ["100000", "4096"]),
        (["--model.model", "/no/model"], ["/no/model"]),
        (["--model.banana", "1"], ["banana"]),
    ],
    ids=lambda value: "".join(value[:2]) if value[0].startswith("--") else "",
)
def test_plan_refuses(options, mentions, tmp_path, capsys):
    LARGE["llama2-7b"].save_pretrained(tmp_path / "model")
    config = ["-c", "experiments/configs/llama2-7b.yaml", "--model.model", str(tmp_path / "model")]
    assert main(["plan", *config, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert all(mention in line for mention in mentions), line


# -- the kernel's count ------------------------------------------------------------------------------


def measured(model: str, seq_len: int, steps: int, calibration: str, run: Path, **settings) -> dict[str, int]:
    """Peak resident bytes of a few steps, above what imports take, in a process that gives memory back at once."""
    trimmed = dict(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    data = dict(num_sequences=2, seq_len=seq_len, calibration=calibration)
    what = json.dumps({"model": {"model": model, **settings}, "data": data, "steps": steps})
    environment = {**os.environ, **trimmed, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "tests/peak_memory.py", str(run), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def planned(model: str, seq_len: int, steps: int, **settings) -> int:
    sizes = dict(seq_len=seq_len, steps=steps, num_sequences=2)
    setup = Setup(load_config(model), resolve_pruner("wanda"), **sizes, device="cpu")
    return memory_plan(replace(setup, **settings)).learning


@needs_linux
@pytest.mark.slow
def test_the_plan_predicts_the_peak_of_smollm2(tmp_path):
    found = measured("smollm2-135m", 1024, 3, "wikipedia_calibration", tmp_path)
    assert planned("smollm2-135m", 1024, 3) == pytest.approx(found["peak"], rel=0.15)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("width", "checkpointing"), [(2048, False), (1024, True)])
def test_the_plan_predicts_the_peak_of_a_wide_model(width, checkpointing, tmp_path, tokenizer, text_file):
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=16000,
        max_position_embeddings=1024,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    del model
    path = str(tmp_path / "wide")
    found = measured(path, 256, 2, str(text_file), tmp_path, gradient_checkpointing=checkpointing)
    assert planned(path, 256, 2, gradient_checkpointing=checkpointing) == pytest.approx(found["peak"], rel=0.15)


def test_totals_add_up():
    rotated = rotated_model(model_of("llama"), torch.bfloat16, ("residual",))
    plan = memory_plan(setup_of(rotated, ("residual",), 64))
    assert plan.learning == total([*plan.resident, *plan.kept_by_host]) + max(map(total, plan.phases.values()))
    assert plan.peak >= plan.host
