"""Every shipped config and variant runs, or instantiates where its model is too large."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama
from transformers import LlamaConfig, OPTConfig

from lightning_modules.rotation_module import RotationModule
from rotpruner.loading import load_config, meta_model
from rotpruner.rotations import LearnedRotations

CONFIGS = sorted(Path("experiments/configs").glob("*.yaml"))
WITHOUT_CONTROLS = ["--trainer.callbacks.init_args.controls", "[]"]
VARIANTS = sorted(Path("experiments/configs/variants").glob("*.yaml"))


@pytest.fixture(scope="module")
def roomy(tmp_path_factory, tokenizer) -> list[str]:
    """Arguments for a tiny model that has positions for the windows that configs say."""
    directory = tmp_path_factory.mktemp("models") / "roomy"
    tiny_llama(tie_word_embeddings=True, max_position_embeddings=2048).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return ["--model.model", str(directory)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_runs_two_steps_with_tiny_overrides(config, fit, roomy):
    settings = yaml.safe_load(config.read_text())
    few = ["--model.compensate", "2"] if settings["model"].get("compensate") else []
    few += ["--data.statistics_sequences", "4"] if "statistics_sequences" in settings["data"] else []
    few += ["--second_fit.steps", "1"] if settings.get("second_fit") else []
    few += WITHOUT_CONTROLS if config.stem != "quickstart" else []
    status, run = fit(*few, *roomy, configs=[config])
    assert status == 0
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    updated = rows.get("first_fit", rows["rotpruner"])
    assert ("step_length" in updated) == ("--model.compensate" in few)
    assert ("first_fit" in rows) == bool(settings.get("second_fit"))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.stem)
def test_every_variant_goes_on_top_of_the_smollm2_config(variant, fit, roomy):
    few = ["--data.num_sequences", "4", "--data.statistics_sequences", "4"]
    few += [] if "compensate" in yaml.safe_load(variant.read_text()).get("model", {}) else ["--model.compensate", "2"]
    few += ["--second_fit.steps", "1"] if variant.stem == "second-fit" else []
    few += WITHOUT_CONTROLS
    status, run = fit(*few, *roomy, configs=[Path("experiments/configs/smollm2-135m.yaml"), variant])
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
