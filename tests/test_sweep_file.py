"""What sweep files say: the rows' commands, the shipped tables, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny

from experiments.__main__ import main
from experiments.fit import FitCLI
from experiments.sweep_file import model_of, on_another, read_sweep, rows
from rotpruner.compensation import check_compensation
from rotpruner.errors import InputError

SWEEPS = sorted(Path("experiments/sweeps").glob("*.yaml"))


def test_values_of_a_row_take_the_place_of_their_names(tmp_path):
    arguments = {"model": "{runs}/a/{seed}", "text": ["{seed}"]}
    sweep = {"title": "T", "command": "prune", "arguments": arguments, "rows": [{"seed": 7}], "keep": True}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep))
    ((_, row, command),) = rows(read_sweep(tmp_path / "a.yaml"), tmp_path / "runs" / "a")
    assert row == {"seed": 7}
    assert command[command.index("--model") + 1] == f"{tmp_path}/runs/a/7"
    assert command[command.index("--output") + 1] == f"{tmp_path}/runs/a/7"
    ((_, _, command),) = rows(read_sweep(tmp_path / "a.yaml"), tmp_path / "runs" / "a-opt", "opt")
    assert command[command.index("--model") + 1] == f"{tmp_path}/runs/a-opt/7", "the other table's of the same model"
    sweep["arguments"] = {"model": "models/müll", "calibration": "Ben's.txt", "pattern": "2:4", "text": ["ö"]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep))
    ((_, _, command),) = rows(read_sweep(tmp_path / "a.yaml"), tmp_path / "läufe" / "a")
    given = dict(zip(command[1::2], command[2::2], strict=False))
    assert given == {
        "--model": "models/müll", "--calibration": "Ben's.txt", "--pattern": "2:4", "--text": "ö", "--seed": "7",
        "--output": f"{tmp_path}/läufe/a/7",
    }  # fmt: skip
    sweep["arguments"]["model"] = "{sead}"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(InputError, match="no sead in a row that has runs, seed"):
        list(rows(read_sweep(tmp_path / "a.yaml"), tmp_path))
    (tmp_path / "a.yaml").write_text("{title: T, command: fit, rows: [{seed: 0}], keep: true}")
    with pytest.raises(InputError, match="keep is for prune"):
        read_sweep(tmp_path / "a.yaml")


def test_a_reference_is_one_model_on_the_texts_of_all_rows(tmp_path):
    arguments = {"model": "a", "text": ["b"], "max_tokens": 5, "seed": 0}
    sweep = {"title": "T", "command": "prune", "arguments": arguments, "grid": {"pruner": ["c"]}, "reference": True}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep))
    (name, _, command), _ = rows(read_sweep(tmp_path / "a.yaml"), tmp_path)
    assert (name, command) == ("dense", ["evaluate", "--model", "a", "--text", "b", "--max_tokens", "5", "--json"])
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep | {"grid": {"seq_len": [1, 2]}}))
    with pytest.raises(InputError, match="vary seq_len"):
        list(rows(read_sweep(tmp_path / "a.yaml"), tmp_path))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep | {"command": "fit"}))
    with pytest.raises(InputError, match="reference is for prune"):
        read_sweep(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep | {"arguments": {}, "reference": False}))
    with pytest.raises(InputError, match="row c has no text"):
        list(rows(read_sweep(tmp_path / "a.yaml"), tmp_path))


def test_what_rows_would_overrule_and_rows_of_one_name_are_refused(tmp_path, capsys):
    file = tmp_path / "one.yaml"
    file.write_text("{title: One, command: fit, rows: [{data.num_sequences: 32}, {trainer.max_steps: 32}]}")
    assert main(["sweep", str(file), "--set", "trainer.max_steps=2"]) == 2
    assert "--set trainer.max_steps would be overruled" in capsys.readouterr().err
    assert main(["sweep", str(file), "--set", "trainer.default_root_dir=here"]) == 2
    assert "--set trainer.default_root_dir would be overruled" in capsys.readouterr().err
    assert main(["sweep", str(file), "--set", "data.calibration=[a"]) == 2
    assert "--set data.calibration=[a" in capsys.readouterr().err
    assert main(["sweep", str(file)]) == 2
    assert "have the same name, 32" in capsys.readouterr().err


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_expand_and_name_public_texts(file, tmp_path):
    sweep = read_sweep(file)
    found = list(rows(sweep, tmp_path))
    assert len({name for name, _, _ in found}) == len(found) >= 1
    for _, _, command in found:
        if command[0] == "prune":
            assert command[command.index("--calibration") + 1] == "c4"


FITS = [file for file in SWEEPS if read_sweep(file)["command"] == "fit"]


WITH_UPDATE = ("longer", "paper-objective", "per-layer", "shipped", "shipped-unstructured", "unstructured-120")


ON_OTHERS = ("ablations", "budget", "denoise-rotator", "learned", "sparsity")


@pytest.mark.parametrize(
    ("file", "config", "kind"),
    [
        *((file, None, "smollm2") for file in FITS),
        *((file, "opt-125m", "opt") for file in FITS if file.stem in ON_OTHERS),
        *((file, "llama2-7b", "llama-2") for file in FITS if file.stem in ON_OTHERS),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_settings_of_every_shipped_fit_go_together(file, config, kind, tokenizer, text_file, test_text_file, tmp_path):
    """All but reading the model: what does not go with what is refused before."""
    tiny(kind).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "model.model": tmp_path / "model",
        "model.init_rotations": "null",
        "model.init_weights": "null",
        "data.calibration": text_file,
        "data.seq_len": 32,
        "trainer.accelerator": "cpu",
        "trainer.callbacks.init_args.texts": f"[{test_text_file}]",
    }
    sweep = read_sweep(file)
    if config is not None:
        sweep["config"] = on_another(sweep, Path(f"experiments/configs/{config}.yaml"))
    settled: set[str] = set()
    for name, row, command in rows(sweep, tmp_path):
        # On another model it is which settings meet that matters, not their values.
        kinds = {key: None if config else value for key, value in row.items() if key.startswith("model.")}
        if (kind_of_row := json.dumps(kinds, sort_keys=True)) in settled:
            continue
        settled.add(kind_of_row)
        given = [item for key, value in settings.items() for item in (f"--{key}", str(value))]
        cli = FitCLI([*command[1:], *given])
        check_compensation(cli.model.compensate, cli.datamodule.statistics_sequences, cli.model.pattern)
        assert cli.model.compensate == (48 if file.stem in WITH_UPDATE else 0), name


def test_an_overlay_stands_behind_the_arguments_of_a_row(model_directory, text_file, tmp_path, capsys):
    """Its callback is not the one that they mean, which is the last of the files before them."""
    sweep = read_sweep(Path("experiments/sweeps/shipped.yaml")) | {
        "overlay": ["experiments/configs/logging/wandb.yaml"]
    }
    sweep["arguments"] |= {"model.model": str(model_directory), "data.calibration": str(text_file), "data.seq_len": 32}
    _, _, command = next(rows(sweep, tmp_path))
    callbacks = FitCLI(command[1:]).config.trainer.callbacks
    *_, finish, dashboard = ((callback.class_path, callback.get("init_args")) for callback in callbacks)
    assert (finish[0], finish[1].max_tokens) == ("callbacks.finish.Finish", 65536)
    assert dashboard[0] == "callbacks.dashboard.Dashboard"
    assert main(["sweep", "experiments/sweeps/pruners.yaml", "--overlay", "a.yaml"]) == 2
    assert "--overlay a.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "overlay", "mention"),
    [
        ("per-layer", "experiments/configs/hardware/1x80gb.yaml", "data.batch_size would overrule data.batch_size"),
        ("sparsity", "experiments/configs/variants/unstructured.yaml", "model.pattern would overrule model.pattern"),
        ("shipped", "nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_overlays_that_would_overrule_a_table_are_refused(table, overlay, mention, tmp_path, capsys):
    given = ["--overlay", overlay, "--results", str(tmp_path)]
    assert main(["sweep", f"experiments/sweeps/{table}.yaml", *given]) == 2
    assert mention in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_titles_name_the_dense_model(tmp_path):
    named = {path.stem: model_of(read_sweep(path)) for path in SWEEPS}
    assert set(named.values()) == {"smollm2-135m"}, named


def test_another_config_takes_the_place_of_the_first(capsys, tmp_path):
    sweep = {"command": "fit", "config": ["one.yaml", "two.yaml"]}
    quickstart = "experiments/configs/quickstart.yaml"
    assert on_another(sweep, Path(quickstart)) == [quickstart, "two.yaml"]
    kept = tmp_path / "main-quickstart" / "a.json"
    kept.parent.mkdir()
    kept.write_text('{"command": "of the other model"}')
    (tmp_path / "main.yaml").write_text("{title: A, command: fit, config: [one.yaml], rows: [{model.pruner: a}]}")
    table = ["sweep", str(tmp_path / "main.yaml"), "--config", quickstart, "--results", str(tmp_path)]
    assert main(table) == 0
    assert "of the other model" in capsys.readouterr().err
    assert main(["sweep", "experiments/sweeps/learned.yaml", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["sweep", "experiments/sweeps/pruners.yaml", "--config", quickstart]) == 2
    assert "--set model" in capsys.readouterr().err


FIT = "{title: x, command: fit, "


@pytest.mark.parametrize(
    "text",
    [
        *("[", "title: x", "title: x\ncommand: dance\ngrid: {}", "title: x\ncommand: fit"),
        *(FIT + "grid: {seed: 0}}", FIT + "grid: [seed]}", FIT + "rows: [3]}", FIT + "rows: [], arguments: [3]}"),
        FIT + "rows: [], config: file}",
    ],
)
def test_bad_sweep_files_are_refused(text, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml" in capsys.readouterr().err
    assert main(["results", "--results", str(tmp_path)]) == 2
