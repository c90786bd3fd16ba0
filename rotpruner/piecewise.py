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


def sum_of_pieces(pieces: Sequence[Piece], inputs: Named) -> Tensor:
    """Σ piece(inputs), (K,), for pieces that give (K,) each; differentiable once in the inputs.

    Each piece is differentiated right after it has been computed, so that its graph can go before the next one's comes.
    """
    flat = [tensor for tensors in inputs.values() for tensor in tensors]
    return _SumOfPieces.apply(pieces, {name: len(tensors) for name, tensors in inputs.items()}, *flat)


class _SumOfPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: Sequence[Piece], lengths: dict[str, int], *flat: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(flat, needed, strict=True)]
        rest = iter(leaves)
        inputs = {name: [next(rest) for _ in range(length)] for name, length in lengths.items()}
        wanted = [number for number, leaf in enumerate(leaves) if leaf.requires_grad]
        total: Tensor | None = None
        # gradients[k][number]: of the k-th sum by that input.
        gradients: list[dict[int, Tensor]] = []
        for piece in pieces:
            with torch.enable_grad():
                values = piece(inputs).unbind()
            gradients = gradients or [{} for _ in values]
            differentiable = [k for k, value in enumerate(values) if value.requires_grad and wanted]
            for k in differentiable:
                found = torch.autograd.grad(
                    values[k], [leaves[i] for i in wanted], retain_graph=k != differentiable[-1], allow_unused=True
                )
                for number, gradient in zip(wanted, found, strict=True):
                    if gradient is not None:
                        known = gradients[k].get(number)
                        gradients[k][number] = gradient if known is None else known + gradient
            found = torch.stack(values).detach()
            total = found if total is None else total + found
        assert total is not None
        ctx.gradients, ctx.count = gradients, len(flat)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        found: list[Tensor | None] = [None] * ctx.count
        for factor, gradients in zip(outer, ctx.gradients, strict=True):
            for number, gradient in gradients.items():
                known = found[number]
                found[number] = factor * gradient if known is None else known + factor * gradient
        return None, None, *found
