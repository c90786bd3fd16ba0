"""`python -m experiments benchmark inference MODEL …`: tokens a second of exported models, side by side.

Prefill (one forward pass over a batch of prompts, logits of the last position only, as generation does it) and decode
(greedy, one token at a time, with the key-value cache) are timed apart, in turns A B C A B C …, so that whatever else
the machine does falls on all of them alike. Ratios are taken within a turn, against the first model.

Weights run as dense matrices, zeros included. On CUDA a checkpoint is timed once more with the decoder linears that
are 2:4, if any are, in torch's semi-structured form.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from callbacks.terminal import track
from experiments.arguments import Parser, add_device, at_least, report
from rotpruner.errors import InputError
from rotpruner.loading import load_config, load_model
from rotpruner.measures import parameter_count
from rotpruner.provenance import commit, device_name, public_command
from rotpruner.semi_structured import semi_structured, two_four_linears

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Print `{"device", "threads", "dtype", "rows", "note"}`, what was timed, `"command"` and `"commit"`.

    A row is `{"model", "parameters", "bytes", "prefill", "decode"}`.
    `prefill` and `decode` are `{"tokens_per_second", "spread", "ratio", "ratio_spread"}`: medians over the turns and
    their quartiles.
    """
    options = _parser().parse_args(arguments)
    names = _names(options.models, options.name)
    configs = [load_config(model) for model in options.models]
    for name, config in zip(names, configs, strict=True):
        needed, limit = options.seq_len + options.new_tokens, config.max_position_embeddings
        if needed > limit:
            raise InputError(
                f"seq_len {options.seq_len} and new_tokens {options.new_tokens} take {needed} positions, but "
                f"'{name}' has {limit}; shorten them"
            )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    models = {
        (number, name): load_model(path, dtype).to(options.device)
        for number, (name, path) in enumerate(zip(names, options.models, strict=True))
    }
    sizes = {key: (parameter_count(model), _bytes(model)) for key, model in models.items()}
    note = _note(options.device)
    if options.device.type == "cuda":
        for (number, name), model in list(models.items()):
            if not two_four_linears(model):
                continue
            if options.dtype == "float32":
                note += f" '{name}' has no semi-structured form in float32: --dtype bfloat16 times it, too."
                continue
            try:
                variant = semi_structured(copy.deepcopy(model))
            except (InputError, torch.OutOfMemoryError) as error:
                note += f" '{name}' has no semi-structured form here: {error}."
                continue
            models[key := (number, f"{name}, semi-structured")] = variant
            sizes[key] = sizes[number, name][0], _bytes(variant)

    vocabulary = min(config.vocab_size for config in configs)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (options.batch_size, options.seq_len), generator=generator).to(options.device)
    prefill, decode = measure(list(models.values()), prompts, options.new_tokens, options.repeats)
    result = {
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        **{name: getattr(options, name) for name in ("batch_size", "seq_len", "new_tokens", "repeats")},
        "rows": [
            {
                "model": name,
                "parameters": sizes[number, name][0],
                "bytes": sizes[number, name][1],
                "prefill": _summary(prompts.numel() / prefill[:, column], prefill[:, 0] / prefill[:, column]),
                "decode": _summary(
                    options.batch_size * options.new_tokens / decode[:, column], decode[:, 0] / decode[:, column]
                ),
            }
            for column, (number, name) in enumerate(models)
        ],
        "note": note,
        "command": f"python -m experiments benchmark inference {public_command(arguments)}",
        "commit": commit(),
    }
    if options.json:
        report(result, as_json=True)
    else:
        Console().print(_table(result), note)


def _parser() -> Parser:
    parser = Parser("benchmark inference", "Tokens a second of models, each against the first.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="embedded name, directory or hub name")
    parser.add_argument("--name", action="append", default=[], help="what to call a model; once for each, in order")
    parser.add_argument("--batch_size", type=at_least(1), default=1)
    parser.add_argument("--seq_len", type=at_least(1), default=512, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=at_least(1), default=32, help="tokens to decode after a prompt")
    parser.add_argument("--repeats", type=at_least(1), default=10, help="timed turns, after one that warms up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; torch's own choice if left out")
    add_device(parser)
    return parser


def _names(models: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """The given names, or the last part of each path where that tells them apart."""
    if not names:
        short = [Path(model).name for model in models]
        return short if len(set(short)) == len(short) else models
    if len(names) != len(models):
        raise InputError(f"{len(names)} --name for {len(models)} models; give one for each, or none")
    return names


@torch.inference_mode()
def measure(models: Sequence[Any], prompts: Tensor, new_tokens: int, repeats: int) -> tuple[Tensor, Tensor]:
    """Seconds of prefill and of decode, each (repeats, models) float64, taken in turns after one that warms up.

    Args:
        models: causal language models in evaluation mode, on the prompts' device.
        prompts: token ids (batch, seq_len).
        new_tokens: decoded after every prompt.
        repeats: timed turns.
    """
    turns = []
    for _ in track(range(repeats + 1), "benchmark"):
        turns.append([timed_generation(model, prompts, new_tokens)[1:] for model in models])
    return tuple(torch.tensor(turns[1:], dtype=torch.float64).unbind(-1))  # type: ignore[return-value]


@torch.inference_mode()
def timed_generation(model: Any, prompts: Tensor, new_tokens: int) -> tuple[Tensor, float, float]:
    """Greedy continuation: tokens (batch, 1 + new_tokens), of which prefill gives the first, and both seconds."""
    started = _now(prompts.device)
    output = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1:].argmax(-1)]
    filled = _now(prompts.device)
    for _ in range(new_tokens):
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1), filled - started, _now(prompts.device) - filled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(model: nn.Module) -> int:
    """Of the parameters as they lie in memory, shared ones counted once; a semi-structured one is several tensors."""
    total = 0
    for parameter in model.parameters():
        inner: Any = parameter.data
        parts = [inner]
        if hasattr(inner, "__tensor_flatten__"):
            parts = [getattr(inner, name) for name in inner.__tensor_flatten__()[0]]
        total += sum(part.nbytes for part in parts)
    return total


def _summary(rates: Tensor, ratios: Tensor) -> dict[str, Any]:
    """Medians and quartiles over the turns, (repeats,) each."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, rate, high = rates.quantile(quartiles).tolist()
    ratio_low, ratio, ratio_high = ratios.quantile(quartiles).tolist()
    return {
        "tokens_per_second": rate,
        "spread": [low, high],
        "ratio": ratio,
        "ratio_spread": [ratio_low, ratio_high],
    }


def _note(device: torch.device) -> str:
    zeros = "Zeros buy no time here: unstructured and N:M weights run as dense matrices"
    if device.type == "cuda":
        return f"{zeros}, except in rows marked semi-structured."
    return f"{zeros}. The semi-structured form of 2:4, which could save some, needs CUDA."


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"inference on {result['device']}, {result['dtype']}, {result['threads']} CPU threads")
    table.add_column("")
    for column in ("parameters", "MB", "prefill tokens/s", "ratio", "decode tokens/s", "ratio"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        cells = [row["model"], f"{row['parameters'] / 1e6:.1f} M", f"{row['bytes'] / 1e6:.0f}"]
        for part in (row["prefill"], row["decode"]):
            low, high = part["spread"]
            cells += [f"{part['tokens_per_second']:,.1f} ({low:,.1f}–{high:,.1f})", f"{part['ratio']:.2f}×"]
        table.add_row(*cells)
    return table
