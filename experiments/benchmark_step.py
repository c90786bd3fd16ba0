"""`python -m experiments benchmark step`: a step of learning against an ordinary step of the dense model.

The floor is forward and backward of the dense model with gradients of all its weights, on the same tokens and
with the same loss against the same cached teacher states. Both are timed in turns, in one run.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from callbacks.terminal import track
from datamodules.tokens import calibration_tokens
from experiments.arguments import Parser, add_device, at_least, report
from rotpruner.loading import check_pattern, check_seq_len, load_config, load_model, load_tokenizer, meta_model
from rotpruner.measures import parameter_count
from rotpruner.objectives import Objective
from rotpruner.patterns import parse_pattern
from rotpruner.precision import dtype_name, fast_dtype
from rotpruner.provenance import commit, device_name, public_command
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import LearnedRotations


def main(arguments: list[str]) -> None:
    """Print `{"ratio", "seconds", "dense_seconds", "parts", "peak_bytes", "dense_fp32_bytes"}` and what was timed."""
    parser = Parser("benchmark step", "Time a step of learning against a step of the dense model.")
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, directory or hub name")
    parser.add_argument("--pruner", default="wanda")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--calibration", default="wikipedia_calibration", help="name or path of a text")
    parser.add_argument("--seq_len", type=at_least(2), default=1024)
    parser.add_argument("--batch_size", type=at_least(1), default=2)
    parser.add_argument("--refresh_every", type=at_least(1), default=5, help="steps between choices of masks")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both")
    parser.add_argument("--learning_only", action="store_true", help="no dense steps: the peak is that of learning")
    add_device(parser)
    options = parser.parse_args(arguments)

    config, pattern = load_config(options.model), parse_pattern(options.pattern)
    check_pattern(meta_model(config), pattern)
    check_seq_len(config, options.seq_len)
    imported = _peak_bytes(options.device)
    tokens = calibration_tokens(
        options.calibration,
        load_tokenizer(options.model),
        num_sequences=options.batch_size,
        seq_len=options.seq_len,
        seed=0,
        tokenizer_name=options.model,
    ).to(options.device)
    base = load_model(options.model, fast_dtype(options.device)).to(options.device)
    weights = list(base.parameters())
    dense_bytes = 4 * parameter_count(base)
    rotated = RotatedModel(
        base,
        LearnedRotations(base.config).to(options.device),
        resolve_pruner(options.pruner),
        pattern,
        objective=Objective(kl=1.0),
        gradient_checkpointing=options.gradient_checkpointing,
    )
    rotated.calibrate(tokens.split(1))
    optimizer = torch.optim.Adam(rotated.rotations.parameters(), lr=2e-3)
    index = torch.arange(len(tokens))
    rotated.refresh_masks()
    rotated.loss(tokens, index)  # the teacher's states are kept from here on

    def learn() -> None:
        rotated.loss(tokens, index)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {"dense": [], "step": [], "masks": [], "forward": []}
    for _ in track(range(options.repeats + 1), "benchmark"):
        times["masks"].append(_timed(rotated.refresh_masks, options.device))
        times["step"].append(_timed(learn, options.device))
        with torch.no_grad():
            times["forward"].append(_timed(lambda: rotated.loss(tokens, index), options.device))
        if not options.learning_only:
            times["dense"].append(_timed(lambda: _dense_step(rotated, weights, tokens, index), options.device))
    # The first of each warms up.
    seconds = {name: median(values[1:]) for name, values in times.items() if values}
    total = seconds["step"] + seconds["masks"] / options.refresh_every
    parts = {
        "forward": seconds["forward"],
        "backward and optimiser": seconds["step"] - seconds["forward"],
        "masks, a step's share": seconds["masks"] / options.refresh_every,
    }
    timed = {
        key: getattr(options, key) for key in ("model", "batch_size", "seq_len", "gradient_checkpointing", "repeats")
    }
    result: dict[str, Any] = {**timed, "dtype": dtype_name(base.dtype)}
    result |= {"device": device_name(options.device), "threads": torch.get_num_threads()}
    result |= {"seconds": total, "parts": parts}
    if not options.learning_only:
        result |= {"ratio": total / seconds["dense"], "dense_seconds": seconds["dense"]}
    result |= {"peak_bytes": _peak_bytes(options.device) - imported, "dense_fp32_bytes": dense_bytes}
    result |= {"command": f"python -m experiments benchmark step {public_command(arguments)}", "commit": commit()}
    report(result, options.json)


def _dense_step(rotated: RotatedModel, weights: list[torch.nn.Parameter], tokens: Tensor, index: Tensor) -> None:
    """Forward and backward without rotations and masks, with gradients of the weights."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        rotated.dense_loss(tokens, index)["loss"].backward()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _peak_bytes(device: torch.device) -> int:
    """The most that PyTorch has held on a GPU so far; on a CPU the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
