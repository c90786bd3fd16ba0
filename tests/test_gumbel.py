"""The surrogate that learns masks: its noise, its gradient, and that what it has learned is exported."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, gumbel_r, kstest
from surrogate_models import directional_derivative, drawn, under
from tiny_models import rotated_model

from rotpruner.learning import learn
from rotpruner.patterns import parse_pattern
from rotpruner.surrogates import (
    Surrogate,
    gumbel,
    likeliest_mask,
    nm_choices,
    prior_logits,
)


@settings(max_examples=30)
@given(st.data(), st.integers(2, 6))
def test_logits_of_a_prior_prefer_it(data, m):
    pattern = parse_pattern(f"{data.draw(st.integers(1, m - 1))}:{m}")
    mask = pattern.mask(torch.rand(3, 4 * m, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))))
    logits = prior_logits(mask, pattern, 2.0)
    assert torch.equal(likeliest_mask(logits, pattern), mask)
    choices = [{*kept} for kept in combinations(range(m), pattern.n)]
    kept = {*mask[1, m : 2 * m].nonzero().flatten().tolist()}
    assert logits[1, 1].tolist() == [2.0 * len(kept & choice) for choice in choices]


def test_gumbel_has_the_gradient_of_finite_differences():
    pattern = parse_pattern("2:4")
    weight, logits = drawn(3, 8).requires_grad_(), drawn(3, 2, 6, seed=1).requires_grad_()
    noise = drawn(3, 2, 6, seed=2)
    assert torch.autograd.gradcheck(lambda w, k: gumbel(w, k, noise, pattern, 0.7), (weight, logits))


def test_gumbel_draws_masks_with_the_chances_of_its_logits():
    pattern, trials = parse_pattern("2:4"), 20_000
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0, 2.0])
    online = under(Surrogate("gumbel"))
    noise = online.relaxation.noise(online.linears[0].place, logits.expand(trials, 1, 6).contiguous())
    masks = gumbel(torch.ones(trials, 4), logits, noise, pattern, 1e-4)
    drawn_masks = masks.round()
    assert (masks - drawn_masks).abs().mean() < 1e-3
    counts = [int((drawn_masks == choice).all(-1).sum()) for choice in nm_choices(pattern)]
    assert sum(counts) >= trials - 5
    expected = logits.double().softmax(-1) * sum(counts)
    assert chisquare(counts, expected.numpy()).pvalue > 1e-3
    assert kstest(noise.flatten().numpy(), gumbel_r.cdf).pvalue > 1e-3


def test_noise_is_a_function_of_seed_step_and_linear():
    online, other = under(Surrogate("gumbel"), seed=3), under(Surrogate("gumbel"), seed=4)
    first, second = (linear.place for linear in online.linears[:2])
    logits = torch.zeros(2, 3, 6)

    def noise(model, step, place):
        model.relaxation.advance(step, 9)
        return model.relaxation.noise(place, logits)

    assert torch.equal(noise(online, 5, first), noise(online, 5, first))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(noise(online, 5, first), noise(under(Surrogate("gumbel"), seed=3), 5, first))
    for model, step, place in ((other, 5, first), (online, 6, first), (online, 5, second)):
        assert not torch.equal(noise(online, 5, first), noise(model, step, place))
    assert noise(online, 5, first).isfinite().all()
    torch.manual_seed(99)
    assert torch.equal(before, torch.get_rng_state())


def test_gumbel_gradient_of_a_model_is_that_of_finite_differences(ids):
    online = under(Surrogate("gumbel"))
    online.calibrate(ids.split(1))
    online.refresh_masks()
    online.relaxation.advance(2, 5)
    online.loss(ids)["loss"].backward()
    parameters = [parameter for group in online.parameter_groups() for parameter in group["params"]]
    for chosen in (parameters[:2], parameters[2:]):
        directions = [drawn(*parameter.shape, seed=number) for number, parameter in enumerate(chosen)]
        slope = sum((p.grad * direction).sum().item() for p, direction in zip(chosen, directions, strict=True))
        expected = directional_derivative(lambda: online.loss(ids)["loss"], chosen, directions)
        assert slope == pytest.approx(expected, rel=1e-4)


def test_gumbel_learns_masks_that_evaluation_and_export_take(ids):
    online = rotated_model(tiny_llama(), surrogate=Surrogate("gumbel", lr=0.3))
    online.calibrate(ids.split(1))
    assert online.masks.settled() is None
    online.refresh_masks()
    first = {linear.place.name: linear.mask for linear in online.linears}
    for name, mask in online.masks.settled().items():
        assert torch.equal(mask, first[name])
    losses = []
    batches = [(ids, torch.arange(3))] * 40
    learn(online, batches, steps=40, lr=1e-2, on_step=lambda step, found: losses.append(found["loss"]))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert online.relaxation.temperature == pytest.approx(0.1)
    learned = online.masks.settled()
    assert any(not torch.equal(mask, first[name]) for name, mask in learned.items())
    assert all((mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all() for mask in learned.values())
    online.refresh_masks()
    with torch.no_grad():
        soft = online(ids).logits
    for linear in online.linears:
        assert torch.equal(linear.mask, learned[linear.place.name])
        linear.masked = lambda place, weight, mask: weight * learned[place.name]
    with torch.no_grad():
        assert torch.equal(soft, online(ids).logits), "evaluation is without noise"
