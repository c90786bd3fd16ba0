"""`python -m experiments prune`: prune a model once, without learning."""

from __future__ import annotations

import argparse
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

from callbacks.terminal import console, track
from datamodules.evaluation import perplexities, tokenize_texts
from datamodules.texts import check_text
from datamodules.tokens import calibration_tokens
from experiments.arguments import Parser, add_device, at_least, report
from rotpruner.artifacts import check_new_directory, save_model
from rotpruner.compensation import check_compensation, compensate
from rotpruner.errors import InputError
from rotpruner.families import available_spaces
from rotpruner.loading import check_pattern, check_seq_len, load_config, load_model, load_tokenizer, meta_model
from rotpruner.model_card import Origin, evaluation_of, public, write_card
from rotpruner.oneshot import (
    LayerSparsity,
    check_layer_sparsity,
    gather_model_moments,
    parameter_count,
    prune_model,
    sparsity_of,
)
from rotpruner.patterns import Scope, Slice, parse_pattern
from rotpruner.precision import resolve_dtype
from rotpruner.provenance import commit
from rotpruner.pruners import PRUNERS, resolve_pruner
from rotpruner.replay import moments_by_block
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import RotationSet, merge_rotations, random_rotations
from rotpruner.shortcuts import online_cost
from rotpruner.slicegpt import slice_per_block
from rotpruner.slicing import sliced_width


def main(arguments: list[str]) -> None:
    """Print `{"pattern", "sparsity", "seconds", "parameters"}`, and `"output"` or `"ppl"` if these were asked for."""
    options = _parser().parse_args(arguments)

    begun_at = commit()
    if options.output is None and not options.text:
        raise InputError("nothing to do with the pruned model: give --output, --text, or both")
    pattern = parse_pattern(options.pattern, options.scope)
    if isinstance(pattern, Slice):
        _check_slice(options)
    elif options.placement != "shared":
        raise InputError(f"--placement {options.placement} is of a slice's PCA, not of pattern {pattern}: leave it out")
    elif options.pruner is None:
        raise InputError(f"pattern {pattern} needs a --pruner: {', '.join(PRUNERS)}, or an import path")
    pruner = resolve_pruner(options.pruner or "magnitude")
    update = None if options.update is None else resolve_pruner(options.update)
    check_compensation(options.compensate, options.num_sequences, pattern)
    check_layer_sparsity(pattern, options.layer_sparsity)
    if options.output is not None:
        check_new_directory(options.output)
    check_text(options.calibration)
    config = load_config(options.model)
    check_pattern(meta_model(config), pattern)
    check_seq_len(config, options.seq_len)
    tokenizer = load_tokenizer(options.model)
    texts = tokenize_texts(options.text, tokenizer, options.seq_len, options.max_tokens)
    tokens = calibration_tokens(
        options.calibration,
        tokenizer,
        num_sequences=options.num_sequences,
        seq_len=options.seq_len,
        seed=options.seed,
        tokenizer_name=options.model,
    )
    model = load_model(options.model)
    rotations: RotationSet | None = None
    if options.rotations == "random":
        rotations = random_rotations(config, available_spaces(config), options.seed)
    elif options.rotations is not None:
        given = Rotations.from_pretrained(options.rotations)
        given.check_model(model)
        rotations = dict(given)

    started = time.perf_counter()
    batches, moments = tokens.split(1), None
    dtype = None
    if options.calibration_dtype is not None:
        dtype = resolve_dtype(options.calibration_dtype, options.device)
    if options.statistics == "dense" and not isinstance(pattern, Slice) and pattern.sparsity > 0:
        gather = partial(moments_by_block, dtype=dtype, device=options.device, progress=track)
        moments = gather_model_moments(model, pruner, rotations or {}, batches, gather)
    parameters = None
    if isinstance(pattern, Slice) and options.placement == "per_block":
        parameters = slice_per_block(model, sliced_width(config, pattern), batches, dtype, options.device, track)
    else:
        prune_model(
            model,
            pruner,
            pattern,
            batches,
            rotations,
            moments,
            update=update,
            layer_sparsity=options.layer_sparsity,
            calibration_dtype=dtype,
            device=options.device,
            progress=track,
        )
    length = None
    if options.compensate:
        dense = load_model(options.model)
        merge_rotations(dense, rotations or {})
        fitted = batches[: options.compensate]
        length = compensate(model, dense, fitted, calibration_dtype=dtype, device=options.device, progress=track)
    seconds = round(time.perf_counter() - started, 1)
    result: dict[str, Any] = {"pattern": str(pattern), "sparsity": sparsity_of(model), "seconds": seconds}
    if isinstance(pattern, Slice):
        result["hidden_size"] = sliced_width(config, pattern)
    if length is not None:
        result["step_length"] = length
    result["parameters"] = parameters or parameter_count(model)
    if flops := online_cost(model).flops:
        result["online_flops"] = flops
    if options.output is not None:
        save_model(model, tokenizer, options.output)
        write_card(options.output, _origin(options, rotations, [{"name": "pruned", **result}]), config, begun_at)
        console.print(f"saved {options.output}")
        result["output"] = str(options.output)
    if texts:
        measured = texts, options.seq_len, options.max_tokens, track
        result["ppl"] = perplexities(model.float(), *measured, device=options.device)
        if options.output is not None:
            write_card(options.output, _origin(options, rotations, [{"name": "pruned", **result}]), config, begun_at)
    report(result, options.json)


def _origin(options: argparse.Namespace, rotations: RotationSet | None, rows: list[dict[str, Any]]) -> Origin:
    """What the model card says."""
    sliced = options.pruner is None
    basis = "none" if options.rotations is None else "random" if options.rotations == "random" else "learned"
    if sliced and options.rotations is None:
        basis = "pca"
    return Origin(
        base_model=options.model,
        pattern=rows[0]["pattern"],
        pruner=options.pruner,
        basis=basis,
        spaces=["residual"] if basis == "pca" else list(rotations or ()),
        update=" and ".join([*filter(None, [options.update]), *["compensation"] * bool(options.compensate)]) or None,
        layer_sparsity=options.layer_sparsity,
        calibration=options.calibration,
        num_sequences=options.num_sequences,
        seq_len=options.seq_len,
        seed=options.seed,
        rows=rows,
        evaluation=evaluation_of(options.seq_len, options.max_tokens),
        command=_command(options),
    )


def _command(options: argparse.Namespace) -> str:
    """The command with everything that is not left at its default, of local paths the last part only."""
    words, parser = ["python", "-m", "experiments", "prune"], _parser()
    for name, value in vars(options).items():
        if name not in ("json", "device") and value not in (None, [], parser.get_default(name)):
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(public(each))]
    return shlex.join(words)


def _parser() -> Parser:
    parser = Parser("prune", "Prune every decoder linear and save a checkpoint that plain transformers loads.")
    parser.add_argument("--model", required=True, help="embedded name, directory or hub name")
    parser.add_argument("--pruner", help=f"{', '.join(PRUNERS)}, or the import path of a Pruner; none for a slice")
    parser.add_argument(
        "--pattern", required=True, help="N:M, a sparsity in [0, 1) (0.0 only rotates), or slice:FRACTION"
    )
    parser.add_argument("--scope", choices=get_args(Scope), default="row", help="where a sparsity is counted")
    parser.add_argument("--calibration", default="wikipedia_calibration", help="name or path of a text")
    parser.add_argument("--num_sequences", type=at_least(1), default=64)
    parser.add_argument("--seq_len", type=at_least(2), default=1024, help="tokens a sequence")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the calibration and of random rotations")
    parser.add_argument("--rotations", help="learned rotations, a directory or hub name, or 'random'")
    parser.add_argument("--update", help="pruner whose weight update follows under the mask of --pruner, as sparsegpt")
    parser.add_argument(
        "--compensate",
        type=at_least(0),
        default=0,
        metavar="SEQUENCES",
        help="fit the kept weights to the dense model's stream, in closed form, on so many calibration sequences",
    )
    parser.add_argument(
        "--placement",
        choices=("shared", "per_block"),
        default="shared",
        help="of a slice's PCA: per_block is SliceGPT's own, which can only be evaluated",
    )
    parser.add_argument("--output", type=Path, help="directory to write a checkpoint to; must not exist yet")
    parser.add_argument("--text", action="append", default=[], help="test text to evaluate on in float32; repeatable")
    parser.add_argument("--max_tokens", type=at_least(1), help="first tokens of each test text to use; all if left out")
    parser.add_argument(
        "--layer_sparsity",
        choices=get_args(LayerSparsity),
        default="uniform",
        help="owl: outlier-rich blocks keep more",
    )
    parser.add_argument(
        "--statistics",
        choices=("sequential", "dense"),
        default="sequential",
        help="of what pruned predecessors give each block, or of the dense model, as rotations are learned",
    )
    parser.add_argument(
        "--calibration_dtype",
        choices=("auto", "float32", "bfloat16"),
        help="of the matrix products that give the statistics; auto: bfloat16 where the device has instructions for "
        "it, else float32; the model's own if left out, or if that has 16 bits",
    )
    add_device(parser)
    return parser


def _check_slice(options: argparse.Namespace) -> None:
    """Refuse what means nothing for a slice."""
    if options.pruner is not None:
        raise InputError(f"a slice removes directions, not weights: leave --pruner {options.pruner} out")
    for name, plain in (("update", None), ("statistics", "sequential"), ("scope", "row")):
        if getattr(options, name) != plain:
            raise InputError(f"a slice removes directions, not weights: leave --{name} {getattr(options, name)} out")
    if options.placement == "per_block" and (options.output is not None or options.rotations is not None):
        raise InputError("placement per_block finds its own bases and has no plain checkpoint: give --text only")
