"""Sweeps run one command a row and keep what it printed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from threading import Thread

import pytest
import yaml

from experiments.__main__ import main


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


def test_models_of_another_table_stay(tmp_path, capsys):
    file = tmp_path / "one.yaml"
    sweep = {
        "title": "One",
        "command": "prune",
        "arguments": {"model": "of nobody", "text": ["a"]},
        "rows": [{"seed": 0}],
        "keep": True,
    }
    file.write_text(yaml.safe_dump(sweep))
    kept = tmp_path / "runs" / "one" / "0"
    kept.mkdir(parents=True)
    (kept / "README.md").touch()
    note = kept.with_name("0.json")
    for seed, results in ((None, "results"), (1, "results"), (1, "more_results")):
        if seed is not None:
            command = f"prune --model 'of nobody' --text a --seed {seed} --output 0 --json"
            note.write_text(json.dumps({"command": command, "files": []}))
        assert main(["sweep", str(file), "--results", str(tmp_path / results), "--runs", str(tmp_path / "runs")]) == 2
        assert "or an older sweep; choose another --runs" in " ".join(capsys.readouterr().err.split())
    assert (kept / "README.md").is_file()
    note.write_text(note.read_text().replace("--seed 1", "--seed 0"))
    assert main(["sweep", str(file), "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]) == 2
    assert not kept.exists(), "this command's own, cut short"


def test_a_row_that_another_command_has_made_is_kept_and_named(tmp_path, capsys):
    file = tmp_path / "one.yaml"
    file.write_text("{title: One, command: prune, arguments: {model: of nobody, text: [a]}, rows: [{seed: 0}]}")
    target = tmp_path / "results" / "one" / "0.json"
    target.parent.mkdir(parents=True)
    arguments = ["sweep", str(file), "--results", str(tmp_path / "results")]
    alike = "prune --model 'of nobody' --text a --seed 0 --json"
    elsewhere = alike.replace(" --json", " --output elsewhere/0 --json")
    for ran, other in ((alike, False), (elsewhere, False), ("prune --seed 0 --json", True)):
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


def test_another_text_of_the_same_name_makes_other_rows(program, tmp_path, capsys):
    program.write_text(program.read_text() + "echo '{}'\n")
    texts = [tmp_path / name / "text.txt" for name in ("first", "second", "copy")]
    for text in texts:
        text.parent.mkdir()
        text.write_text("second" if text.parent.name == "second" else "first")
    (tmp_path / "one.yaml").write_text(
        "{title: One, command: prune, arguments: {model: m, text: [t]}, rows: [{seed: 0}, {seed: 1}]}"
    )
    assert sweep_one(tmp_path, "--set", f"calibration={texts[0]}") == 0
    (tmp_path / "results" / "one" / "1.json").unlink()
    assert sweep_one(tmp_path, "--set", f"calibration={texts[1]}") == 2
    assert "rows of other commands or of other files" in " ".join(capsys.readouterr().err.split())
    assert sweep_one(tmp_path, "--set", f"calibration={texts[2]}") == 0


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
        deadline = time.monotonic() + 120
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit, match="143"):
        sweep_one(tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [path.name for path in (tmp_path / "results" / "one").iterdir()] == ["sweep.json"], "no row has a result"
