"""Sweeps run one command a row and keep what it printed; results become tables."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Thread
from xml.etree import ElementTree

import pytest
import yaml
from tiny_models import tiny

from experiments.__main__ import main
from experiments.fit import FitCLI
from experiments.results import table
from experiments.sweep import _found
from experiments.sweep_file import model_of, on_another, read_sweep, rows
from rotpruner.compensation import check_compensation
from rotpruner.errors import InputError

SWEEPS = sorted(Path("experiments/sweeps").glob("*.yaml"))


def test_a_sweep_runs_its_rows_once_and_results_become_a_table(
    model_directory, text_file, test_text_file, tmp_path, monkeypatch
):
    file = tmp_path / "tiny.yaml"
    settings = {"model": str(model_directory), "num_sequences": 4, "seq_len": 32, "max_tokens": 256}
    sweep = {
        "title": "Tiny",
        "command": "prune",
        "arguments": settings,
        "grid": {"pruner": ["magnitude"], "pattern": ["2:4"], "seed": [0, 1]},
        "reference": True,
        "keep": True,
    }
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    arguments = ["sweep", str(file), "--set", f"calibration={text_file}", "--set", f"text=[{test_text_file}]"]
    arguments += ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    left = tmp_path / "runs" / "tiny" / "magnitude-2of4-0"
    left.mkdir(parents=True)
    (left / "half").write_text("of an interrupted row")
    monkeypatch.setattr("experiments.sweep.commit", lambda: "of the checkout")
    assert main(arguments) == 0
    kept = {path.name for path in (tmp_path / "runs" / "tiny").iterdir() if path.is_dir()}
    assert kept == {"magnitude-2of4-0", "magnitude-2of4-1"}
    assert not (left / "half").exists()
    assert "saved" in (tmp_path / "runs" / "tiny" / "magnitude-2of4-1.log").read_text()
    stored = tmp_path / "results" / "tiny"
    kept = {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert set(kept) == {"sweep.json", "dense.json", "magnitude-2of4-0.json", "magnitude-2of4-1.json"}
    title = json.loads((stored / "sweep.json").read_text())["title"]
    assert title == f"Tiny, on {model_directory.name}"
    record = json.loads((stored / "magnitude-2of4-0.json").read_text())
    assert record["row"] == {"pruner": "magnitude", "pattern": "2:4", "seed": 0}
    assert record["commit"] == "of the checkout"
    assert json.loads((stored / "dense.json").read_text())["result"]["tokens"] == {test_text_file.stem: 256}
    assert not [path for path in stored.iterdir() if str(tmp_path) in path.read_text()], "paths of this machine"
    assert main(arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in stored.iterdir()} == kept
    (tmp_path / "results" / "begun").mkdir()
    shutil.copy(tmp_path / "results" / "tiny" / "sweep.json", tmp_path / "results" / "begun")
    output = tmp_path / "RESULTS.md"
    assert main(["results", "--results", str(tmp_path / "results"), "--output", str(output)]) == 0
    assert output.read_text().count("\n## ") == 1
    line = next(line for line in output.read_text().splitlines() if line.startswith("| magnitude | 2:4"))
    assert line.split(" | ")[-3:-1] == ["float32", "2"]
    assert " ± " in line


def test_a_row_that_another_command_has_made_is_kept_and_named(tmp_path, capsys):
    file = tmp_path / "one.yaml"
    file.write_text("{title: One, command: prune, arguments: {model: of nobody, text: [a]}, rows: [{seed: 0}]}")
    target = tmp_path / "results" / "one" / "0.json"
    target.parent.mkdir(parents=True)
    arguments = ["sweep", str(file), "--results", str(tmp_path / "results")]
    alike = "prune --model 'of nobody' --text a --seed 0 --json"
    for ran, other in ((alike, False), ("prune --seed 0 --json", True)):
        target.write_text(json.dumps({"command": ran}))
        assert main(arguments) == 0
        shown = " ".join(capsys.readouterr().err.split())
        assert ("by another command" in shown) is other
        assert (f"({ran})" in shown) is other


def test_rows_of_other_commands_get_no_others_beside_them(program, tmp_path, capsys):
    """They would be pooled as seeds of one experiment."""
    stored = tmp_path / "results" / "one"
    stored.mkdir(parents=True)
    (stored / "sweep.json").write_text('{"title": "One (and a note)", "columns": ["steps"]}')
    (stored / "0.json").write_text('{"command": "prune --text b --seed 0 --json"}')
    assert sweep_one(tmp_path) == 2
    assert "such as 0 (prune --text b --seed 0 --json)" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "pid").exists(), "no row has run"
    (stored / "0.json").write_text('{"command": "prune --text a --seed 0 --json"}')
    program.write_text(program.read_text() + "echo '{}'\n")
    assert sweep_one(tmp_path) == 0
    assert json.loads((stored / "sweep.json").read_text()) == {
        "title": "One (and a note)",
        "columns": ["steps", "seed"],
    }
    (stored / "1.json").write_text('{"command": ')
    assert sweep_one(tmp_path) == 2
    assert "1.json' is damaged; remove it" in " ".join(capsys.readouterr().err.split())
    (stored / "1.json").unlink()
    (stored / "other.json").write_text('{"command": "prune of an older table"}')
    assert sweep_one(tmp_path) == 2
    assert "such as other (prune of an older table)" in " ".join(capsys.readouterr().err.split())


def test_where_a_row_leaves_its_model_makes_it_no_other(program, tmp_path):
    (tmp_path / "one.yaml").write_text("{title: One, command: fit, rows: [{seed: 0}, {seed: 1}]}")
    stored = tmp_path / "results" / "one"
    stored.mkdir(parents=True)
    (stored / "0.json").write_text('{"command": "fit --seed 0 --trainer.default_root_dir elsewhere/0"}')
    assert sweep_one(tmp_path) == 2, "the program makes no results"
    assert (tmp_path / "pid").exists(), "but the missing row has run"


def test_tables_of_other_models_are_tables_of_their_own(program, tmp_path):
    program.write_text(program.read_text() + "echo '{}'\n")
    for run in ("a", "b"):
        (tmp_path / run / "export").mkdir(parents=True)
        assert sweep_one(tmp_path, "--set", f"model={tmp_path / run / 'export'}") == 0
    assert sweep_one(tmp_path, "--set", "model=owner/name") == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"one-a-export", "one-b-export", "one-name"}
    described = json.loads((tmp_path / "results" / "one-name" / "sweep.json").read_text())
    assert described["title"] == "One, on name"


def test_a_table_that_keeps_no_models_removes_no_directory(program, tmp_path):
    program.write_text(program.read_text() + "echo '{}'\n")
    thesis = tmp_path / "runs" / "one" / "0" / "thesis"
    thesis.mkdir(parents=True)
    assert sweep_one(tmp_path) == 0
    assert thesis.is_dir()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Rows run this shell script instead of Python, which leaves its process's number in `pid`; a sweep of one."""
    script = tmp_path / "program"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid.part\nmv {tmp_path}/pid.part {tmp_path}/pid\n")
    script.chmod(0o755)
    monkeypatch.setattr("experiments.sweep.sys.executable", str(script))
    (tmp_path / "one.yaml").write_text(
        "{title: One, command: prune, arguments: {text: [a]}, rows: [{seed: 0}, {seed: 1}]}"
    )
    return script


def sweep_one(tmp_path, *more):
    directories = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    return main(["sweep", str(tmp_path / "one.yaml"), *directories, *more])


@pytest.mark.parametrize(
    ("ends", "said"), [("echo of the row >&2; exit 3", "0 failed with status 3"), ("", "0 failed: ")]
)
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_rows_that_fail_are_named_and_the_others_go_on(ends, said, jobs, program, tmp_path, capsys):
    """A status, or an output that is none; what they said stands where the message has it."""
    program.write_text(program.read_text() + f"test $ROTPRUNER_JOBS = {jobs} || exit 9\n{ends}\n")
    assert sweep_one(tmp_path, "--jobs", jobs) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown
    assert "rows that failed: 0, 1" in shown
    if jobs == "2":
        assert "ROW.log" in shown
        assert ("of the row" in (tmp_path / "runs" / "one" / "0.log").read_text()) is bool(ends)


def test_a_sweep_that_is_ended_ends_its_rows(program, tmp_path):
    program.write_text(program.read_text() + "exec sleep 60\n")

    def end() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=end).start()
    with pytest.raises(SystemExit, match="143"):
        sweep_one(tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [path.name for path in (tmp_path / "results" / "one").iterdir()] == ["sweep.json"], "no row has a result"


def test_values_of_a_row_take_the_place_of_their_names(tmp_path):
    arguments = {"model": "{runs}/a/{seed}", "text": ["{seed}"]}
    sweep = {"title": "T", "command": "prune", "arguments": arguments, "rows": [{"seed": 7}], "keep": True}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep))
    ((_, row, command),) = rows(read_sweep(tmp_path / "a.yaml"), tmp_path / "runs" / "a")
    assert row == {"seed": 7}
    assert command[command.index("--model") + 1] == f"{tmp_path}/runs/a/7"
    assert command[command.index("--output") + 1] == f"{tmp_path}/runs/a/7"
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


@pytest.mark.parametrize(("command", "setting"), [("fit", "base_dtype"), ("recover", "compute_dtype")])
def test_commit_and_dtype_of_a_training_are_those_of_its_run(command, setting, tmp_path):
    results = {"rows": [_row(1.0) | {"name": "dense"}], "config": {"model": {setting: "bfloat16"}}}
    results |= {"commit": "of the run", "device": "cuda:0 (A GPU)"}
    results["budget"] = {"steps": 2, "training_tokens": 2048, "trainable_parameters": 12345}
    (tmp_path / "results.json").write_text(json.dumps(results))
    logged = tmp_path / "logs" / "version_0" / "metrics.csv"
    logged.parent.mkdir(parents=True)
    logged.write_text("step,train/loss,ppl/text,masks/flipped\n0,3.0,40.0,0.1\n")
    found = _found([command, "--trainer.default_root_dir", str(tmp_path)], "")
    assert (found["commit"], found["dtype"]) == ("of the run", "bfloat16")
    assert set(found["curves"]) == {"train/loss", "ppl/text"}
    found["result"]["recovered"] = _row(2.0)
    text = table({"title": "T", "columns": []}, [("a", {"row": {}, "command": command, **found})])
    assert "| bfloat16 (A GPU) | 1 | of the  |" in text
    assert "| trained tokens | trainable |" in text
    assert "| 2,048 | 12,345 | 1.0 M |" in text


def test_gaps_are_counted_from_the_dense_row():
    records = [
        ("dense", {"command": "evaluate --model m", "result": {"ppl": {"text": 10.0}}}),
        ("a", {"row": {"pruner": "a"}, "command": "prune", "commit": "abcdef012", "result": _row(20.0)}),
    ]
    text = table({"title": "T", "columns": ["pruner"]}, records)
    assert f"| a | 20.00 | {math.log(2):.3f} | 1.0 M | 0 M | 3 | 1 | abcdef0 |" in text
    records[1][1]["dtype"] = "bfloat16"
    text = table({"title": "T", "columns": ["pruner"]}, records)
    assert "| seconds | computed in | seeds | commit |" in text
    assert "| 3 | bfloat16 | 1 | abcdef0 |" in text


def test_seeds_are_pooled_to_their_mean_and_sample_deviation():
    dense = ("dense", {"command": "evaluate --model m", "result": {"ppl": {"text": 10.0}}})
    seeds = [
        (str(seed), {"row": {"seed": seed}, "command": "prune", "commit": "abcdef012", "result": _row(ppl)})
        for seed, ppl in enumerate((10.0, 14.0))
    ]
    text = table({"title": "T", "columns": ["seed"]}, [dense, *seeds])
    assert "| 12.00 ± 2.83 | 0.168 ± 0.238 | 1.0 M | 0 M | 3 ± 0 | 2 | abcdef0 |" in text


def test_shares_are_of_the_mean_gap_of_the_rows_of_their_pattern(tmp_path, capsys):
    def store(name: str, pattern: str | None, ppl: float) -> None:
        result = _row(ppl) | {"pattern": pattern, "sparsity": 0.5}
        command = "prune" if pattern else "evaluate --model m"
        path = tmp_path / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"pattern": pattern} if pattern else {}
        path.write_text(json.dumps({"row": row, "command": command, "commit": "abcdef012", "result": result}))

    for table_name in ("base", "mine"):
        store(f"{table_name}/dense", None, 10.0)
        (tmp_path / "results" / table_name / "sweep.json").write_text('{"title": "T", "columns": ["pattern"]}')
    for name, ppl in (("old-0", 20.0), ("old-1", 80.0)):
        store(f"base/{name}", "2:4", ppl)
    store("mine/0", "2:4", 20.0)
    store("mine/1", "0.5", 20.0)
    output = tmp_path / "R.md"
    arguments = ["results", "--results", str(tmp_path / "results"), "--output", str(output)]
    assert main([*arguments, "--against", "base/old-*.json"]) == 0
    mine = output.read_text().split("`mine`")[1]
    assert "| G text | share text |" in mine
    assert "| 2:4 | 20.00 | 0.693 | 0.500 |" in mine
    assert "| 0.5 | 20.00 | 0.693 |  |" in mine
    assert main([*arguments, "--against", "base/new-*.json"]) == 2
    assert "base/new-*.json" in capsys.readouterr().err


def test_a_row_that_is_called_dense_is_a_row():
    record = {"row": {"statistics": "dense"}, "command": "prune", "commit": "abcdef012", "result": _row(20.0)}
    text = table({"title": "T", "columns": ["statistics"]}, [("dense", record)])
    assert "| dense | 20.00 | 1.0 M |" in text


def test_gaps_are_counted_from_each_rows_own_dense_model_on_the_texts_of_both():
    def record(model: str, **ppl: tuple[float, float]) -> tuple[str, dict]:
        kinds = {
            name: {**_row(0), "ppl": {text: values[index] for text, values in ppl.items()}}
            for index, name in enumerate(("dense", "rotpruner"))
        }
        return model, {"row": {"model": model}, "command": "fit", "commit": "abcdef012", "result": kinds}

    records = [record("a", one=(10.0, 20.0)), record("b", one=(5.0, 20.0), two=(3.0, 9.0))]
    lines = table({"title": "T", "columns": ["model"]}, records).splitlines()
    gaps = [[cell.strip() for cell in line.split("|")[3:7]] for line in lines if "rotpruner" in line]
    assert gaps == [
        ["20.00", "", f"{math.log(2):.3f}", ""],
        ["20.00", "9.00", f"{math.log(4):.3f}", f"{math.log(3):.3f}"],
    ]
    dense = [[cell.strip() for cell in line.split("|")[3:5]] for line in lines if line.startswith("| dense")]
    assert dense == [["10.00", ""], ["5.00", "3.00"]]


def test_plots_show_steps_and_sparsities(tmp_path):
    directory = tmp_path / "results" / "tiny"
    directory.mkdir(parents=True)
    (directory / "sweep.json").write_text(json.dumps({"title": "T", "columns": ["pruner", "pattern"]}))
    for pattern in ("0.3", "0.5", "2:4"):
        row = {**_row(20.0), "pattern": pattern, "sparsity": 0.5 if pattern == "2:4" else float(pattern)}
        record = {"row": {"pruner": "magnitude", "pattern": pattern}, "command": "fit", "commit": "abcdef012"}
        dense = {**_row(10.0), "pattern": None, "sparsity": 0.0}
        record |= {"result": {"dense": dense, "rotpruner": row}, "curves": {"ppl/text": [[5, 40.0], [10, 20.0]]}}
        (directory / f"{pattern.replace(':', 'of')}.json").write_text(json.dumps(record))
    stored = Path("experiments/results")
    for name in ("step.json", "inference.json"):
        shutil.copy(stored / name, tmp_path / "results")
    output = tmp_path / "RESULTS.md"
    (tmp_path / "results" / "NOTES.md").write_text("On such tokens.\n")
    assert main(["results", "--results", str(tmp_path / "results"), "--output", str(output)]) == 0
    assert "\nOn such tokens.\n" in output.read_text()
    step, inference = (json.loads((stored / name).read_text()) for name in ("step.json", "inference.json"))
    memory = step["peak_bytes"] / step["dense_fp32_bytes"]
    for shown in (f"{step['ratio']:.3f} × forward and backward", f"{memory:.2f} × the dense model", "2 × 1,024 tokens"):
        assert shown in output.read_text()
    for row in inference["rows"]:
        speed = f"| {row['prefill']['tokens_per_second']:.0f} | {row['prefill']['ratio']:.3f} ("
        found = [line for line in output.read_text().splitlines() if line.startswith(f"| {row['model']} | ")]
        assert sum(speed in line for line in found) == 1
    assert "![Perplexity on text against step](results/plots/steps-text.svg)" in output.read_text()
    steps, sparsity = ((tmp_path / f"results/plots/{name}-text.svg").read_text() for name in ("steps", "sparsity"))
    assert all(f">tiny {name}<" in steps for name in ("0.3", "0.5", "2of4"))
    assert sparsity.count(">tiny magnitude rotpruner<") == 1
    for svg in (steps, sparsity):
        ElementTree.fromstring(svg)


def test_single_rows_change_arguments_of_any_form_one_at_a_time(tmp_path):
    file = tmp_path / "rows.yaml"
    surrogate = {"name": "sr_ste", "decay": 0.1}
    file.write_text(yaml.safe_dump({"title": "T", "command": "fit", "rows": [{}, {"model.surrogate": surrogate}]}))
    (base, _, _), (name, row, command) = rows(read_sweep(file), tmp_path)
    assert base == "base"
    assert name == "decay_0.1_name_sr_ste"
    assert yaml.safe_load(command[command.index("--model.surrogate") + 1]) == surrogate
    text = table(
        {"title": "T", "columns": ["model.surrogate"]},
        [(name, {"row": row, "command": "fit", "commit": "abcdef012", "result": {"rotpruner": _row(20.0)}})],
    )
    assert "| decay 0.1, name sr_ste | rotpruner | 20.00 |" in text


def _row(ppl: float) -> dict:
    return {"ppl": {"text": ppl}, "seconds": 3.0, "parameters": 1_000_000}


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_expand_and_name_public_texts(file, tmp_path):
    sweep = read_sweep(file)
    found = list(rows(sweep, tmp_path))
    assert len({name for name, _, _ in found}) == len(found) >= 1
    for _, _, command in found:
        if command[0] == "prune":
            assert command[command.index("--calibration") + 1] == "c4"


FITS = [file for file in SWEEPS if read_sweep(file)["command"] == "fit"]
WITH_UPDATE = ("longer", "per-layer", "shipped", "shipped-unstructured", "unstructured-120")
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
