"""The embedded SmolLM2-135M on the embedded text, end to end: learning must pay, and the export must stand alone."""

from __future__ import annotations

import json

import pytest
from perplexity_oracle import independent_perplexity
from transformers import AutoModelForCausalLM

from experiments.__main__ import main
from rotpruner.embedded import text_path
from rotpruner.measures import pattern_of

pytestmark = pytest.mark.slow

QUICK = {
    "--data.num_sequences": 8,
    "--data.seq_len": 256,
    "--trainer.max_steps": 8,
    "--trainer.callbacks.init_args.seq_len": 256,
    "--trainer.callbacks.init_args.max_tokens": 2048,
    "--trainer.callbacks.init_args.controls": "[pruner]",
}


def test_quickstart_in_miniature_is_ahead_of_its_controls(tmp_path):
    run = tmp_path / "run"
    settings = [str(item) for pair in QUICK.items() for item in pair]
    arguments = ["-c", "experiments/configs/quickstart.yaml", *settings, "--trainer.default_root_dir", str(run)]
    assert main(["fit", *arguments]) == 0
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    ppl = {name: row["ppl"]["wikipedia_test"] for name, row in rows.items()}
    assert 10 < ppl["dense"] < 20
    assert ppl["rotpruner"] < 0.6 * ppl["pruner"]

    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert type(exported).__name__ == "LlamaForCausalLM"
    assert pattern_of(exported) == "2:4"
    assert not (run / "export" / "quantization_config.json").exists()
    text = text_path("wikipedia_test").read_text()
    alone = independent_perplexity(run / "export", text, 256, 2048)
    assert alone == pytest.approx(ppl["rotpruner"], rel=1e-3)
