"""Sums that are differentiated piece by piece: the values and gradients of autograd on the whole sum."""

from __future__ import annotations

import pytest
import torch

from rotpruner.piecewise import sum_of_pieces


def tensors() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.rand(3, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    return {
        "learned": [x.requires_grad_() for x in draw[:3]],
        "frozen": [draw[3]],
        "order": [torch.tensor([2, 0, 1])],
    }


PIECES = [
    lambda x: torch.stack([(x["learned"][0] @ x["frozen"][0]).sin().sum(), x["learned"][0].square().sum()]),
    lambda x: torch.stack([(x["learned"][0] * x["learned"][1]).sum(), x["frozen"][0].sum()]),
    lambda x: torch.stack([x["frozen"][0].sum(), x["frozen"][0].prod()]),
    lambda x: torch.stack([x["learned"][1][:, x["order"][0]].exp().sum(), x["learned"][1][0, 0]]),
]


def test_values_and_gradients_are_those_of_the_whole_sum():
    found, expected = tensors(), tensors()
    sums = sum_of_pieces(PIECES, found)
    whole = torch.stack([piece(expected) for piece in PIECES]).sum(0)
    torch.testing.assert_close(sums, whole)
    for total in (sums, whole):
        (3 * total[0] - total[1] ** 2).backward()
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert found["learned"][2].grad is None, "no piece uses it"


def test_leaves_that_pieces_capture_learn_as_inputs_do():
    found, expected = (torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True) for _ in range(2))

    def pieces(weights):
        return [
            lambda x: (weights * x["learned"][0][0, 0]).sin().sum()[None],
            lambda x: (x["learned"][1].sum() * weights.prod())[None],
        ]

    one, other = tensors(), tensors()
    sum_of_pieces(pieces(found), one, [found]).square().backward()
    sum(piece(other) for piece in pieces(expected)).square().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    for name in range(2):
        torch.testing.assert_close(one["learned"][name].grad, other["learned"][name].grad)


def test_one_graph_is_held_at_a_time():
    held = []

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = torch.empty(0)
            held.append(ctx)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            held.remove(ctx)
            return gradient

    def piece(inputs):
        assert not held, "the last piece has been differentiated"
        return Held.apply(inputs["learned"][0]).sum()[None]

    inputs = tensors()
    sum_of_pieces([piece] * 3, inputs).sum().backward()
    torch.testing.assert_close(inputs["learned"][0].grad, torch.full((3, 3), 3.0, dtype=torch.float64))


def test_a_second_derivative_is_refused():
    inputs = tensors()
    sums = sum_of_pieces(PIECES, inputs)
    (gradient,) = torch.autograd.grad(sums[0].square(), inputs["learned"][0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nothing_is_differentiated_where_nothing_learns():
    inputs = {"frozen": tensors()["frozen"]}
    sums = sum_of_pieces([lambda x: x["frozen"][0].sum()[None]], inputs)
    assert not sums.requires_grad
