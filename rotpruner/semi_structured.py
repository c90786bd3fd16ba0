"""The form in which GPUs multiply by 2:4 weights faster than by dense ones."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from rotpruner.errors import InputError
from rotpruner.layout import linear_modules
from rotpruner.patterns import NM
from rotpruner.precision import dtype_name

Model = TypeVar("Model", bound=nn.Module)


def two_four_linears(model: nn.Module) -> list[nn.Linear]:
    """The decoder linears of which at least two of every four neighbouring input weights are zero."""
    return [linear for linear in linear_modules(model).values() if NM(2, 4).holds(linear.weight)]


@torch.no_grad()
def semi_structured(model: Model) -> Model:
    """Put the decoder linears of a 2:4 model into torch's semi-structured form, in place; it computes the same.

    Linears of other patterns, or left dense, stay as they are.

    It is for inference, on NVIDIA GPUs with sparse tensor cores, in 16 bits; what it gains depends on the shapes. Both
    forms are there for a moment, 25 bits for every 16 of the decoder linears. The model cannot be saved any more.

    Args:
        model: plain causal language model in float16 or bfloat16, on a GPU.

    Returns:
        The same model.

    Raises:
        InputError: none of its weights is 2:4, or the device, the dtype or a shape does not allow the form; the model
            is as it was then.
    """
    linears = two_four_linears(model)
    if not linears:
        raise InputError("no decoder linear is 2:4, which the semi-structured form needs: prune to 2:4")
    for dtype in {linear.weight.dtype for linear in linears} - {torch.float16, torch.bfloat16}:
        # One of torch's two backends takes float32, as 1 of 2, and drops weights without a word.
        name = dtype_name(dtype)
        raise InputError(f"weights in {name} have no 2:4 form: load the model in bfloat16 or float16")
    try:
        forms = [torch.sparse.to_sparse_semi_structured(linear.weight.detach()) for linear in linears]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(
            f"torch has no semi-structured form of these weights: {str(error).splitlines()[0]}; it needs a GPU with "
            "sparse tensor cores and float16 or bfloat16"
        ) from None
    for linear, form in zip(linears, forms, strict=True):
        linear.weight = nn.Parameter(form, requires_grad=False)
    return model
