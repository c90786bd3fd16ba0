"""Results become tables and plots."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from experiments.__main__ import main
from experiments.results import table
from experiments.sweep import _found
from experiments.sweep_file import read_sweep, rows


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
    seeds[1][1].update({"device": "cuda:0 (A GPU)", "dtype": "bfloat16"})
    text = table({"title": "T", "columns": ["seed"]}, [dense, *seeds])
    assert "| 3, 3 | ?, bfloat16 A GPU | 2 |" in text.replace("(A GPU)", "A GPU"), "of machines apart"
    seeds[1][1]["result"]["ppl"]["text"] = math.inf
    assert "| inf | inf | 1.0 M | 0 M | 3, 3 |" in table({"title": "T", "columns": ["seed"]}, [dense, *seeds])


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


def test_a_table_without_varied_settings_is_aligned():
    dense = ("dense", {"command": "evaluate --model m", "result": {"ppl": {"text": 10.0}}})
    seeds = [
        (str(seed), {"row": {"seed": seed}, "command": "prune", "commit": "abcdef012", "result": _row(20.0)})
        for seed in range(2)
    ]
    lines = [line for line in table({"title": "T", "columns": ["seed"]}, [dense, *seeds]).splitlines() if "|" in line]
    head, _, reference, pooled = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert len(head) == len(reference) == len(pooled)
    assert [row[head.index("text ppl")] for row in (reference, pooled)] == ["10.00", "20.00 ± 0.00"]
    assert reference[head.index("seeds")] == ""


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
        if pattern == "0.5":  # and with exceptions, which is a sparsity of nothing in particular
            record["result"]["rotpruner"] = {**row, "pattern": "0.5 (*.v_proj 0)"}
            (directory / "exceptions.json").write_text(json.dumps(record))
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
