"""A small OPT, trained here on the embedded text, through fit and out as an ordinary checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import byte_bpe
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from datamodules.texts import text_of
from experiments.__main__ import main
from rotpruner.measures import pattern_of
from rotpruner.perplexity import windows

pytestmark = pytest.mark.slow


def train_opt(text: str, directory) -> None:
    """Byte-level BPE of 512 tokens, two blocks of width 64, half a minute of Adam."""
    fast = byte_bpe(text, 512)
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        dropout=0.0,
    )
    model = OPTForCausalLM(config)
    rows = windows(torch.tensor(fast(text, add_special_tokens=False).input_ids), 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 400)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)


def test_small_opt_through_fit_and_export(tmp_path, capsys):
    train_opt(text_of("wikipedia_calibration", "calibration")[:600_000], tmp_path / "opt")
    run = tmp_path / "run"
    arguments = [
        *("-c", "experiments/configs/opt-125m.yaml", "--model.model", str(tmp_path / "opt")),
        *("--model.base_dtype", "float32", "--trainer.accelerator", "cpu"),
        *("--data.calibration", "wikipedia_calibration", "--data.num_sequences", "32", "--data.seq_len", "128"),
        *("--data.statistics_sequences", "32", "--model.compensate", "8"),
        *("--trainer.max_steps", "150", "--trainer.default_root_dir", str(run)),
        *("--trainer.callbacks.init_args.texts", "[wikipedia_test]", "--trainer.callbacks.init_args.seq_len", "128"),
        *("--trainer.callbacks.init_args.max_tokens", "16384"),
    ]
    assert main(["fit", *arguments]) == 0
    ppl = {row["name"]: row["ppl"]["wikipedia_test"] for row in json.loads((run / "results.json").read_text())["rows"]}
    with capsys.disabled():
        print("\n", {name: round(value, 2) for name, value in ppl.items()})
    assert ppl["dense"] < 100  # it has learned: a uniform guess is 512
    assert ppl["rotpruner"] < ppl["pruner"]
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert type(exported) is OPTForCausalLM
    assert pattern_of(exported) == "2:4"
