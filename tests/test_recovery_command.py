"""The command `recover`: what it refuses, exports and shows, alone, resumed and on two ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from huggingface_hub import metadata_load
from lightning import Trainer
from processes import command, start_ranks
from safetensors.torch import load_file
from tiny_models import tiny
from wandb_file import OfflineRun

from datamodules.evaluation import token_ids
from experiments.__main__ import main
from experiments.report_runs import read_curves
from lightning_modules.recovery_module import RecoveryModule
from rotpruner.errors import InputError
from rotpruner.layout import linear_modules
from rotpruner.loading import load_model, load_tokenizer
from rotpruner.measures import pattern_of, sparsity_of
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.perplexity import perplexity
from rotpruner.pruners import resolve_pruner


@pytest.fixture
def recover(model_directory, text_file, test_text_file, tmp_path):
    """`recover(run)` → (status, run directory), of a model that was pruned first."""
    pruned = tmp_path / "pruned"
    settings = ["--model", model_directory, "--pruner", "magnitude", "--pattern", "2:4", "--calibration", text_file]
    assert main(["prune", *map(str, settings), "--seq_len", "32", "--num_sequences", "2", "--output", str(pruned)]) == 0
    config = yaml.safe_load(Path("experiments/configs/recovery/smollm2-135m.yaml").read_text())
    config["model"]["warmup_steps"] = 2
    config["trainer"]["callbacks"][1]["init_args"]["every_n_steps"] = 2
    config["trainer"]["callbacks"][2]["init_args"] = {"texts": [str(test_text_file)], "seq_len": 32, "max_tokens": 256}
    (tmp_path / "recovery.yaml").write_text(yaml.safe_dump(config))

    def run(name: str, *overlays: Path, more: Sequence[str] = (), by: Callable[[list[str]], Any] = main):
        settings = {
            "--model.model": pruned,
            "--model.teacher": model_directory,
            "--model.compute_dtype": "float32",
            "--data.calibration": text_file,
            "--data.num_sequences": 4,
            "--data.seq_len": 32,
            "--trainer.accelerator": "cpu",
            "--trainer.max_steps": 6,
            "--trainer.default_root_dir": tmp_path / name,
        }
        given = [str(item) for pair in settings.items() for item in pair]
        files = [item for file in (tmp_path / "recovery.yaml", *overlays) for item in ("-c", str(file))]
        return by(["recover", *files, *given, *more]), tmp_path / name

    return run


def test_recovery_replaces_neither_of_its_models(recover, model_directory, tmp_path, capsys):
    shutil.copytree(model_directory, tmp_path / "run" / "export")
    arguments = ["--model.teacher", str(tmp_path / "run" / "export")]
    assert recover("run", more=arguments)[0] == 2
    assert "would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "mention"),
    [
        (["--data.seq_len", "4096"], "4096"),
        (["--data.statistics_sequences", "2"], "statistics_sequences 2"),
        (["--trainer.precision", "bf16-mixed"], "bf16-mixed"),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], "last step"),
    ],
)
def test_recovery_refuses_what_does_not_go_with_it(more, mention, recover, capsys):
    status, run = recover("run", more=more)
    assert status == 2
    assert mention in capsys.readouterr().err
    assert not (run / "config.yaml").exists()


def test_recover_exports_what_it_learned_and_shows_it_again(recover, capsys):
    status, run = recover("run")
    assert status == 0
    dense, pruned, recovered = json.loads((run / "results.json").read_text())["rows"]
    assert [row["name"] for row in (dense, pruned, recovered)] == ["dense", "pruned", "recovered"]
    assert (dense["sparsity"], pruned["sparsity"], recovered["sparsity"]) == (0, 0.5, 0.5)
    assert (dense["pattern"], pruned["pattern"], recovered["pattern"]) == (None, "2:4", "2:4")
    assert recovered["ppl"] != pruned["ppl"]
    budget = json.loads((run / "results.json").read_text())["budget"]
    kept = sum(int((linear.weight != 0).sum()) for linear in linear_modules(load_model(run / "export")).values())
    assert budget == {"steps": 6, "training_tokens": 192, "trainable_parameters": kept, "global_batch": 1}
    assert sparsity_of(load_model(run / "export")) == 0.5
    card = (run / "export" / "README.md").read_text()
    assert "base_model" not in metadata_load(run / "export" / "README.md")
    assert metadata_load(run / "export" / "README.md")["tags"] == ["rotpruner", "pruning", "sparse", "2:4"]
    for fact in (
        "# tiny, 2:4, recovered",
        "`pruned`, whose own card says how it was pruned",
        "4 × 32 = 128 tokens",
        "6 steps, 192 tokens",
        "| pruned | the same before recovery |",
        "| recovered | this model |",
        f"{recovered['ppl']['other_words']:,.2f}",
        "experiments recover -c config.yaml",
    ):
        assert fact in card, fact
    assert "control" not in card
    assert str(run.parent) not in card
    assert main(["report", str(run), "--output", str(run.parent / "report.html")]) == 0
    assert re.search(r"experiments recover -c \S*run/config\.yaml", (run.parent / "report.html").read_text())
    capsys.readouterr()
    assert recover("run")[0] == 0
    assert "is finished" in " ".join(capsys.readouterr().err.split()), "wherever the line breaks"


def test_a_recovery_is_watched_like_a_fit(recover, test_text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    watch = tmp_path / "watch.yaml"
    text = Path("experiments/configs/logging/validation.yaml").read_text()
    sizes = f"{{texts: [{test_text_file}], every_n_steps: 3, seq_len: 32, max_tokens: 128}}"
    watch.write_text(re.sub(r"init_args: \{.*\}", f"init_args: {sizes}", text))
    dashboard = tmp_path / "dashboard.yaml"
    text = Path("experiments/configs/logging/wandb.yaml").read_text().replace("every_n_steps: 25", "every_n_steps: 2")
    dashboard.write_text(text.replace("offline: true", f"offline: true, save_dir: {tmp_path}"))
    wandb.finish()  # of an earlier test, whose run Lightning's logger would go on with
    status, run = recover("run", watch, dashboard)
    wandb.finish()
    assert status == 0
    watched = read_curves(run)["ppl/other_words"]
    assert [step for step, _ in watched] == [3, 6]
    recovered = load_model(run / "export")
    ids = token_ids(str(test_text_file), load_tokenizer(str(run / "export")))
    assert watched[-1][1] == pytest.approx(perplexity(recovered, ids, seq_len=32, max_tokens=128), rel=1e-5)
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(OfflineRun(directory).values("results/recovered/other_words")) == 1


def test_a_recovered_model_keeps_the_dtype_of_the_pruned_one(recover, tmp_path):
    pruned = load_model(tmp_path / "pruned").bfloat16()
    pruned.save_pretrained(tmp_path / "pruned")
    status, run = recover("run")
    assert status == 0
    recovered = load_model(run / "export")
    assert recovered.dtype == torch.bfloat16
    for name, linear in linear_modules(recovered).items():
        assert (linear.weight[linear_modules(pruned)[name].weight == 0] == 0).all()


def test_shards_are_refused(model_directory):
    module = RecoveryModule(str(model_directory), str(model_directory))
    module._trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    module._device_mesh = object()
    with pytest.raises(InputError, match="use ddp"):
        module.setup("fit")


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "0.5"])
def test_the_pattern_of_a_pruned_model_is_seen(pattern):
    model = tiny("smollm2")
    prune_model(model, resolve_pruner("magnitude"), parse_pattern(pattern))
    assert pattern_of(model) == pattern


def test_two_ranks_recover_what_one_process_recovers(recover, tmp_path):
    """By SGD, which unlike Adam does not blow up what float32 makes of another order of summation."""
    more = ["--model.optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 1.0}}"]
    status, one = recover("one", more=[*more, "--data.batch_size", "4"])
    assert status == 0
    more += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
    more += ["--model.gradient_checkpointing", "true"]
    statuses, two = recover("two", more=more, by=lambda arguments: start_ranks(arguments, target=command))
    assert statuses == [0, 0]
    before, first, second = (load_model(path) for path in (tmp_path / "pruned", one / "export", two / "export"))
    moved = 0.0
    for start, weight, other in zip(before.parameters(), first.parameters(), second.parameters(), strict=True):
        moved = max(moved, (weight - start).abs().max().item())
        torch.testing.assert_close(other, weight, atol=1e-5, rtol=0)
    assert moved > 1e-2
    budgets = [json.loads((run / "results.json").read_text())["budget"] for run in (one, two)]
    assert budgets[0] == budgets[1]


def test_warming_up_for_the_whole_run_is_refused(recover, capsys):
    assert recover("run", more=["--model.warmup_steps", "6"])[0] == 2
    assert "warmup_steps 6 leave none of the run's 6 steps" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_recovery_goes_on_to_the_same_weights(recover, monkeypatch):
    assert recover("whole")[0] == 0
    step = RecoveryModule.training_step

    def failing(self, batch, batch_idx):
        if self.global_step == 4:
            raise KeyError("stopped here")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RecoveryModule, "training_step", failing)
    with pytest.raises(KeyError):
        recover("cut")
    monkeypatch.setattr(RecoveryModule, "training_step", step)
    status, run = recover("cut")
    assert status == 0
    whole = load_file(run.parent / "whole" / "export" / "model.safetensors")
    for name, value in load_file(run / "export" / "model.safetensors").items():
        assert torch.equal(value, whole[name]), name
