"""`python -m experiments prune`: prune a model once, without learning."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor
from transformers import PreTrainedModel

from callbacks.terminal import console, track
from datamodules.evaluation import perplexities, text_windows
from datamodules.texts import check_text
from datamodules.tokens import calibration_tokens
from experiments.arguments import Parser, add_device, at_least, report
from rotpruner.allotment import Allotment, LayerSparsity
from rotpruner.artifacts import check_new_directory, save_model
from rotpruner.calibration import gather_model_moments
from rotpruner.compensation import check_compensation
from rotpruner.errors import InputError
from rotpruner.families import available_spaces
from rotpruner.loading import check_pattern, check_seq_len, load_config, load_model, load_tokenizer, meta_model
from rotpruner.measures import parameter_count, sparsity_of
from rotpruner.memory import home_of
from rotpruner.model_card import Origin, evaluation_of, pruner_name, write_card
from rotpruner.oneshot import Learned, check_update, prune_and_compensate
from rotpruner.patterns import Scope, Slice
from rotpruner.precision import dtype_name, resolve_dtype
from rotpruner.provenance import commit, device_name, public_command
from rotpruner.pruners import PRUNERS, resolve_pruner
from rotpruner.replay import moments_by_block
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import RotationSet, random_rotations
from rotpruner.shortcuts import online_cost
from rotpruner.slicegpt import slice_per_block
from rotpruner.slicing import sliced_width


def main(arguments: list[str]) -> None:
    """Print `{"pattern", "sparsity", "seconds", "dtype", "device", "parameters"}`; if asked, `"output"` and `"ppl"`."""
    options = _parser().parse_args(arguments)
    begun_at = commit()
    allotment = _checked_allotment(options)
    config = load_config(options.model)
    check_pattern(meta_model(config), allotment)
    check_seq_len(config, options.seq_len)
    tokenizer = load_tokenizer(options.model)
    texts = text_windows(options.text, tokenizer, options.seq_len, options.max_tokens)
    tokens = calibration_tokens(
        options.calibration,
        tokenizer,
        num_sequences=options.num_sequences,
        seq_len=options.seq_len,
        seed=options.seed,
        tokenizer_name=options.model,
    )
    model = load_model(options.model)
    rotations = _rotations(options, model)
    home = home_of(model, options.device, tokens.numel(), tokens[: options.compensate].numel())
    model.to(home)  # type: ignore[arg-type]
    result = _prune(model, allotment, rotations, tokens.to(home).split(1), options)

    def describe() -> None:
        command = f"python -m experiments prune {public_command(arguments)}"
        origin = _origin(options, allotment, rotations, [{"name": "pruned", **result}], command)
        write_card(options.output, origin, config, begun_at)

    if options.output is not None:
        save_model(model, tokenizer, options.output)
        describe()  # without perplexities, should their evaluation be cut short
        console.print(f"saved {options.output}")
        result["output"] = str(options.output)
    if texts:
        result["ppl"] = perplexities(model.float(), texts, track, device=options.device)
        if options.output is not None:
            describe()
    report(result, options.json)


def _checked_allotment(options: argparse.Namespace) -> Allotment:
    """What is to go, if all options go together; raises InputError before anything is loaded."""
    if options.output is None and not options.text:
        raise InputError("nothing to do with the pruned model: give --output, --text, or both")
    allotment = _allotment(options)
    pattern = allotment.pattern
    if isinstance(pattern, Slice):
        _check_slice(options)
    elif options.placement != "shared":
        raise InputError(
            f"--placement {options.placement} applies only to slice:FRACTION, not to pattern {pattern}: leave it out"
        )
    elif options.pruner is None:
        raise InputError(f"pattern {pattern} needs a --pruner: {', '.join(PRUNERS)}, or an import path")
    if options.pruner is not None:
        resolve_pruner(options.pruner)
    check_update(None if options.update is None else resolve_pruner(options.update))
    check_compensation(options.compensate, options.num_sequences, pattern)
    if options.output is not None:
        check_new_directory(options.output)
    check_text(options.calibration)
    return allotment


def _allotment(options: argparse.Namespace) -> Allotment:
    names = [names for names, _ in options.exceptions]
    if twice := {each for each in names if names.count(each) > 1}:
        raise InputError(f"--except {', '.join(sorted(twice))} is given twice; the last match counts: leave one out")
    return Allotment.parse(options.pattern, options.layer_sparsity, dict(options.exceptions), options.scope)


def _rotations(options: argparse.Namespace, model: PreTrainedModel) -> RotationSet | None:
    """Those that were asked for, of this model."""
    if options.rotations is None:
        return None
    if options.rotations == "random":
        return random_rotations(model.config, available_spaces(model.config), options.seed)
    given = Rotations.from_pretrained(options.rotations)
    given.check_model(model)
    return dict(given)


def _prune(
    model: PreTrainedModel,
    allotment: Allotment,
    rotations: RotationSet | None,
    batches: Sequence[Tensor],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Prune a model in place; what is to be reported of it."""
    started = time.perf_counter()
    load_there = partial(load_model, options.model, device=model.device)
    dtype = None
    if options.calibration_dtype is not None:
        dtype = resolve_dtype(options.calibration_dtype, options.device)
    pattern = allotment.pattern
    width = sliced_width(model.config, pattern) if isinstance(pattern, Slice) else None
    length = parameters = None
    flops = 0
    if width is not None and options.placement == "per_block":
        parameters, flops = slice_per_block(model, width, batches, dtype, options.device, track)
    else:
        pruner = resolve_pruner(options.pruner or "magnitude")  # a slice asks none
        moments = None
        if options.statistics == "dense" and allotment.prunes:
            gather = partial(moments_by_block, dtype=dtype, device=options.device, progress=track)
            # A copy where it is to be fused: what is pruned is fused and rotated in one, and rounded once.
            dense = load_there() if "residual" in (rotations or {}) else model
            moments = gather_model_moments(dense, pruner, rotations or {}, batches, gather)
            del dense
        update = None if options.update is None else resolve_pruner(options.update)
        given = Learned(rotations, moments)
        running = {"calibration_dtype": dtype, "device": options.device, "progress": track}
        sequences = options.compensate
        length = prune_and_compensate(
            model, pruner, allotment, batches, given, sequences, load_there, update=update, **running
        )
    # What calibrated it: `BlockReplay` runs 16-bit models in their own dtype.
    computed = model.dtype if dtype is None or model.dtype.itemsize < 4 else dtype
    result: dict[str, Any] = {
        "pattern": str(allotment),
        "sparsity": sparsity_of(model),
        "seconds": round(time.perf_counter() - started, 1),
        "dtype": dtype_name(computed),
        "device": device_name(options.device),
        "parameters": parameters or parameter_count(model),
    }
    if width is not None:
        result["hidden_size"] = width
    if length is not None:
        result["step_length"] = length
    if online := flops + online_cost(model).flops:
        result["online_flops"] = online
    return result


def _origin(
    options: argparse.Namespace,
    allotment: Allotment,
    rotations: RotationSet | None,
    rows: list[dict[str, Any]],
    command: str,
) -> Origin:
    """What the model card says."""
    sliced = options.pruner is None
    basis = "none" if options.rotations is None else "random" if options.rotations == "random" else "learned"
    if sliced and options.rotations is None:
        basis = "pca"
    return Origin(
        base_model=options.model,
        **allotment.in_words(),
        pruner=None if sliced else pruner_name(resolve_pruner(options.pruner)),
        basis=basis,
        spaces=["residual"] if basis == "pca" else list(rotations or ()),
        update=" and ".join(filter(None, [options.update, options.compensate and "compensation"])) or None,
        calibration=options.calibration,
        num_sequences=options.num_sequences,
        seq_len=options.seq_len,
        seed=options.seed,
        rows=rows,
        evaluation=evaluation_of(options.seq_len, options.max_tokens),
        command=command,
    )


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
    parser.add_argument("--seq_len", type=at_least(2), default=1024, help="tokens per sequence")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the calibration and of random rotations")
    parser.add_argument("--rotations", help="learned rotations, a directory or hub name, or 'random'")
    parser.add_argument(
        "--update", help="pruner, such as sparsegpt, that then updates the kept weights under --pruner's mask"
    )
    parser.add_argument(
        "--compensate",
        type=at_least(0),
        default=0,
        metavar="SEQUENCES",
        help="then fit the kept weights to the dense model, in closed form, on this many sequences",
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
        "--except",
        dest="exceptions",
        type=_exception,
        action="append",
        default=[],
        metavar="NAMES=PATTERN",
        help="another pattern for decoder linears of such names, '*.down_proj=4:8'; 0 leaves them dense; repeatable",
    )
    parser.add_argument(
        "--statistics",
        choices=("sequential", "dense"),
        default="sequential",
        help="from the pruned blocks before each one, or from the dense model, as rotations are learned",
    )
    parser.add_argument(
        "--calibration_dtype",
        choices=("auto", "float32", "bfloat16"),
        help="of the matrix products that give the statistics; auto: bfloat16 where the device has instructions for "
        "it, else float32; the model's own if left out, or if that has 16 bits",
    )
    add_device(parser)
    return parser


def _exception(text: str) -> tuple[str, str]:
    names, equals, pattern = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAMES=PATTERN, as in '*.down_proj=4:8'")
    return names, pattern


def _check_slice(options: argparse.Namespace) -> None:
    """Refuse what means nothing for a slice."""
    if options.pruner is not None:
        raise InputError(f"a slice removes directions, not weights: leave --pruner {options.pruner} out")
    for name, plain in (("update", None), ("statistics", "sequential")):
        if getattr(options, name) != plain:
            raise InputError(f"a slice removes directions, not weights: leave --{name} {getattr(options, name)} out")
    if options.placement == "per_block" and (options.output is not None or options.rotations is not None):
        raise InputError("placement per_block finds its own bases and has no plain checkpoint: give --text only")
