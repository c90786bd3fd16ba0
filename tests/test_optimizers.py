"""Cayley-SGD: stays on the manifold, goes downhill along it, and learns inside of constraints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_modules.rotation_module import RotationModule
from rotpruner.errors import InputError
from rotpruner.optimizers import CayleySGD, nearest_orthogonal
from rotpruner.orthogonal import OrthogonalMatrices, constraint_error, orthogonality_error, random_orthogonal
from rotpruner.rotations import random_rotations


def drawn(n: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return random_orthogonal(1, 1, n, torch.Generator().manual_seed(seed), dtype=dtype)


def test_finds_the_procrustes_solution():
    """min ‖X Q − Y‖² over rotations has its minimum where Y was made."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    goal = torch.linalg.matrix_exp(torch.randn(6, 6, generator=generator, dtype=torch.float64) * 0.3)
    goal = torch.linalg.qr(goal).Q
    goal = goal * goal.diagonal().sign()
    Q = nn.Parameter(torch.eye(6, dtype=torch.float64))
    optimizer = CayleySGD([Q], lr=0.005)
    for _ in range(600):
        optimizer.zero_grad()
        (X @ Q - X @ goal).square().sum().backward()
        optimizer.step()
    assert (Q - goal).abs().max() < 1e-6


def test_first_step_is_along_the_riemannian_gradient():
    """For small α without momentum, Q moves by −α (G − Q Gᵀ Q), the gradient of the canonical metric."""
    Q, G = nn.Parameter(drawn(7, 1)[0, 0]), torch.randn(7, 7, dtype=torch.float64)
    before = Q.detach().clone()
    Q.grad = G
    CayleySGD([Q], lr=1e-6, momentum=0).step()
    W = -(G @ before.T - 0.5 * before @ before.T @ G @ before.T)
    expected = (W - W.T) @ before
    assert torch.allclose((Q.detach() - before) / 1e-6, expected, atol=1e-4)


def test_a_second_step_goes_on_with_the_momentum_of_the_first():
    """Algorithm 1 of Li et al. (2020), its Cayley transform solved exactly; for small steps it is the same."""
    Q = nn.Parameter(drawn(5, 1)[0, 0])
    X, M, one = Q.detach().clone(), torch.zeros(5, 5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    optimizer = CayleySGD([Q], lr=1e-3, momentum=0.9)
    for seed in (0, 1):
        G = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        Q.grad = G
        optimizer.step()
        M = 0.9 * M - G
        W = M @ X.T - 0.5 * X @ X.T @ M @ X.T
        W = W - W.T
        M, A = W @ X, 5e-4 * W
        X = torch.linalg.solve(one - A, X + A @ X)
    torch.testing.assert_close(Q.detach(), X, atol=1e-9, rtol=0)


def test_stays_orthogonal_in_float32_over_many_large_steps():
    Q = nn.Parameter(drawn(32, 2, torch.float32))
    optimizer = CayleySGD([Q], lr=10.0)
    for step in range(200):
        Q.grad = torch.randn(Q.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert orthogonality_error(Q) < 1e-5


def test_projection_squares_the_error():
    Q = drawn(16, 3)
    rough = Q + 1e-4 * torch.randn(Q.shape, dtype=torch.float64)
    assert orthogonality_error(nearest_orthogonal(rough)) < orthogonality_error(rough) ** 1.5


@pytest.mark.parametrize("constraint", ["none", "fixes_ones", "planes"])
def test_constraints_hold_while_the_core_moves(constraint):
    matrices = OrthogonalMatrices(2, 3, 8, "manifold", constraint).double()
    matrices.restart(random_orthogonal(2, 3, 8, torch.Generator().manual_seed(0), constraint, torch.float64))
    before = matrices().detach()
    optimizer = CayleySGD(matrices.parameters(), lr=0.05)
    target = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((matrices() * target).sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    assert orthogonality_error(matrices()) < 1e-9
    assert constraint_error(matrices(), constraint) < 1e-9
    assert (matrices() - before).abs().max() > 0.1


def test_what_does_not_fit_is_refused(model_directory):
    with pytest.raises(InputError, match="square orthogonal"):
        CayleySGD([nn.Parameter(torch.zeros(3))])
    for settings in ({"lr": 0.0}, {"momentum": 1.0}):
        with pytest.raises(InputError, match="CayleySGD"):
            CayleySGD([nn.Parameter(torch.eye(3))], **settings)
    with pytest.raises(InputError, match="need each other"):
        RotationModule(str(model_directory), orthogonal_map="manifold")
    with pytest.raises(InputError, match="need each other"):
        RotationModule(str(model_directory), optimizer=lambda parameters: CayleySGD(parameters))
    RotationModule(str(model_directory), orthogonal_map="manifold", optimizer=lambda parameters: CayleySGD(parameters))


@pytest.mark.parametrize("name", ["cayley", "exponential", "manifold"])
def test_a_fits_rotations_are_of_the_map_the_start_and_the_seed_that_it_names(name, model_directory):
    rule = (lambda parameters: CayleySGD(parameters)) if name == "manifold" else torch.optim.Adam
    module = RotationModule(str(model_directory), orthogonal_map=name, optimizer=rule, start="random", seed=5)
    module.configure_model()
    rotations = module.rotated.rotations
    assert {matrices.map_name for matrices in rotations.spaces.values()} == {name}
    for space, Q in random_rotations(module.model_config, ["residual", "value_heads"], seed=5).items():
        torch.testing.assert_close(rotations()[space].detach().to(Q), Q, atol=1e-5, rtol=0)
