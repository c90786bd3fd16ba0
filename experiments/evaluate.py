"""`python -m experiments evaluate`: perplexity of a model on texts, and its accuracy on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from callbacks.terminal import track
from datamodules.evaluation import perplexities, text_windows
from datamodules.zero_shot import TASKS, evaluate_tasks, load_tasks
from experiments.arguments import Parser, add_device, at_least, report
from rotpruner.errors import InputError
from rotpruner.loading import check_seq_len, load_config, load_model, load_tokenizer


def main(arguments: list[str]) -> None:
    """Print `{"ppl": {text: value}, "tokens": {text: count}}`, `{"tasks": {task: values}}` or both, and the dtype."""
    parser = Parser("evaluate", "Perplexity over non-overlapping windows, and tasks by lm-eval.")
    parser.add_argument("--model", required=True, help="embedded name, directory or hub name")
    parser.add_argument("--text", action="append", default=[], help="name or path of a test text; repeatable")
    parser.add_argument("--seq_len", type=at_least(2), default=1024, help="tokens per window")
    parser.add_argument("--max_tokens", type=at_least(1), help="first tokens of each text to use; all if left out")
    parser.add_argument("--tasks", type=_names, default=[], help=f"with commas between: {', '.join(TASKS)}")
    parser.add_argument("--task_data", type=Path, help="directory with TASK.jsonl of each task; the hub if left out")
    parser.add_argument("--limit", type=at_least(1), help="first rows of each task to use; all if left out")
    parser.add_argument("--num_fewshot", type=at_least(0), default=0, help="examples in front of each question")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the choice of these examples")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="answers of a task that run together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    add_device(parser)
    options = parser.parse_args(arguments)

    if not options.text and not options.tasks:
        raise InputError("nothing to evaluate: give --text, --tasks, or both")
    of_tasks = ("task_data", "limit", "num_fewshot", "seed", "batch_size")
    for kind, names in (("text", ("seq_len", "max_tokens")), ("tasks", of_tasks)):
        set_here = [name for name in names if getattr(options, name) != parser.get_default(name)]
        if set_here and not getattr(options, kind):
            raise InputError(f"--{set_here[0]} means nothing without --{kind}: leave it out, or give --{kind}")
    config = load_config(options.model)
    tokenizer = load_tokenizer(options.model)
    if options.text:
        check_seq_len(config, options.seq_len)
    texts = text_windows(options.text, tokenizer, options.seq_len, options.max_tokens)
    tasks: list[Any] = []
    if options.tasks:
        tasks = load_tasks(options.tasks, tokenizer, options.task_data, options.num_fewshot)
    model = load_model(options.model, getattr(torch, options.dtype))
    result: dict[str, Any] = {"dtype": options.dtype}
    if texts:
        result["ppl"] = perplexities(model, texts, track, device=options.device)
        result["tokens"] = {name: cut.numel() for name, cut in texts.items()}
    if tasks:
        try:
            result["tasks"] = evaluate_tasks(
                model.to(options.device),
                tokenizer,
                tasks,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                seed=options.seed,
                batch_size=options.batch_size,
            )
        except BaseException:
            if texts:
                report(result, options.json)  # tasks that fail must not cost the perplexities
            raise
    report(result, options.json)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
