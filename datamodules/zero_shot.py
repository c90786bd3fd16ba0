"""Zero-shot and few-shot tasks of a model in memory, by EleutherAI's lm-eval (`pip install -e '.[eval]'`).

A task's rows come from the hub, or from `DIR/TASK.jsonl`: the hub's own fields, one JSON object a line.
Prompts, metrics and standard errors are lm-eval's, so that the figures compare with published ones.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotpruner.errors import InputError, explained

#: The tasks that are tested here; others of lm-eval that rank or score given answers work too.
TASKS = (
    "winogrande",
    "piqa",
    "rte",
    "arc_easy",
    "arc_challenge",
    "wnli",
    "qnli",
    "boolq",
    "hellaswag",
    "openbookqa",
    "lambada_openai",
)

# Of the standard errors that have no formula (lambada's perplexity); lm-eval's own 100,000 take minutes.
_BOOTSTRAP_SAMPLES = 1000


def load_tasks(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, data: Path | None, num_fewshot: int = 0
) -> list[Any]:
    """lm-eval's task objects with their rows, each row checked; no model is needed yet.

    Args:
        names: of tasks, as lm-eval calls them.
        tokenizer: of the model to come.
        data: directory of `TASK.jsonl` files; None takes the rows from the hub.
        num_fewshot: examples in front of each question. With local rows they are other rows of the same file.

    Raises:
        InputError: lm-eval is missing, a task is unknown, its rows are missing, damaged or too few, or the
            tokenizer has no token to begin a text with.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("tasks need a tokenizer with a bos or an eos token; this model's has neither")
    manager = _manager()
    if unknown := [name for name in names if name not in manager.all_subtasks]:
        raise InputError(f"lm-eval has no task '{unknown[0]}'; known to work are {', '.join(TASKS)}")
    tasks = []
    for name in dict.fromkeys(names):
        task = _load_task(manager, name, _read_rows(name, data) if data is not None else None)
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise InputError(f"task '{name}' generates text, which is not supported; choose from {', '.join(TASKS)}")
        if data is not None and num_fewshot >= len(task.eval_docs):
            raise InputError(f"num_fewshot {num_fewshot} needs more rows than the {len(task.eval_docs)} of '{name}'")
        task.set_config(key="num_fewshot", value=num_fewshot)
        tasks.append(task)
    return tasks


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Each task's metrics, their standard errors (`…_stderr`), and what they were measured with.

    Args:
        model, tokenizer: as loaded; the model stays where it is and in its dtype.
        tasks: from `load_tasks`.
        limit: first rows of each task to use; None takes all.
        num_fewshot: as given to `load_tasks`.
        seed: of the choice of examples and of bootstrapped standard errors.
        batch_size: requests that run together.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with redirect_stdout(sys.stderr):  # it prints while it bootstraps
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            task_manager=_manager(),
        )
    assert found is not None  # only other ranks than the first get nothing
    return {name: _plain(found, name) | {"num_fewshot": num_fewshot, "seed": seed} for name in found["results"]}


def _plain(found: Any, name: str) -> dict[str, Any]:
    """lm-eval's `acc,none` is `acc` here."""
    values = {key: value for key, value in found["results"][name].items() if "," in key}
    metrics = {key.partition(",")[0]: value if isinstance(value, float) else None for key, value in values.items()}
    setting = {"rows": found["n-samples"][name]["effective"], "task_version": found["versions"][name]}
    return metrics | setting | {"lm_eval": version("lm_eval")}


@cache
def _manager() -> Any:
    if find_spec("lm_eval") is None:
        raise InputError("tasks need lm-eval: pip install -e '.[eval]'")
    from lm_eval.tasks import TaskManager

    # Its warnings are about settings that are made here on purpose.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _load_task(manager: Any, name: str, rows: list[dict[str, Any]] | None) -> Any:
    from datasets import Dataset
    from lm_eval.tasks._factory import TaskFactory

    local: dict[str, Any] = {}
    if rows is not None:
        splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
        local = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, **splits}
    where = f"the hub ({manager.task_index[name].yaml_path.stem})" if rows is None else f"'{name}.jsonl'"
    mend = "give --task_data DIR" if rows is None else "give each row the fields of the task's rows on the hub"
    with explained(f"rows of task '{name}' from {where} cannot be used", mend):
        task: Any = TaskFactory().build(manager.task_index[name], overrides=local, registry=manager.task_index)
        for row in task.eval_docs:
            task.doc_to_text(row), task.doc_to_target(row)
            if task.config.doc_to_choice is not None:
                task.doc_to_choice(row)
    return task


def _read_rows(name: str, data: Path) -> list[dict[str, Any]]:
    path = data / f"{name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"rows of task '{name}' cannot be read from '{path}' ({error}); put the file there") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise InputError(f"line {number} of '{path}' is not JSON; write one JSON object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"line {number} of '{path}' is not a JSON object; write one object a line")
        rows += [row] if row else []
    if not rows:
        raise InputError(f"'{path}' has no rows; write one JSON object a line")
    return rows
