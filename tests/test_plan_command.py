"""The plan as a command: every number of it, what it advises, what it refuses."""

from __future__ import annotations

import json
import re

import pytest
from transformers import LlamaConfig

from experiments.__main__ import main

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


SLICE = [
    "--model.pattern",
    "slice:0.25",
    "--model.spaces",
    "[residual]",
    "--model.start",
    "pca",
    "--model.compensate",
    "0",
]
OWL = ["-c", "experiments/configs/variants/unstructured.yaml", "--model.layer_sparsity", "owl"]
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
        ("llama3-8b", OWL),
        ("llama3-8b", ["--model.compensate", "0"]),
        ("llama3-8b", OFFLOAD),
        ("llama3-8b", [*OFFLOAD, "--gpu", "cpu"]),
        ("llama3-8b", [*OFFLOAD, *OWL]),
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
        "without compensation",
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


def test_other_gpus_are_weighed_in_the_dtype_that_auto_is_there(plan):
    given = ["--model.base_dtype", "auto", "--model.gradient_checkpointing", "false"]
    changes = {change["change"]: change for change in plan("llama3-8b", "--gpu", "rtx4090-24gb", *given)["changes"]}
    there = plan("llama3-8b", "--gpu", "v100-32gb", *given)
    assert changes["--gpu v100-32gb"]["peak"] == there["memory"]["peak"]


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


def test_main_memory_at_the_end_by_hand(plan):
    d, f, L, V = 4096, 14336, 32, 128256
    M, rest = L * (2 * d * (d + 1024) + 3 * d * f), 2 * (2 * V * d + (2 * L + 1) * d)
    given = ["--gpu", "h100-80gb", "--model.compensate", "2"]

    def host(*options):
        memory = plan("llama3-8b", *given, *options)["memory"]
        phases = {
            name: {term["name"]: term["amount"] for term in terms} for name, terms in memory["host_phases"].items()
        }
        statistics = next(term["amount"] for term in memory["resident"] if term["name"] == "statistics H")
        return memory["host"], phases, statistics

    most, phases, statistics = host()
    assert sum(phases["learning over"].values()) == 2 * M + rest + M
    # In float32, since the config names no dtype: two models; the decoder before, and its updates.
    copies = 4 * (2 * (M + rest // 2) + 2 * M)
    inputs = 4 * (4 * 2 * 2048 * d + 2 * 2048 * (3 * d + f + 2 * d))
    assert sum(phases["weights updated"].values()) == rest + statistics + copies + inputs
    assert most == sum(phases["weights updated"].values())
    two, phases, _ = host("--count", "2", "--trainer.strategy", "ddp")
    assert phases["perplexity"]["embeddings, head and norms"] == 2 * rest
    assert two == most + rest
    offloaded, phases, _ = host(*OFFLOAD)
    assert offloaded == most + phases["learning over"]["decoder weights"], "pinned memory does not go back"


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
    found = plan("llama3-8b", *OWL)
    assert found["memory"]["phases"]["outlier ratios"][0]["amount"] == 8 * block


def test_as_many_gpus_as_the_config_asks_for(plan):
    found = plan("llama3-8b", "-c", "experiments/configs/hardware/8x80gb.yaml")["hardware"]
    assert (found["count"], found["sharded"]) == (8, True)
    assert plan("llama3-8b", "--trainer.devices", "[0,3]", "--trainer.num_nodes", "2")["hardware"]["count"] == 4
    assert plan("llama3-8b", "--trainer.devices", "0,3")["hardware"]["count"] == 2
    assert plan("llama3-8b", "--trainer.devices", "auto")["hardware"]["count"] == 1
    one, two = (plan("llama3-8b", "--gpu", "cpu", "--count", count)["hardware"]["bytes"] for count in "12")
    assert two == one // 2
    two = plan("llama3-8b", "-c", "experiments/configs/hardware/8x80gb.yaml", "--count", "2")["hardware"]
    assert two["count"] == 2


def test_bases_between_layers_are_not_dropped_to_save_memory(plan):
    shared, online = (
        [change["change"] for change in plan("llama3-70b", "--model.placement", placement)["changes"]]
        for placement in ("shared", "per_layer")
    )
    assert any("--model.spaces [value_heads]" in change for change in shared)
    assert not any("--model.spaces" in change for change in online)


def test_epochs_count_as_steps(plan):
    def rows(*options: str) -> str:
        return plan("llama3-8b", *options)["memory"]["host_phases"]["learning"][0]["formula"]

    assert rows("--trainer.max_steps", "5").startswith("rows · T · d · s = 5 ·")
    assert rows("--trainer.max_steps", "-1", "--trainer.max_epochs", "2").startswith("rows · T · d · s = 640 ·")


def test_optimizers_and_spaces_count(plan):
    adam = plan("llama3-8b")["memory"]["resident"]
    sgd = plan("llama3-8b", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9")
    heads = plan("llama3-8b", "--model.spaces", "[value_heads]")
    states = [next(term["amount"] for term in terms if term["name"] == "optimiser states")
              for terms in (adam, sgd["memory"]["resident"], heads["memory"]["resident"])]  # fmt: skip
    assert states[1] * 2 == states[0]
    assert states[2] == 2 * 4 * 32 * 8 * 128 * 127 // 2


def test_a_second_fit_holds_the_dense_model_beside_its_own(plan):
    one, both = (plan("llama3-8b", *more, "--gpu", "rtx4090-24gb") for more in ([], ["--second_fit.steps", "60"]))
    assert one["second_fit"] is None
    second = both["second_fit"]
    assert both["memory"] == one["memory"]
    assert second["steps"] == 60
    teacher = next(term for term in second["memory"]["resident"] if term["name"] == "teacher weights")
    assert second["memory"]["peak"] == one["memory"]["peak"] + teacher["amount"]
    assert teacher["amount"] == 2 * one["parameters"]
    assert "update" not in " ".join(second["memory"]["host_phases"])
    disk = {term["name"]: term["amount"] for term in both["disk"]}
    assert {name: amount for name, amount in disk.items() if not name.endswith("second fit")} == {
        term["name"]: term["amount"] for term in one["disk"]
    }
    assert disk["export, second fit"] == disk["export"]
    peaks = {change["change"]: change["peak"] for change in both["changes"]}
    assert peaks["--second_fit null"] == one["memory"]["peak"]
    assert not any("ModelParallel" in change for change in peaks)


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
        (["--model.compensate", "1000"], ["compensate 1000", "128"]),
        (["--model.surrogate.name", "gumbel"], ["gumbel"]),
        (["--model.gradient_checkpointing", "false", "--model.offload", "true"], ["offload", "gradient_checkpointing"]),
        ([*OFFLOAD, *SHARDS], ["offload", "ModelParallelStrategy"]),
        (["--trainer.accumulate_grad_batches", "4"], ["accumulate_grad_batches is 4", "leave it out"]),
        (["--model.objective", "{kl: 0, cross_entropy: 0, cosine: 0, entropy: 1}"], ["this objective needs none"]),
        (["--data.seq_len", "100000"], ["100000", "4096"]),
        (["--model.model", "/no/model"], ["/no/model"]),
        (["--model.banana", "1"], ["banana"]),
        (["--second_fit.steps", "5", "--model.compensate", "0"], ["second_fit", "compensate is 0"]),
        (["--second_fit.steps", "5", *SHARDS], ["second_fit", "ModelParallelStrategy", "ddp"]),
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
