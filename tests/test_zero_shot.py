"""Tasks by lm-eval: every task's wiring on rows of the hub's own form, and lm-eval's own command line as the oracle."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import tiny_llama

from datamodules.zero_shot import TASKS
from experiments.__main__ import main

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")

ARC = {"id": "1", "question": "what is small?", "choices": {"text": ["a basis", "the weights"], "label": ["A", "B"]}}
BOOK = {"id": "1", "question_stem": "the model", "choices": {"text": ["learns", "says"], "label": ["A", "B"]}}
HELLASWAG = {
    "ind": 1,
    "activity_label": "Pruning",
    "ctx_a": "The model learns a basis.",
    "ctx_b": "it",
    "ctx": "The model learns a basis. it",
    "endings": ["can be removed.", "says [title] harm.", "is small.", "in which."],
}
PAIR = {"sentence1": "The weights are small.", "sentence2": "The weights can be removed."}

#: Hand-written rows with the fields that each task has on the hub.
ROWS = {
    "winogrande": [
        {"sentence": f"The weight left the basis because the _ was {how}.", "option1": "weight", "option2": "basis"}
        | {"answer": answer}
        for how, answer in (("small", "1"), ("full", "2"), ("harmless", "1"))
    ],
    "piqa": [
        {"goal": f"remove {what}", "sol1": "use a mask", "sol2": "say it", "label": label}
        for what, label in (("a weight", 0), ("harm", 1), ("it", 0))
    ],
    "rte": [{**PAIR, "idx": label, "label": label} for label in (0, 1, 0)],
    "wnli": [{**PAIR, "idx": label, "label": label} for label in (0, 1, 1)],
    "qnli": [{"question": "What learns?", "sentence": "The model does.", "idx": 0, "label": label} for label in (0, 1)],
    "boolq": [{"question": "is it small", "passage": "It is small.", "idx": 0, "label": label} for label in (1, 0)],
    "arc_easy": [{**ARC, "answerKey": key} for key in "ABA"],
    "arc_challenge": [{**ARC, "answerKey": key} for key in "BBA"],
    "hellaswag": [{**HELLASWAG, "label": label} for label in "0312"],
    "openbookqa": [{**BOOK, "answerKey": key} for key in "ABB"],
    "lambada_openai": [{"text": f"the model learns a {word}"} for word in ("basis", "weight")],
}
NORMALISED = {"piqa", "arc_easy", "arc_challenge", "hellaswag", "openbookqa"}


@pytest.fixture(scope="module")
def task_data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def speaker(tmp_path_factory, tokenizer) -> Path:
    """A tiny model whose tokenizer has a token to begin a text with."""
    directory = tmp_path_factory.mktemp("speaker")
    tiny_llama(vocab_size=len(tokenizer) + 1).save_pretrained(directory)
    beginning = copy.deepcopy(tokenizer)
    beginning.add_special_tokens({"eos_token": "<end>"})
    beginning.save_pretrained(directory)
    return directory


@pytest.fixture
def evaluate(speaker, task_data, capsys, monkeypatch):
    """`evaluate(tasks, *more)` → (status, standard output, standard error)."""

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval would fork a process that has threads

    def run(tasks: str, *more: str, data: Path = task_data) -> tuple[int, str, str]:
        arguments = ["--model", str(speaker), "--tasks", tasks, "--task_data", str(data), "--json", *more]
        status = main(["evaluate", *arguments])
        return status, *capsys.readouterr()

    return run


def test_every_task_runs_on_rows_of_its_form(evaluate):
    status, out, err = evaluate(",".join(TASKS))
    assert status == 0, err
    assert set(json.loads(out)) == {"dtype", "tasks"}
    found = json.loads(out)["tasks"]
    assert tuple(found) == TASKS
    for name, values in found.items():
        assert values["rows"] == len(ROWS[name])
        assert values["lm_eval"]
        assert {"task_version", "num_fewshot", "seed"} <= set(values)
        more = {"acc_norm"} if name in NORMALISED else {"perplexity"} if name == "lambada_openai" else set()
        for metric in {"acc"} | more:
            assert isinstance(values[metric], float)
            assert isinstance(values[f"{metric}_stderr"], float)
        assert 0 <= values["acc"] <= 1


def test_examples_limit_and_texts(evaluate, test_text_file):
    text = ["--text", str(test_text_file), "--seq_len", "32", "--max_tokens", "64"]
    shots = ["--limit", "2", "--num_fewshot", "1", "--seed", "3"]
    status, out, err = evaluate("piqa,hellaswag", *shots, *text)
    assert status == 0, err
    result = json.loads(out)
    assert set(result) == {"dtype", "ppl", "tokens", "tasks"}
    for values in result["tasks"].values():
        assert (values["rows"], values["num_fewshot"], values["seed"]) == (2, 1, 3)
    assert json.loads(evaluate("piqa,hellaswag", *shots)[1])["tasks"] == result["tasks"]


def test_tasks_that_fail_do_not_cost_the_perplexities(evaluate, test_text_file, monkeypatch, capsys):
    def fails(*_, **__):
        raise MemoryError("full")

    monkeypatch.setattr("experiments.evaluate.evaluate_tasks", fails)
    with pytest.raises(MemoryError):
        evaluate("piqa", "--text", str(test_text_file), "--seq_len", "32", "--max_tokens", "64")
    assert set(json.loads(capsys.readouterr().out)) == {"dtype", "ppl", "tokens"}


@pytest.mark.parametrize(
    ("content", "mention"),
    [
        (None, "put the file there"),
        ("", "no rows"),
        ('{"goal": "a"}\n', "fields"),
        ("[1]\n", "not a JSON object"),
        ("not json\n", "line 1"),
    ],
    ids=["missing", "empty", "fields", "list", "text"],
)
def test_bad_rows_are_one_line(content, mention, evaluate, tmp_path):
    if content is not None:
        (tmp_path / "piqa.jsonl").write_text(content)
    status, out, err = evaluate("piqa", data=tmp_path)
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert mention in lines[0]
    assert "piqa" in lines[0]


def test_evaluate_refuses_what_cannot_work(evaluate, model_directory, capsys):
    for tasks, more, mention in (
        ("banana", (), "banana"),
        ("gsm8k", (), "gsm8k"),
        ("piqa", ("--num_fewshot", "3"), "num_fewshot 3"),
    ):
        status, out, err = evaluate(tasks, *more)
        assert (status, out) == (2, "")
        assert mention in err.splitlines()[-1]
    assert main(["evaluate", "--model", str(model_directory)]) == 2
    assert "--tasks" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(model_directory), "--tasks", "piqa"]) == 2
    assert "bos" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evals_own_command_line_agrees(evaluate, speaker, task_data, tmp_path):
    from lm_eval import tasks

    arc = Path(tasks.__file__).parent / "arc" / "arc_easy.yaml"
    config = {"include": str(arc), "task": "arc_easy_local", "tag": [], "dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": {"test": str(task_data / "arc_easy.jsonl")}}
    (tmp_path / "arc_easy_local.yaml").write_text(
        json.dumps({**config, "training_split": None, "validation_split": None, "test_split": "test"})
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "arc_easy_local", "--device", "cpu"]
    command += ["--model_args", f"pretrained={speaker},dtype=float32", "--batch_size", "8"]
    subprocess.run([*command, "--include_path", tmp_path, "--output_path", tmp_path / "out"], check=True)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["arc_easy_local"]
    ours = json.loads(evaluate("arc_easy")[1])["tasks"]["arc_easy"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert ours[metric] == theirs[f"{metric},none"]
