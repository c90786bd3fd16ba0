"""What the command line refuses: in one line, with status 2, before anything is written."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from command_line import refused
from conftest import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.__main__ import main
from rotpruner.errors import InputError
from rotpruner.loading import load_model
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import random_rotations

ENDLESS = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"]


def test_commands_compute_in_true_float32():
    torch.set_float32_matmul_precision("high")
    try:
        assert main(["evaluate", "--model", "/no/model", "--text", "wikipedia_test"]) == 2
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        (dict(pattern="5:4"), ["5:4"]),
        (dict(pattern="2:5"), ["2:5", "32"]),
        (dict(pattern="1.5"), ["1.5"]),
        (dict(pattern="banana"), ["banana"]),
        (dict(pruner="banana"), ["banana", "wanda"]),
        (dict(seq_len=0), ["0", "seq_len"]),
        (dict(seq_len=100_000), ["100000", "128"]),
        (dict(num_sequences=-3), ["-3", "num_sequences"]),
        (dict(num_sequences=5000), ["5000"]),
        (dict(seed=-1), ["-1", "seed"]),
        (dict(calibration="/no/such.txt"), ["/no/such.txt"]),
        (dict(rotations="/no/rotations"), ["/no/rotations"]),
        (dict(model="/no/model"), ["/no/model"]),
        (dict(model="no" * 200 + "/model"), ["cannot load", "check the name"]),
        (dict(scope="column"), ["column", "row"]),
        (dict(layer_sparsity="owl"), ["owl", "2:4"]),
        (dict(layer_sparsity="owl", pattern="0.95"), ["0.95"]),
        (dict(banana=1), ["banana"]),
        (dict(output=__file__ + "/pruned"), ["/pruned", "test_refusals.py"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prune_refuses(prune, capsys, changes, mentions):
    status, output = prune(**changes)
    refused(status, output, capsys, *mentions)


def test_prune_refuses_damaged_models_and_texts(prune, capsys, tmp_path, tokenizer):
    poisoned = tiny_llama()
    poisoned.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    poisoned.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    refused(*prune(model=tmp_path / "nan"), capsys, "model.layers.1.mlp.up_proj.weight", "NaN")

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=32)).save_pretrained(tmp_path / "gpt2")
    refused(*prune(model=tmp_path / "gpt2"), capsys, "gpt2", "llama")

    tiny_llama().model.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    refused(*prune(model=tmp_path / "headless"), capsys, "lacks lm_head.weight")
    biased = tmp_path / "biased"
    tiny_llama(attention_bias=True).save_pretrained(biased)
    tokenizer.save_pretrained(biased)
    config = json.loads((biased / "config.json").read_text())
    (biased / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    refused(*prune(model=biased), capsys, "self_attn.k_proj.bias", "config.json")
    (biased / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused(*prune(model=biased), capsys, "gptq", "16-bit")

    (tmp_path / "nan" / "model.safetensors").write_bytes(b"not a checkpoint")
    refused(*prune(model=tmp_path / "nan"), capsys, "cannot load")

    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    refused(*prune(calibration=tmp_path / "binary.txt"), capsys, "binary.txt")
    (tmp_path / "short.txt").write_text("few words")
    refused(*prune(calibration=tmp_path / "short.txt"), capsys, "short.txt", "32")


def test_prune_refuses_rotations_of_another_model(prune, fit, capsys, tmp_path, tokenizer):
    _, run = fit()
    capsys.readouterr()
    torch.manual_seed(5)
    other = tiny_llama()
    other.model.embed_tokens.weight.data.normal_()
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    refused(*prune(model=tmp_path / "other", rotations=run / "rotations"), capsys, "another model")
    (run / "rotations" / "rotations.safetensors").write_bytes(b"x" * 50)
    refused(*prune(rotations=run / "rotations"), capsys, "damaged")


def test_prune_refuses_what_a_slice_or_masks_would_ignore(prune, capsys, tmp_path):
    for changes in (dict(update="sparsegpt"), dict(statistics="dense")):
        # `pruner` has a default in the fixture, and comes first among what a slice refuses.
        arguments = ["prune", "--model", "smollm2-135m", "--pattern", "slice:0.3", "--output", str(tmp_path / "x")]
        assert main([*arguments, *(item for key, value in changes.items() for item in (f"--{key}", value))]) == 2
        assert f"leave --{next(iter(changes))} {next(iter(changes.values()))} out" in capsys.readouterr().err
    refused(*prune(placement="per_block"), capsys, "--placement per_block", "2:4")
    refused(*prune(scope="layer"), capsys, "pattern 2:4 has none: leave scope layer out")
    refused(*prune(scope="layer", pattern="slice:0.3"), capsys, "pattern slice:0.3 has none: leave scope layer out")


def test_prune_does_not_overwrite(prune, capsys, tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "thesis.txt").write_text("mine")
    status, output = prune()
    assert status == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_one_line(prune, capsys, tmp_path):
    """A real one, of sixteen kilobytes, where this process may mount it."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        status, _ = prune(output=small / "pruned")
        assert status == 2
        assert "disk is full" in capsys.readouterr().err.splitlines()[-1]
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        (["--text", "/no/such.txt"], ["/no/such.txt"]),
        (["--seq_len", "0"], ["0", "seq_len"]),
        (["--seq_len", "500"], ["500", "128"]),
        (["--max_tokens", "-1"], ["-1"]),
        (["--max_tokens", "20"], ["max_tokens 20", "seq_len 32", "leave it out"]),
        (["--limit", "2"], ["--limit", "--tasks"]),
        (["--banana"], ["banana"]),
    ],
    ids=lambda value: "".join(value[:2]),
)
def test_evaluate_refuses(changes, mentions, model_directory, test_text_file, capsys, tmp_path):
    arguments = ["--model", str(model_directory), "--text", str(test_text_file), "--seq_len", "32", *changes]
    refused(main(["evaluate", *arguments]), tmp_path / "nothing", capsys, *mentions)


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        (["--model.pattern", "5:4"], ["5:4"]),
        (["--model.pattern", "2:5"], ["2:5"]),
        (["--model.pattern", "1.5"], ["1.5"]),
        (["--model.pattern", "banana"], ["banana"]),
        (["--model.pruner", "banana"], ["banana"]),
        (["--model.spaces", "[attic]"], ["attic"]),
        (["--model.spaces", "[]"], ["spaces"]),
        (["--model.surrogate.name", "banana"], ["banana"]),
        (["--model.surrogate", "{name: sigmoid, temperature: 0.01}"], ["temperature 0.01"]),
        ([*ENDLESS, "--model.surrogate.name", "sigmoid", "--model.lr_scheduler", "constant"], ["sigmoid", "no end"]),
        (ENDLESS, ["cosine", "set trainer.max_steps"]),
        (["--model.surrogate.name", "sigmoid", "--model.pruner", "alps"], ["sigmoid", "ALPS"]),
        (["--model.surrogate.name", "gumbel", "--model.pattern", "0.5"], ["gumbel", "0.5"]),
        (["--model.objective.kl", "-1"], ["-1"]),
        (["--model.init_rotations", "/no/rotations"], ["/no/rotations"]),
        (["--model.banana", "1"], ["banana"]),
        (["--data.calibration", "/no/such.txt"], ["/no/such.txt"]),
        (["--data.num_sequences", "-2"], ["-2"]),
        (["--data.num_sequences", "4000"], ["4000"]),
        (["--data.seq_len", "0"], ["0"]),
        (["--data.seq_len", "1000", "--data.num_sequences", "2"], ["1000", "128"]),
        (["--data.batch_size", "9"], ["9"]),
        (["--trainer.callbacks.init_args.texts", "[/no/such.txt]"], ["/no/such.txt"]),
        (["--trainer.callbacks.init_args.seq_len", "300"], ["300", "128"]),
        (["--model.base_dtype", "float16"], ["float16"]),
        (["--trainer.max_steps", "0"], ["max_steps 0"]),
        (["--trainer.precision", "bf16-true"], ["bf16-true", "model.base_dtype"]),
        (["--model.start", "pca", "--model.pruner", "magnitude"], ["pca", "Magnitude", "wanda"]),
    ],
    ids=lambda value: "".join(value[:2]) if value[0].startswith("--") else "",
)
def test_fit_refuses(fit, capsys, changes, mentions):
    status, run = fit(*changes)
    refused(status, run, capsys, *mentions)


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        (["--model.placement", "shared"], ["3 matrices", "placement"]),
        (["--model.placement", "3", "--model.spaces", "[residual]"], ["value_heads", "spaces"]),
    ],
)
def test_fit_refuses_rotations_that_it_cannot_go_on_from(prepared, capsys, tmp_path, changes, mentions, fit):
    status, run = fit("--model.init_rotations", str(prepared), *changes)
    refused(status, run, capsys, *mentions)


@pytest.fixture
def prepared(model_directory, tmp_path):
    """Rotations of the tiny model, three matrices of the residual stream."""
    model = load_model(model_directory)
    drawn = random_rotations(model.config, ["residual", "value_heads"], 0, placement=3)
    Rotations.of(drawn, model).save_pretrained(tmp_path / "rotations")
    return tmp_path / "rotations"


def test_fit_hints_at_unquoted_patterns(fit, capsys, tmp_path):
    (tmp_path / "unquoted.yaml").write_text("model: {pattern: 2:4}\n")
    status, run = fit("-c", str(tmp_path / "unquoted.yaml"))
    refused(status, run, capsys, "quote")


def test_an_unknown_update_is_refused_before_anything_is_gathered(prune, capsys):
    status, output = prune(update="magic", statistics="dense")
    assert status == 2
    assert not output.exists()
    error = capsys.readouterr().err
    assert "unknown pruner 'magic'" in error
    assert "calibration" not in error
    refused(*prune(update="wanda"), capsys, "Wanda updates no weights", "sparsegpt")


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_inputs_that_overflow_are_refused(pruner):
    """Else masks would be chosen by comparisons with NaN."""
    model = tiny_llama().half()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(6e4)
    with pytest.raises(InputError, match=r"layers.1.self_attn.q_proj overflow float16.* bfloat16"):
        prune_model(model, resolve_pruner(pruner), parse_pattern("2:4"), [torch.arange(16)[None]])


def test_code_beside_a_checkpoint_is_not_run(model_directory, tmp_path):
    directory, mark = tmp_path / "novel", tmp_path / "mark"
    shutil.copytree(model_directory, directory)
    classes = "from transformers import LlamaConfig as C, LlamaForCausalLM as M"
    (directory / "code.py").write_text(f"open({str(mark)!r}, 'w')\n{classes}\n")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load_model(directory)
    assert not mark.exists()
