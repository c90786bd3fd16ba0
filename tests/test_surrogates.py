"""Surrogates: what they compute, their gradients, the schedule of a temperature and what they do not go with."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from surrogate_models import directional_derivative, drawn, under
from tiny_models import rotated_model

from rotpruner.allotment import Allotment
from rotpruner.errors import InputError
from rotpruner.learning import learn
from rotpruner.objectives import Objective
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.pruners.wanda import Wanda
from rotpruner.surrogates import (
    SURROGATES,
    Surrogate,
    SurrogateName,
    check_surrogate,
    sigmoid,
    soft_mask,
)

PATTERNS = [("2:4", "row"), ("3:8", "row"), (0.5, "row"), (0.7, "layer")]


def test_learn_follows_its_schedules(monkeypatch, ids):
    online = rotated_model(tiny_llama())
    online.calibrate(ids.split(1))
    refresh, step, chosen, rates = online.refresh_masks, torch.optim.Adam.step, [], []
    monkeypatch.setattr(online, "refresh_masks", lambda: chosen.append(len(rates)) or refresh())
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self), raising=True
    )
    learn(online, [(ids, torch.arange(3))] * 6, steps=6, lr=1e-2, refresh_every=4)
    assert chosen == [0, 4]
    assert rates == pytest.approx([5e-3 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


# -- constant and straight through ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "straight_through", "sr_ste"])
def test_surrogates_compute_their_stated_forward_and_gradient(name):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    g = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    mask = parse_pattern("2:4").mask(weight.detach().abs())
    masked = Surrogate(name, decay=0.3)(weight, mask)
    assert torch.equal(masked, weight * mask)
    masked.backward(g)
    expected = {
        "constant": g * mask,
        "straight_through": g,
        "sr_ste": g + 0.3 * weight * ~mask,
    }[name]
    torch.testing.assert_close(weight.grad, expected)


# -- sigmoid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "scope"), PATTERNS)
def test_sigmoid_is_the_hard_mask_with_the_soft_masks_gradient(text, scope):
    pattern = parse_pattern(text, scope)
    weight, g, norms = drawn(6, 16).requires_grad_(), drawn(6, 16, seed=1), drawn(16, seed=2).abs()

    def saliency():
        return weight.abs() * norms

    mask, held = pattern.mask(saliency().detach()), weight.detach().clone()
    masked = sigmoid(weight, mask, saliency(), pattern, 0.3)
    assert torch.equal(masked, weight * mask)
    masked.backward(g)
    # s̄, the unit of the temperature, is a constant to the gradient.
    constant = 0.3 * saliency().mean().item()

    def relaxed():
        soft = soft_mask(saliency(), mask, pattern, constant / saliency().mean().item())
        return (g * (weight * mask + held * soft)).sum()

    directions = [drawn(6, 16, seed=3)]
    expected = directional_derivative(relaxed, [weight], directions, 1e-6)
    assert (weight.grad * directions[0]).sum().item() == pytest.approx(expected, rel=1e-6)
    assert not torch.allclose(weight.grad, g * mask), "the soft mask has no gradient of its own"


@pytest.mark.parametrize(("text", "scope"), PATTERNS)
def test_soft_masks_harden_as_the_temperature_falls(text, scope):
    pattern, saliency = parse_pattern(text, scope), drawn(6, 16).abs()
    mask = pattern.mask(saliency)
    errors = [(soft_mask(saliency, mask, pattern, T) - mask.double()).abs().mean().item() for T in (10, 1, 0.1, 1e-6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.4
    assert errors[-1] < 1e-9
    # At every temperature the soft mask has the hard one's order.
    assert torch.equal(soft_mask(saliency, mask, pattern, 0.5) > 0.5, mask)
    assert torch.allclose(soft_mask(1e6 * saliency, mask, pattern, 0.5), soft_mask(saliency, mask, pattern, 0.5))


def test_the_threshold_is_halfway_between_the_last_kept_and_the_first_removed():
    saliency, mask = torch.tensor([[4.0, 3.0, 1.0, 0.0]]), torch.tensor([[True, True, False, False]])
    # t = 2, and the unit is the mean saliency, 2.
    expected = torch.tensor([[1.0, 0.5, -0.5, -1.0]]).sigmoid()
    torch.testing.assert_close(soft_mask(saliency, mask, parse_pattern("2:4"), 1.0), expected)
    torch.testing.assert_close(
        soft_mask(saliency, mask, parse_pattern("2:4"), 0.5), (2 * torch.tensor([[1.0, 0.5, -0.5, -1.0]])).sigmoid()
    )


@pytest.mark.parametrize("kept", [True, False])
def test_soft_masks_of_rows_that_stay_or_go_whole_are_finite(kept):
    saliency, mask = drawn(2, 4).abs().requires_grad_(), torch.full((2, 4), kept)
    soft = soft_mask(saliency, mask, parse_pattern("0.5"), 0.1)
    soft.sum().backward()
    assert soft.isfinite().all()
    assert saliency.grad.isfinite().all()
    assert (soft >= 0.5).all() if kept else (soft <= 0.5).all()
    nothing = soft_mask(torch.zeros(2, 4), parse_pattern("2:4").mask(torch.zeros(2, 4)), parse_pattern("2:4"), 0.1)
    assert (nothing == 0.5).all()


def test_sigmoid_moves_the_rotations_by_the_diagonals_of_the_moment_too(ids):
    """Against autograd through saliencies of moments that are rotated for each linear by itself."""
    online = under(Surrogate("sigmoid"))
    online.calibrate(ids.split(1))
    online.refresh_masks()
    found, expected = [], []
    online.relaxation.advance(1, 3)
    online.loss(ids)["loss"].backward()
    found = [parameter.grad.clone() for parameter in online.rotations.parameters()]
    online.rotations.zero_grad()

    def masked(place, weight, mask):
        reads = online.basis.rotations.get(place.spec.reads)
        reads = None if reads is None else reads[place.layer if len(reads) > 1 else 0]
        moment = online.moments[place.group].rotate(reads)
        saliency = weight.abs() * moment.diagonal().sqrt()
        temperature = online.relaxation.surrogate.temperature_at(1, 3)
        return sigmoid(weight, mask, saliency, online.pattern, temperature)

    for linear in online.linears:
        linear.masked = masked
    online.loss(ids)["loss"].backward()
    expected = [parameter.grad for parameter in online.rotations.parameters()]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_sigmoid_sees_a_linear_that_keeps_all_its_weights_as_dense(ids):
    online = under(Surrogate("sigmoid"), exceptions={"*.v_proj": parse_pattern("0")})
    online.calibrate(ids.split(1))
    online.refresh_masks()
    expected, masked = {}, online.relaxation.masked
    for linear in online.linears:

        def seen(place, weight, mask):
            expected[place.name] = weight, masked(place, weight, mask)
            return expected[place.name][1]

        linear.masked = seen
    online.loss(ids)["loss"].backward()
    for name, (weight, under_mask) in expected.items():
        assert (under_mask is weight) == name.endswith("v_proj")


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "gumbel"])
def test_gradient_checkpointing_changes_no_gradient(name, ids):
    gradients = []
    for checkpointing in (False, True):
        online = under(Surrogate(name), gradient_checkpointing=checkpointing)
        online.calibrate(ids.split(1))
        online.refresh_masks()
        online.relaxation.advance(1, 4)
        online.loss(ids, torch.arange(3))["loss"].backward()
        gradients.append([p.grad for group in online.parameter_groups() for p in group["params"]])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, recomputed)


@given(st.floats(0.01, 1), st.floats(1, 50), st.integers(2, 40))
def test_the_temperature_falls_by_the_same_factor_every_step(final, factor, steps):
    surrogate = Surrogate("sigmoid", temperature=final * factor, final_temperature=final)
    values = [surrogate.temperature_at(step, steps) for step in range(steps + 2)]
    assert values[0] == pytest.approx(final * factor)
    assert values[steps - 1 :] == pytest.approx([final] * 3)
    assert surrogate.temperature_at(0, 1) == pytest.approx(final * factor)
    for before, after in pairwise(values[:steps]):
        assert before / after == pytest.approx(factor ** (1 / (steps - 1)))


@pytest.mark.parametrize(
    ("settings", "mention"),
    [
        (dict(name="banana"), "banana"),
        (dict(temperature=0.05), "temperature 0.05"),
        (dict(final_temperature=0.0), "final_temperature 0"),
        (dict(temperature=float("inf")), "temperature inf"),
        (dict(lr=0.0), "lr 0"),
        (dict(strength=-1.0), "strength -1"),
        (dict(decay=float("nan")), "decay nan"),
    ],
)
def test_bad_settings_are_refused(settings, mention):
    with pytest.raises(InputError, match=mention):
        Surrogate(**settings)


class WholeMoment(Wanda):
    needs = "full"


@pytest.mark.parametrize(
    ("name", "pattern", "pruner", "objective", "mention"),
    [
        ("sigmoid", "slice:0.25", "wanda", {}, "slice:0.25"),
        ("sigmoid", "2:4", "sparsegpt", {}, "SparseGPT.* while it updates the weights"),
        ("sigmoid", "2:4", "test_surrogates.WholeMoment", {}, "only the diagonal .* WholeMoment reads all"),
        ("straight_through", "slice:0.25", "wanda", {}, "slice:0.25"),
        ("gumbel", "0.5", "wanda", {}, "0.5"),
        ("gumbel", "slice:0.25", "wanda", {}, "slice:0.25"),
        ("gumbel", "8:16", "wanda", {}, "12,870"),
        ("gumbel", "2:4", "wanda", dict(kl=0.0, entropy=1.0), "outputs"),
        ("gumbel", "2:4", "wanda", dict(kl=1.0, lost_mass=1.0), "lost_mass is of those"),
    ],
)
def test_combinations_that_cannot_work_are_refused(name, pattern, pruner, objective, mention):
    with pytest.raises(InputError, match=mention):
        check_surrogate(Surrogate(name), Allotment.parse(pattern), resolve_pruner(pruner), Objective(**objective))
    check_surrogate(Surrogate(name), Allotment.parse("2:4"), resolve_pruner("magnitude"), Objective())


@pytest.mark.parametrize("name", ["sigmoid", "gumbel"])
def test_surrogates_that_need_more_than_weight_and_mask_say_so(name):
    with pytest.raises(InputError, match=f"call rotpruner.surrogates.{name}"):
        Surrogate(name)(torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool))


def test_every_surrogate_that_the_command_line_names_is_there():
    assert set(get_args(SurrogateName)) == set(SURROGATES)
