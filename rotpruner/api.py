"""The Python interface: prune a model in a learned rotated space, without Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotpruner.allotment import Allotment, LayerSparsity
from rotpruner.artifacts import check_new_directory, save_model
from rotpruner.batches import chosen_windows
from rotpruner.choices import Choices
from rotpruner.compensation import check_compensation
from rotpruner.embedded import embedded_name
from rotpruner.errors import InputError
from rotpruner.kept_weights import check_takes_weights
from rotpruner.learning import SecondFit
from rotpruner.loading import check_pattern, check_seq_len
from rotpruner.model_card import Origin, pruner_name, write_card
from rotpruner.objectives import Objective
from rotpruner.oneshot import Learned
from rotpruner.patterns import Pattern, Scope, Slice
from rotpruner.perplexity import windows
from rotpruner.placements import Placement, check_placement
from rotpruner.precision import check_device, fast_dtype
from rotpruner.progress import Progress, unseen
from rotpruner.pruners import Pruner, resolve_pruner
from rotpruner.pruning import Pruning, Rotating
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import Start
from rotpruner.surrogates import Surrogate


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pattern: str | float = "2:4",
    scope: Scope = "row",
    pruner: str | Pruner = "wanda",
    rotate: Placement | Literal["none"] | Rotations = "shared",
    spaces: Sequence[str] = ("residual", "value_heads"),
    steps: int = 100,
    lr: float = 2e-3,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    surrogate: Surrogate = Surrogate(),  # noqa: B008 - frozen
    layer_sparsity: LayerSparsity = "uniform",
    exceptions: Mapping[str, str | float] = MappingProxyType({}),
    compensate: int = 0,
    second_fit: SecondFit | None = None,
    num_sequences: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    rotations_directory: str | Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    progress: Progress = unseen,
) -> PreTrainedModel:
    """A pruned copy of a model, in a basis learned for it; `rotpruner.save` makes it an ordinary checkpoint.

    It does what the command `fit` does; what the command `prune` does, without learning, is `rotpruner.prune_model`.

    Args:
        model: causal language model of a known family; not changed.
        tokenizer: its own.
        texts: documents to calibrate and learn on.
        pattern, scope, pruner: what to prune and how.
        rotate: `shared` learns one rotation for the whole residual stream, so that all of it merges away; `per_layer`,
            `per_block` or a number of matrices leave products of theirs to be run with the model; `none` prunes the
            model as it is. Rotations of this model are where learning begins; with no steps, they stay.
        spaces: which spaces rotate (of a slice, the residual stream alone), unless `rotate` says so; empty is `none`.
            With `mlp`, whose features N:M patterns can order, the others start from permutations too.
        steps, lr: of learning, one sequence a step.
        objective, surrogate: what is minimised, and how its gradient passes the masks.
        layer_sparsity: `uniform`, or `owl` to let blocks with many outliers keep more of an unstructured pattern.
        exceptions: patterns of the decoder linears whose names match, as in `{"*.down_proj": "4:8"}`, the last match
            counts; 0.0 leaves them dense.
        compensate: on how many of the sequences the kept weights are fitted, in closed form, see
            `rotpruner.compensation`; 0 leaves them as they are.
        second_fit: continues to train the rotations after that, under its masks; None leaves them.
        num_sequences, seq_len: size of the calibration set, taken from the texts by `seed`.
        dtype: of the frozen weights while learning, and of the products that give a float32 model's statistics; weights
            are pruned in the model's own dtype. None is bfloat16 where the model's device has instructions for it, else
            float32.
        gradient_checkpointing: recompute each block in the backward pass; slower, much smaller.
        rotations_directory: where the learned rotations are written as well; must not exist yet.
        on_step: called with each step and its losses.
        progress: wraps what is iterated over, steps and blocks, and is told their name: for progress bars.

    Returns:
        A model of the same class, its head untied if the residual stream was rotated. Only `rotpruner.save` writes
        one with products of rotations so that it can be loaded again.

    Raises:
        InputError: an argument or the model cannot be used, or the texts are too short.
    """
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of documents, as in [text]")
    resolved, allotment = resolve_pruner(pruner), Allotment.parse(pattern, layer_sparsity, exceptions, scope)
    parsed = allotment.pattern
    check_pattern(model, allotment)
    check_seq_len(model.config, seq_len)
    check_compensation(compensate, num_sequences, parsed)
    if num_sequences < 1 or steps < 0 or not 0 < lr < math.inf:
        raise InputError(
            f"num_sequences {num_sequences}, steps {steps} and lr {lr} must be at least 1, at least 0 and above 0"
        )
    rotating = _rotating(rotate, model, spaces, parsed)
    if second_fit is not None:
        if not compensate or rotating is None:
            why = "nothing rotates" if rotating is None else "compensate is 0, so no update comes before it"
            raise InputError(f"second_fit comes after the update of kept weights, and {why}: leave it out")
        check_takes_weights("second_fit", surrogate, objective, parsed)
    if rotating is not None and (steps or second_fit is not None or rotating.given is None):
        Choices(
            allotment=allotment,
            pruner=resolved,
            objective=objective,
            surrogate=surrogate,
            spaces=rotating.spaces,
            placement=rotating.placement,
            orthogonal_map="cayley",
            start=rotating.start if rotating.given is None else None,
        ).check(model.config)
    check_device(model.device)
    if dtype == torch.float16:
        raise InputError("dtype float16 loses the gradients of a mean over tokens; give bfloat16 or float32")
    if rotations_directory is not None:
        if rotating is None:
            raise InputError(f"nothing rotates that could be written to '{rotations_directory}'; leave it out")
        check_new_directory(rotations_directory)
    rows = _calibration_rows(tokenizer, texts, num_sequences, seq_len, seed).to(model.device)
    sliced = isinstance(parsed, Slice)
    origin = Origin(
        base_model=embedded_name(model.config._name_or_path) or "unnamed",
        **allotment.in_words(),
        pruner=None if sliced else pruner_name(resolved),
        calibration=f"{len(texts)} texts given in Python",
        num_sequences=num_sequences,
        seq_len=seq_len,
        seed=seed,
        basis="pca" if sliced else "none",
        spaces=("residual",) if sliced else (),
        update="compensation" if compensate else None,
    )
    pruning = Pruning(
        model,
        rows,
        resolved,
        allotment,
        surrogate,
        objective,
        dtype=dtype or fast_dtype(model.device),
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        on_step=on_step,
        progress=progress,
    )

    def keep(found: Learned) -> Rotations:
        given = Rotations.of(found.rotations or {}, model)
        if rotations_directory is not None:
            given.save_pretrained(rotations_directory, replace=True)
        return given

    pruned, found = pruning.run(rotating, steps, lr, compensate, second_fit, keep)
    if rotating is not None:
        second = 0 if second_fit is None else second_fit.steps
        total = steps + second
        learned = rotating.described(total) | {"learned_masks": surrogate.learns_masks and found.masks is not None}
        read = total * seq_len if objective.runs_model else 0
        origin = replace(origin, steps=total, second_steps=second, training_tokens=read, **learned)
    pruned.origin = origin
    return pruned


def _rotating(
    rotate: Placement | Literal["none"] | Rotations,
    model: PreTrainedModel,
    spaces: Sequence[str],
    pattern: Pattern | Slice,
) -> Rotating | None:
    """What `rotate` and `spaces` of `prune` ask for; None if nothing rotates."""
    if isinstance(rotate, Rotations):
        rotate.check_model(model)
        if isinstance(pattern, Slice) and set(rotate) != {"residual"}:
            raise InputError(f"pattern {pattern} removes residual directions only, but rotate has {sorted(rotate)}")
        return Rotating(list(rotate), len(rotate["residual"]) if "residual" in rotate else "shared", given=rotate)
    if rotate == "none":
        return None
    if isinstance(spaces, str):
        raise InputError(f"spaces is one string; give a list, as in ['{spaces}']")
    sliced = isinstance(pattern, Slice)  # which has no other space
    check_placement(model.config, rotate, ["residual"] if sliced else spaces)
    if not spaces:
        return None
    if sliced:
        spaces = ["residual"]
    start: Start = "pca" if sliced else "permutation" if "mlp" in spaces else "identity"
    return Rotating(spaces, rotate, start)


def _calibration_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    num_sequences: int,
    seq_len: int,
    seed: int,
) -> Tensor:
    """Token ids (num_sequences, seq_len), drawn from the windows of the texts as a fit draws them."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
    rows = windows(ids, seq_len)
    if len(rows) < num_sequences:
        raise InputError(
            f"the texts fill {len(rows)} windows of {seq_len} tokens, but num_sequences is {num_sequences}; "
            "give more text or ask for fewer"
        )
    return chosen_windows(rows, num_sequences, seed)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write an ordinary checkpoint that plain `transformers` loads, with a model card if `prune` made the model.

    Args:
        model: pruned or not.
        tokenizer: its own.
        directory: must not exist yet, or be empty.

    Raises:
        InputError: `directory` holds something already.
    """
    save_model(model, tokenizer, directory)
    origin = getattr(model, "origin", None)
    if isinstance(origin, Origin):
        write_card(directory, origin, model.config)
