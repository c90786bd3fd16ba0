"""The command line is a contract: what it prints and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama
from perplexity_oracle import independent_perplexity
from tiny_models import MODELS, tiny
from transformers import AutoModelForCausalLM

from experiments.__main__ import main
from rotpruner.layout import linear_modules
from rotpruner.loading import load_model
from rotpruner.measures import sparsity_of
from rotpruner.patterns import parse_pattern
from rotpruner.surrogates import likeliest_mask


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("0.75", 0.75), ("0.0", 0.0), ("1:8", 0.875)])
def test_prune_prints_json_and_writes_a_plain_checkpoint(prune, capsys, pattern, sparsity):
    status, output = prune(pattern=pattern)
    printed = capsys.readouterr().out
    assert status == 0
    result = json.loads(printed)
    assert set(result) == {"output", "pattern", "sparsity", "seconds", "dtype", "device", "parameters"}
    assert result["dtype"] == "float32"
    assert result["sparsity"] == pytest.approx(sparsity, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sparsity_of(model) == result["sparsity"]
    assert model.config.tie_word_embeddings


def test_outlier_sparsities_differ_by_block_and_keep_the_mean(prune):
    status, output = prune(pattern="0.5", layer_sparsity="owl")
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    zeros = [
        torch.cat([module.weight.flatten() for module in block.modules() if isinstance(module, torch.nn.Linear)]) == 0
        for block in model.model.layers
    ]
    first, second = (block.float().mean().item() for block in zeros)
    assert first != second
    assert (first + second) / 2 == pytest.approx(0.5, abs=0.01)


def test_rotate_only_keeps_the_function(prune, capsys, model_directory):
    status, output = prune(pattern="0.0", rotations="random")
    assert status == 0
    ids = torch.arange(64).view(2, 32)
    dense, rotated = (AutoModelForCausalLM.from_pretrained(path) for path in (model_directory, output))
    assert (dense(input_ids=ids).logits - rotated(input_ids=ids).logits).abs().max() < 1e-4
    assert not torch.allclose(dense.model.layers[0].mlp.up_proj.weight, rotated.model.layers[0].mlp.up_proj.weight)
    assert not rotated.config.tie_word_embeddings


def test_evaluate_prints_one_json_object(model_directory, text_file, test_text_file):
    command = [sys.executable, "-m", "experiments", "evaluate", "--model", str(model_directory), "--json"]
    texts = ["--text", str(text_file), "--text", str(test_text_file)]
    limits = ["--seq_len", "32", "--max_tokens", "200"]
    done = subprocess.run([*command, *texts, *limits], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert set(result) == {"dtype", "ppl", "tokens"}
    assert set(result["ppl"]) == {"words", "other_words"}
    assert result["tokens"] == {"words": 192, "other_words": 192}
    assert all(200 < value < 1000 for value in result["ppl"].values())


def test_fit_of_the_papers_placement_counts_what_stays_online(fit, capsys):
    assert fit("--model.placement", "5000")[0] == 2
    assert "up to 5" in capsys.readouterr().err
    status, run = fit("--model.placement", "per_block")
    assert status == 0
    learned = json.loads((run / "results.json").read_text())["rows"][-1]
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    assert type(model).__name__ == "RotatedLlamaForCausalLM"
    changes = 2 * model.config.num_hidden_layers
    assert learned["online_flops"] == 2 * changes * model.config.hidden_size**2
    drawn = json.loads((run / "results.json").read_text())["rows"][-2]
    assert (drawn["name"], drawn["online_flops"]) == ("random_rotation", learned["online_flops"])
    assert "online" in capsys.readouterr().err
    assert "trust_remote_code=True" in (run / "export" / "README.md").read_text()
    assert (run / "export" / "modeling_rotated.py").is_file()


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_fit_exports_the_masks_that_it_has_learned(pruner, fit):
    # Without a prior from the pruner, so that its own masks would not pass for the learned ones.
    surrogate = "{name: gumbel, strength: 0}"
    controls = ["--trainer.callbacks.init_args.controls", "[]"]
    checkpoint = ["--trainer.callbacks+", "callbacks.rotation_checkpoint.RotationCheckpoint"]
    status, run = fit("--model.surrogate", surrogate, "--model.pruner", pruner, *controls, *checkpoint)
    assert status == 0
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    logits = [value for name, value in state.items() if name.startswith("rotated.relaxation.logits.")]
    exported = linear_modules(AutoModelForCausalLM.from_pretrained(run / "export"))
    assert len(logits) == len(exported) == 14
    for found, module in zip(logits, exported.values(), strict=True):
        assert len(found.argmax(-1).unique()) == 6
        assert torch.equal(module.weight != 0, likeliest_mask(found, parse_pattern("2:4")))
    assert "learned together with the rotations" in (run / "export" / "README.md").read_text()


def test_fit_writes_results_and_export_and_is_shown_again(fit, capsys, prune):
    status, run = fit()
    assert status == 0
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"rows", "budget", "evaluation", "config", "commit", "device"}
    learned = 32 * 31 // 2 + 2 * 2 * 8 * 7 // 2
    assert results["budget"] == {
        "steps": 2,
        "training_tokens": 2 * 32,
        "trainable_parameters": learned,
        "global_batch": 1,
    }
    assert [row["name"] for row in results["rows"]] == ["dense", "pruner", "random_rotation", "rotpruner"]
    for row in results["rows"]:
        assert set(row) == {"name", "pattern", "sparsity", "seconds", "ppl", "parameters", "online_flops"}
        assert row["sparsity"] == (0 if row["name"] == "dense" else 0.5)
    assert results["config"]["trainer"]["max_steps"] == 2
    dense, pruned, drawn, learned = (row["parameters"] for row in results["rows"])
    assert dense == pruned < drawn == learned, "the untied head must be counted"
    assert len({row["ppl"]["other_words"] for row in results["rows"]}) == 4, "each row is a model of its own"
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert sparsity_of(exported) == 0.5

    written = (run / "results.json").stat().st_mtime_ns
    assert fit()[0] == 0
    assert "rotpruner" in capsys.readouterr().err
    assert (run / "results.json").stat().st_mtime_ns == written
    assert fit("--trainer.max_steps", "3")[0] == 2
    complaint = " ".join(capsys.readouterr().err.split())
    assert "another configuration" in complaint
    assert "trainer.max_steps is 2 instead of 3; choose another" in complaint
    # Where statistics come from and what is computed twice change nothing.
    same = ["--model.cache_dense", "true", "--model.gradient_checkpointing", "true", "--model.offload", "true"]
    assert fit(*same)[0] == 0
    assert (run / "results.json").stat().st_mtime_ns == written

    # The rotations of the run prune the model to the same export, by hand.
    config = results["config"]
    status, output = prune(rotations=run / "rotations", seed=config["seed_everything"], statistics="dense")
    assert status == 0
    by_hand = AutoModelForCausalLM.from_pretrained(output)
    for (name, weight), other in zip(exported.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_pruner_row_equals_the_prune_command(fit, prune, capsys, test_text_file):
    _, run = fit()
    row = json.loads((run / "results.json").read_text())["rows"][1]
    _, output = prune(seed=0)
    capsys.readouterr()
    arguments = ["--model", output, "--text", test_text_file, "--seq_len", 32, "--max_tokens", 256, "--json"]
    assert main(["evaluate", *map(str, arguments)]) == 0
    assert json.loads(capsys.readouterr().out)["ppl"]["other_words"] == pytest.approx(row["ppl"]["other_words"])


@pytest.mark.parametrize(
    ("pruner", "statistics", "compensate"),
    [("wanda", "dense", 0), ("sparsegpt", "sequential", 0), ("wanda", "dense", 2)],
)
def test_the_export_is_what_the_prune_command_gives_on_the_first_sequences(pruner, statistics, compensate, fit, prune):
    """The pruner sees `statistics_sequences`, not all that is learned on; if it rebuilds, pruned predecessors."""
    more = ["--data.num_sequences", "6", "--data.statistics_sequences", "3", "--model.compensate", str(compensate)]
    _, run = fit("--model.pruner", pruner, *more, "--trainer.callbacks.init_args.controls", "[]")
    row = json.loads((run / "results.json").read_text())["rows"][-1]
    settings = dict(pruner=pruner, statistics=statistics, compensate=compensate, num_sequences=3)
    _, output = prune(rotations=run / "rotations", **settings)
    for one, other in zip(*(load_model(path).parameters() for path in (run / "export", output)), strict=True):
        torch.testing.assert_close(one, other)
    assert row.get("step_length", 0) > 0 if compensate else "step_length" not in row


def test_a_fit_prunes_in_the_scope_that_it_is_told(fit):
    _, run = fit("--model.pattern", "0.5", "--model.scope", "layer", "--trainer.callbacks.init_args.controls", "[]")
    kept = (load_model(run / "export").model.layers[0].self_attn.q_proj.weight != 0).sum(1)
    assert len(kept.unique()) > 1


def test_scope_update_and_seed_are_not_ignored(prune, tmp_path):
    def weights(name, **changes):
        status, output = prune(output=tmp_path / name, **changes)
        assert status == 0
        return load_model(output).model.layers[0].self_attn.q_proj.weight

    for scope, alike in (("row", True), ("layer", False)):
        kept = (weights(scope, pattern="0.5", scope=scope) != 0).sum(1)
        assert (len(kept.unique()) == 1) is alike
    plain, updated, other = weights("plain"), weights("updated", update="sparsegpt"), weights("seed", seed=1)
    assert torch.equal(plain != 0, updated != 0)
    assert not torch.equal(plain, updated)
    assert not torch.equal(plain != 0, other != 0)


def test_16_bit_models_are_calibrated_in_their_own_dtype_and_measured_in_float32(
    prune, model_directory, test_text_file, tokenizer, tmp_path, capsys
):
    load_model(model_directory).bfloat16().save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    for model, asked in ((tmp_path / "narrow", "float32"), (model_directory, "bfloat16")):
        output, measured = tmp_path / asked, dict(text=test_text_file, max_tokens=256)
        assert prune(model=model, calibration_dtype=asked, output=output, **measured)[0] == 0
        result = json.loads(capsys.readouterr().out)
        assert result["dtype"] == "bfloat16"
        expected = independent_perplexity(output, test_text_file.read_text(), 32, 256)
        assert result["ppl"]["other_words"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("surrogate", ["constant", "gumbel"])
def test_controls_are_what_prune_makes_of_the_same_model(surrogate, fit, prune, test_text_file, capsys):
    """Whatever has been learned: rotations, or masks too."""
    controls = ["--trainer.callbacks.init_args.controls", "[pruner, start]"]
    begun = ["--model.start", "permutation", "--model.spaces", "[residual, value_heads, mlp]"]
    status, run = fit(*begun, *controls, "--model.surrogate.name", surrogate)
    assert status == 0
    found = {row["name"]: row["ppl"]["other_words"] for row in json.loads((run / "results.json").read_text())["rows"]}
    measured = dict(text=test_text_file, max_tokens=256, output=run / "pruned")
    capsys.readouterr()
    assert prune(**measured)[0] == 0
    assert json.loads(capsys.readouterr().out)["ppl"]["other_words"] == pytest.approx(found["pruner"], rel=1e-6)
    assert len(set(found.values())) == 4


def test_checkpoints_in_bfloat16_are_measured_in_float32(fit, tokenizer, test_text_file, tmp_path, capsys):
    """As real LLaMA checkpoints are; the export keeps their dtype."""
    tiny_llama().bfloat16().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    text = test_text_file.read_text()
    _, run = fit("--model.model", str(tmp_path / "dense"), "--trainer.callbacks.init_args.controls", "[]")
    rows = json.loads((run / "results.json").read_text())["rows"]
    capsys.readouterr()
    assert load_model(run / "export").dtype == torch.bfloat16
    for directory, row in zip((tmp_path / "dense", run / "export"), rows, strict=True):
        arguments = ["--model", directory, "--text", test_text_file, "--seq_len", 32, "--max_tokens", 256, "--json"]
        assert main(["evaluate", *map(str, arguments)]) == 0
        expected = independent_perplexity(directory, text, 32, 256)
        assert row["ppl"]["other_words"] == pytest.approx(expected, rel=1e-6)
        assert json.loads(capsys.readouterr().out)["ppl"]["other_words"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["opt", "gemma-2"])
def test_other_families_are_rotated_from_the_command_line(name, prune, tokenizer, tmp_path):
    model = tiny(name, vocab_size=320, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    status, output = prune(model=tmp_path / "dense", pattern="0.0", rotations="random")
    assert status == 0
    rotated = AutoModelForCausalLM.from_pretrained(output)
    assert type(rotated) is type(model)
    ids = torch.arange(48).view(2, 24)
    assert (model(input_ids=ids).logits - rotated(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["opt", "qwen3", "gemma-2"])
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_fit_of_other_families_exports_their_own_class_half_sparse(name, pruner, fit, tokenizer, tmp_path):
    model = tiny(name, vocab_size=320, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    spaces = ["--model.spaces", "[" + ", ".join(MODELS[name][2]) + "]"]
    start = ["--model.start", "permutation", "--trainer.callbacks.init_args.controls", "[]"]
    status, run = fit("--model.model", str(tmp_path / "dense"), "--model.pruner", pruner, *spaces, *start)
    assert status == 0
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert type(exported) is type(model)
    assert sparsity_of(exported) == 0.5
    assert torch.isfinite(exported(input_ids=torch.arange(24)[None]).logits).all()
