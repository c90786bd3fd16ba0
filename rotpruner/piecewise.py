"""Sums of which only one summand's graph is held at a time, and none is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Tensors under a name each.
Named = Mapping[str, Sequence[Tensor]]
Piece = Callable[[Named], Tensor]


def sum_of_pieces(pieces: Sequence[Piece], inputs: Named, captured: Sequence[Tensor] = ()) -> Tensor:
    """Σ piece(inputs), (K,), for pieces that give (K,) each; differentiable once.

    Each piece is differentiated right after it has been computed, so that its graph is gone before the next one's
    comes. For that all that learns must be known: the inputs, and `captured`, leaves that pieces use besides.
    """
    if not torch.is_grad_enabled():
        return torch.stack([piece(inputs) for piece in pieces]).sum(0)
    lengths = {name: len(tensors) for name, tensors in inputs.items()}
    flat = (tensor for tensors in inputs.values() for tensor in tensors)
    return _SumOfPieces.apply(pieces, lengths, tuple(captured), *flat, *captured)


class _SumOfPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: Sequence[Piece], lengths: Mapping[str, int], captured: tuple[Tensor, ...], *flat: Tensor
    ) -> Tensor:
        ctx.needed = ctx.needs_input_grad[3:]
        given = len(flat) - len(captured)
        leaves = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(flat[:given], ctx.needed[:given], strict=True)
        ]
        with torch.enable_grad():
            # Modules with hooks on gradients, as counters of operations have them, take no leaves.
            rest = iter([leaf.view_as(leaf) for leaf in leaves])
        inputs = {name: [next(rest) for _ in range(length)] for name, length in lengths.items()}
        learning = [tensor for tensor, needed in zip([*leaves, *captured], ctx.needed, strict=True) if needed]
        totals, rows = _values_and_gradients(pieces[0], inputs, learning)
        for piece in pieces[1:]:
            values, more = _values_and_gradients(piece, inputs, learning)
            totals = totals + values
            rows = [list(map(_sum, *pair)) for pair in zip(rows, more, strict=True)]
        # Saved, not kept: autograd lets go of them in the backward pass.
        ctx.save_for_backward(*(gradient for row in rows for gradient in row))
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        found: list[Tensor | None] = [None] * sum(ctx.needed)
        saved = iter(ctx.saved_tensors)
        for factor in outer:
            row = [next(saved) for _ in found]
            found = [
                _sum(known, None if part is None else factor * part) for known, part in zip(found, row, strict=True)
            ]
        rest = iter(found)
        return None, None, None, *(next(rest) if needed else None for needed in ctx.needed)


def _values_and_gradients(
    piece: Piece, inputs: Named, learning: Sequence[Tensor]
) -> tuple[Tensor, list[Sequence[Tensor | None]]]:
    """What a piece gives, (K,), and the gradients of each of its values by what learns, None where it has no part."""
    with torch.enable_grad():
        values = piece(inputs)
        rows: list[Sequence[Tensor | None]] = [
            # The last one lets go of the graph on its way through it.
            torch.autograd.grad(value, learning, retain_graph=number < len(values), allow_unused=True)
            if learning and value.requires_grad
            else [None] * len(learning)
            for number, value in enumerate(values, 1)
        ]
    return values.detach(), rows


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other
