"""The command line is a contract: what it prints and writes, and what it refuses in one line, with status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama
from tiny_models import MODELS, tiny
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, OPTConfig

from experiments.__main__ import main
from lightning_modules.rotation_module import RotationModule
from rotpruner.families import linear_modules
from rotpruner.loading import load_config, meta_model
from rotpruner.oneshot import sparsity_of
from rotpruner.patterns import parse_pattern
from rotpruner.rotations import LearnedRotations
from rotpruner.surrogates import likeliest_mask

CONFIGS = sorted(Path("experiments/configs").glob("*.yaml"))
VARIANTS = sorted(Path("experiments/configs/variants").glob("*.yaml"))


@pytest.fixture
def prune(model_directory, text_file, tmp_path):
    """`prune(**changes)` → (status, output directory), from arguments that work."""

    def run(**changes) -> tuple[int, Path]:
        options = dict(
            model=model_directory,
            pruner="wanda",
            pattern="2:4",
            calibration=text_file,
            num_sequences=4,
            seq_len=32,
            seed=0,
            output=tmp_path / "pruned",
        )
        options.update(changes)
        arguments = [item for key, value in options.items() for item in (f"--{key}", str(value))]
        return main(["prune", *arguments, "--json"]), Path(options["output"])

    return run


def fit_arguments(model_directory, text_file, test_text_file, run) -> list[str]:
    tiny = {
        "--model.model": model_directory,
        "--model.base_dtype": "float32",
        "--data.calibration": text_file,
        "--data.num_sequences": 4,
        "--data.seq_len": 32,
        "--trainer.accelerator": "cpu",
        "--trainer.max_steps": 2,
        "--trainer.default_root_dir": run,
        "--trainer.callbacks.init_args.texts": f"[{test_text_file}]",
        "--trainer.callbacks.init_args.seq_len": 32,
        "--trainer.callbacks.init_args.max_tokens": 256,
    }
    return [str(item) for pair in tiny.items() for item in pair]


@pytest.fixture
def fit(model_directory, text_file, test_text_file, tmp_path):
    """`fit(*changes)` → (status, run directory), from the quickstart with tiny overrides."""

    def run(
        *changes: str, configs: Sequence[Path] = (Path("experiments/configs/quickstart.yaml"),)
    ) -> tuple[int, Path]:
        directory = tmp_path / "run"
        given = fit_arguments(model_directory, text_file, test_text_file, directory)
        files = [item for config in configs for item in ("-c", str(config))]
        return main(["fit", *files, *given, *changes]), directory

    return run


# -- what works ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("0.75", 0.75), ("0.0", 0.0), ("1:8", 0.875)])
def test_prune_prints_json_and_writes_a_plain_checkpoint(prune, capsys, pattern, sparsity):
    status, output = prune(pattern=pattern)
    printed = capsys.readouterr().out
    assert status == 0
    result = json.loads(printed)
    assert set(result) == {"output", "pattern", "sparsity", "seconds", "parameters"}
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
    assert set(result) == {"ppl", "tokens"}
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
    assert set(results) == {"rows", "config", "commit"}
    assert [row["name"] for row in results["rows"]] == ["dense", "pruner", "random_rotation", "rotpruner"]
    for row in results["rows"]:
        assert set(row) == {"name", "pattern", "sparsity", "seconds", "ppl", "parameters", "online_flops"}
        assert row["sparsity"] == (0 if row["name"] == "dense" else 0.5)
    assert results["config"]["trainer"]["max_steps"] == 2
    dense, pruned, _, learned = (row["parameters"] for row in results["rows"])
    assert dense == pruned < learned, "the untied head must be counted"
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert sparsity_of(exported) == 0.5

    written = (run / "results.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        fit()
    assert stop.value.code == 0
    assert "rotpruner" in capsys.readouterr().err
    assert (run / "results.json").stat().st_mtime_ns == written
    assert fit("--trainer.max_steps", "3")[0] == 2
    assert "another configuration" in capsys.readouterr().err

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


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_rotated_from_the_command_line(name, prune, tokenizer, tmp_path):
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
def test_fit_of_other_families(name, pruner, fit, tokenizer, tmp_path):
    model = tiny(name, vocab_size=320, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    spaces = ["--model.spaces", "[" + ", ".join(MODELS[name][2]) + "]"]
    start = ["--model.start", "permutation"]
    status, run = fit("--model.model", str(tmp_path / "dense"), "--model.pruner", pruner, *spaces, *start)
    assert status == 0
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert type(exported) is type(model)
    assert sparsity_of(exported) == 0.5
    assert torch.isfinite(exported(input_ids=torch.arange(24)[None]).logits).all()


# -- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_runs_two_steps_with_tiny_overrides(config, fit):
    settings = yaml.safe_load(config.read_text())
    few = ["--model.compensate", "2"] if settings["model"].get("compensate") else []
    few += ["--data.statistics_sequences", "4"] if "statistics_sequences" in settings["data"] else []
    status, run = fit(*few, configs=[config])
    assert status == 0
    assert ("step_length" in json.loads((run / "results.json").read_text())["rows"][-1]) == (
        "--model.compensate" in few
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.stem)
def test_every_variant_goes_on_top_of_the_smollm2_config(variant, fit):
    few = ["--data.num_sequences", "4", "--data.statistics_sequences", "4"]
    few += [] if "compensate" in yaml.safe_load(variant.read_text())["model"] else ["--model.compensate", "2"]
    status, run = fit(*few, configs=[Path("experiments/configs/smollm2-135m.yaml"), variant])
    assert status == 0
    assert (run / "results.json").is_file()


LLAMA_HEADS = dict(num_hidden_layers=32, num_attention_heads=32, hidden_size=4096)
LARGE = {
    "llama2-7b": LlamaConfig(**LLAMA_HEADS, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000),
    "llama3-8b": LlamaConfig(**LLAMA_HEADS, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
    "opt-125m": OPTConfig(num_hidden_layers=12, num_attention_heads=12, hidden_size=768, ffn_dim=3072),
    "opt-1.3b": OPTConfig(num_hidden_layers=24, num_attention_heads=32, hidden_size=2048, ffn_dim=8192),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_configs_instantiate_without_memory(name, tmp_path):
    LARGE[name].save_pretrained(tmp_path)
    settings = yaml.safe_load(Path(f"experiments/configs/{name}.yaml").read_text())["model"]
    module = RotationModule(**{**settings, "model": str(tmp_path)})
    config = load_config(str(tmp_path))
    with torch.device("meta"):
        rotations = LearnedRotations(config, module.spaces)
    d = config.hidden_size - (config.model_type == "opt")  # OPT's rotation fixes one direction
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads) * config.num_hidden_layers
    width = config.hidden_size // config.num_attention_heads
    expected = d * (d - 1) // 2 + heads * width * (width - 1) // 2
    assert sum(p.numel() for p in rotations.parameters()) == expected
    assert all(p.is_meta for p in meta_model(config).parameters())


# -- what is refused -------------------------------------------------------------------------------


def refused(status: int, written: Path, capsys, *mentions: str) -> None:
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert all(mention in lines[0] for mention in mentions), lines[0]
    assert not written.exists()


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
        (dict(scope="column"), ["column", "row"]),
        (dict(layer_sparsity="owl"), ["owl", "2:4"]),
        (dict(layer_sparsity="owl", pattern="0.95"), ["0.95"]),
        (dict(banana=1), ["banana"]),
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
        (["--max_tokens", "20"], ["20", "too short"]),
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
        (["--model.surrogate.name", "sigmoid", "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], ["sigmoid"]),
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
    ],
    ids=lambda value: "".join(value[:2]) if value[0].startswith("--") else "",
)
def test_fit_refuses(fit, capsys, changes, mentions):
    status, run = fit(*changes)
    refused(status, run, capsys, *mentions)


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
