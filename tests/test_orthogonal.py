"""Orthogonal matrices, their action on weights, and moments that rotate with their inputs."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from tiny_models import exact

from rotpruner.orthogonal import (
    OrthogonalMatrices,
    cayley,
    orthogonality_error,
    random_orthogonal,
    rotate_features,
    rotate_weight,
    skew_symmetric,
)
from rotpruner.statistics import Moment, gather_moments


@pytest.mark.parametrize("map_name", ["cayley", "exponential"])
def test_maps_start_at_the_identity_and_stay_orthogonal(map_name):
    matrices = OrthogonalMatrices(2, 3, 6, map_name)
    assert torch.equal(matrices(), torch.eye(6).expand(2, 3, 6, 6))
    start = random_orthogonal(2, 3, 6, torch.Generator().manual_seed(0))
    matrices.restart(start)
    torch.testing.assert_close(matrices(), start)
    with torch.no_grad():
        matrices.turn.normal_()
    assert orthogonality_error(matrices()) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matrices().dtype == torch.float32
        assert orthogonality_error(matrices()) < 1e-5


@pytest.mark.parametrize("map_name", ["cayley", "manifold"])
def test_rotations_are_float32_whatever_the_default_dtype_is(map_name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        Q = OrthogonalMatrices(1, 1, 6, map_name)()
    finally:
        torch.set_default_dtype(torch.float32)
    assert Q.dtype == torch.float32
    assert orthogonality_error(Q) < 1e-6


def test_cayley_agrees_with_the_exponential_to_second_order():
    A = 1e-2 * skew_symmetric(torch.randn(15, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 6)
    difference = (cayley(A) - torch.linalg.matrix_exp(A)).abs().max()
    assert difference < torch.linalg.matrix_norm(A, 2) ** 3 / 6


def test_rotate_weight_is_the_block_diagonal_product():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, dtype=torch.float64, generator=generator)
    reads = random_orthogonal(1, 2, 4, generator)[0].double()  # two heads that serve two query heads each
    writes = random_orthogonal(1, 3, 8, generator)[0].double()
    Q_A = torch.block_diag(*reads.repeat_interleave(2, 0))
    Q_B = torch.block_diag(*writes)
    torch.testing.assert_close(rotate_weight(weight, reads, writes), Q_B.T @ weight @ Q_A)
    torch.testing.assert_close(rotate_features(weight, reads), weight @ Q_A)


def test_rotated_moments_are_the_moments_of_rotated_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 24, dtype=torch.float64, generator=generator)
    H = x.T @ x / 50
    head_blocks = torch.stack([H[8 * i : 8 * i + 8, 8 * i : 8 * i + 8] for i in range(3)])
    residual = random_orthogonal(1, 1, 24, generator)[0].double()
    shared_head = random_orthogonal(1, 1, 8, generator)[0].double()
    heads = random_orthogonal(1, 3, 8, generator)[0].double()
    for blocks, Q in (
        (H[None], residual),
        (H[None], heads),
        (head_blocks, heads),
        (head_blocks, shared_head),
    ):
        y = rotate_features(x, Q)
        moment = Moment(blocks).rotate(Q)
        torch.testing.assert_close(moment.diagonal(), y.square().mean(0))
        if len(blocks) == 1:
            torch.testing.assert_close(moment.full(), y.T @ y / 50)


def test_gathered_moments_are_means_over_all_tokens(ids):
    model = exact(tiny_llama())
    seen = []
    layer = model.model.layers[1].mlp
    layer.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    full, diagonal = (
        gather_moments(model, {"down": layer.down_proj}, {"down": width}, ids.split(2))["down"] for width in (48, 1)
    )
    x = torch.cat(seen[: len(seen) // 2])
    torch.testing.assert_close(full.full(), x.T @ x / len(x))
    torch.testing.assert_close(diagonal.diagonal(), x.square().mean(0))
