"""Pruners against oracles written from their papers' equations, and what every pruner must keep to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_oracles import ORACLES, damped, oracle_mask
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.patterns import NM, Pattern, Unstructured
from rotpruner.pruners import PRUNERS, Pruner, resolve_pruner
from rotpruner.pruners.alps import ALPS
from rotpruner.pruners.ria import RIA
from rotpruner.pruners.sparsegpt import SparseGPT
from rotpruner.statistics import Moment

PATTERNS = [NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7), Unstructured(0.5, "layer")]
UPDATING = ["sparsegpt", "alps"]


def problem(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (O, I) and a moment (I, I) of correlated inputs of very different sizes, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    X = torch.randn(3 * width, width, generator=generator) @ mixing + torch.randn(width, generator=generator)
    X = X * torch.rand(width, generator=generator).mul(4).exp()
    return torch.randn(rows, width, generator=generator) / width**0.5, X.mT @ X / len(X)


def loss(pruned: Tensor, weight: Tensor, H: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ)."""
    difference = (pruned - weight).double()
    return (difference @ H.double() * difference).sum().item()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruner_equals_its_oracle(name: str, pattern: Pattern, dtype: torch.dtype):
    weight, H = problem(24, 200)  # one block of 128 columns and a short one
    expected, expected_mask = ORACLES[name](weight, H, pattern)
    pruned, mask = resolve_pruner(name).prune(weight.to(dtype), Moment(H.to(dtype)[None]), pattern)
    assert pruned.dtype == dtype
    same = mask == expected_mask
    assert same.double().mean() >= 0.999
    # A near-tie may fall the other way in float32, and then moves the rest of its row.
    agreeing = same.all(1)
    assert agreeing.double().mean() >= 0.9
    assert (pruned.double() - expected)[agreeing].norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("name", UPDATING)
def test_update_under_a_given_mask_equals_its_oracle(name: str):
    weight, H = problem(24, 200)
    mask = NM(2, 4).mask(weight.abs())
    expected, _ = ORACLES[name](weight, H, NM(2, 4), mask)
    pruned, kept = resolve_pruner(name).prune(weight, Moment(H[None]), NM(2, 4), mask)
    assert torch.equal(kept, mask)
    assert (pruned.double() - expected).norm() <= 1e-3 * expected.norm()


def test_magnitude_looks_at_no_data():
    weight, _ = problem(8, 16)
    pruned, mask = resolve_pruner("magnitude").prune(weight, None, NM(2, 4))
    assert torch.equal(mask, oracle_mask(weight.abs(), NM(2, 4)))
    assert torch.equal(pruned, weight * mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("name", PRUNERS)
def test_masks_hold_the_pattern_exactly_and_prune_agrees_with_mask(name: str, pattern: Pattern):
    weight, H = problem(10, 136)
    pruner, moment, untouched = resolve_pruner(name), Moment(H[None]), weight.clone()
    pruned, mask = pruner.prune(weight, moment, pattern)
    assert torch.equal(weight, untouched)
    assert torch.equal(mask, pruner.mask(weight, moment, pattern))
    assert not pruned[~mask].any()
    # The pattern's own mask of 0/1 scores equals the scores exactly if their count is right everywhere.
    assert torch.equal(pattern.mask(mask.float()), mask)
    assert mask.sum() == pattern.mask(weight.abs()).sum()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("name", PRUNERS)
def test_group_equals_one_at_a_time(name: str, pattern: Pattern):
    H = problem(1, 136)[1].double()
    weights = [problem(rows, 136, seed=rows)[0].double() for rows in (12, 4, 4)]
    pruner = resolve_pruner(name)
    single = [pruner.prune(weight, Moment(H[None]), pattern) for weight in weights]
    masks = [pattern.mask(weight.abs()) for weight in weights]
    updated = [pruner.prune(each, Moment(H[None]), pattern, mask) for each, mask in zip(weights, masks, strict=True)]
    moment = Moment(H[None])
    for expected, found in (
        (single, pruner.prune_group(weights, moment, pattern)),
        (updated, pruner.prune_group(weights, moment, pattern, masks)),
    ):
        for (weight, mask), (group_weight, group_mask) in zip(expected, found, strict=True):
            assert torch.equal(mask, group_mask)
            torch.testing.assert_close(weight, group_weight)


@pytest.mark.parametrize("name", PRUNERS)
def test_saliency_is_differentiable_in_weight_and_moment(name: str):
    weight, H = (each.requires_grad_() for each in problem(6, 12))
    pruner = resolve_pruner(name)
    saliency = pruner.saliency(weight, Moment(H[None]))
    assert saliency.dtype == torch.float32
    assert (saliency >= 0).all()
    saliency.sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert pruner.needs == "nothing" or (H.grad is not None and H.grad.isfinite().all())


@pytest.mark.parametrize("name", UPDATING)
def test_saliency_is_the_loss_of_removing_one_weight_and_updating_the_others(name: str):
    weight, H = problem(3, 10)
    saliency = resolve_pruner(name).saliency(weight.double(), Moment(H.double()[None]))
    for i in range(3):
        for j in range(10):
            others = [k for k in range(10) if k != j]
            best = weight.double().clone()
            best[i, j] = 0
            coupling = damped(H)[others, j] * weight[i, j].double()
            best[i, others] += torch.linalg.solve(damped(H)[others][:, others], coupling)
            assert saliency[i, j].item() == pytest.approx(loss(best, weight, damped(H)), rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_updates_lower_the_loss_and_alps_is_below_sparsegpt(pattern: Pattern):
    for seed in range(3):
        weight, H = problem(32, 96, seed)
        moment = Moment(H[None])
        mask = pattern.mask(resolve_pruner("wanda").saliency(weight, moment))
        plain = loss(weight * mask, weight, H)
        for name in UPDATING:
            assert loss(resolve_pruner(name).prune(weight, moment, pattern, mask)[0], weight, H) < plain
        sparsegpt = loss(SparseGPT().prune(weight, moment, pattern)[0], weight, H)
        assert sparsegpt < plain
        assert loss(ALPS().prune(weight, moment, pattern)[0], weight, H) <= sparsegpt


def test_linears_that_share_a_moment_share_its_factorisation(monkeypatch: pytest.MonkeyPatch):
    calls = {"cholesky_ex": 0, "eigh": 0}
    for function in calls:
        original = getattr(torch.linalg, function)

        def counted(*args, function=function, original=original):
            calls[function] += 1
            return original(*args)

        monkeypatch.setattr(torch.linalg, function, counted)
    weight, H = problem(8, 16)
    moment = Moment(H[None])
    for name in ("sparsegpt", "alps", "sparsegpt", "alps"):
        resolve_pruner(name).prune(weight, moment, NM(2, 4))
    assert calls == {"cholesky_ex": 1, "eigh": 1}
    SparseGPT(damping=0.1).prune(weight, moment, NM(2, 4))
    SparseGPT().prune(weight, moment.rotate(torch.linalg.qr(H)[0][None]), NM(2, 4))
    assert calls["cholesky_ex"] == 3


@st.composite
def hard_inputs(draw: st.DrawFn) -> Tensor:
    """Activations (tokens, 16): few tokens, dead features, duplicates, constants, of any size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = draw(st.sampled_from([1, 2, 7, 64]))
    X = torch.randn(tokens, 16, generator=generator)
    if draw(st.booleans()):
        X = torch.ones(tokens, 1) * X[:1]  # constant activations
    for feature in draw(st.sets(st.integers(0, 15))):
        X[:, feature] = 0.0  # dead inputs
    for feature in draw(st.sets(st.integers(1, 15), max_size=4)):
        X[:, feature] = X[:, 0]  # exactly dependent
    for feature in draw(st.sets(st.integers(0, 15), max_size=2)):
        X[:, feature] *= 1e4  # massive activations
    return X * draw(st.sampled_from([1e-12, 1.0, 1e6]))


@given(hard_inputs(), st.sampled_from([*PATTERNS, Unstructured(0.99), Unstructured(0.0)]), st.booleans())
@settings(max_examples=60)
def test_hard_inputs_give_finite_weights_and_exact_masks(X: Tensor, pattern: Pattern, zeros: bool):
    weight = problem(6, 16)[0]
    if zeros:
        weight[0], weight[:, 3] = 0.0, 0.0
    moment = Moment((X.mT @ X / len(X))[None])
    given_mask = pattern.mask(weight.abs())
    for name in PRUNERS:
        for given_or_none in (None, given_mask):
            pruned, mask = resolve_pruner(name).prune(weight, moment, pattern, given_or_none)
            assert pruned.isfinite().all(), name
            assert not pruned[~mask].any()
            assert torch.equal(pattern.mask(mask.float()), mask)
            assert given_or_none is None or torch.equal(mask, given_mask)


@pytest.mark.parametrize("name", UPDATING)
def test_dead_inputs_go_first_and_kept_weights_of_theirs_stand_still(name: str):
    weight, H = problem(8, 16)
    H[5], H[:, 5] = 0.0, 0.0
    pruned, mask = resolve_pruner(name).prune(weight, Moment(H[None]), NM(2, 4))
    assert not mask[:, 5].any()
    keep = torch.ones_like(mask)
    keep[:, 2] = False
    pruned, _ = resolve_pruner(name).prune(weight, Moment(H[None]), NM(2, 4), keep)
    torch.testing.assert_close(pruned[:, 5], weight[:, 5])


@pytest.mark.parametrize("name", UPDATING)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_moment_that_is_not_finite_is_refused(name: str, value: float):
    weight, H = problem(8, 16)
    H[3, 4] = H[4, 3] = value
    with pytest.raises(InputError, match="not finite"):
        resolve_pruner(name).prune(weight, Moment(H[None]), NM(2, 4))


def test_damping_grows_until_the_factorisation_succeeds():
    weight, H = problem(8, 16)
    values, vectors = torch.linalg.eigh(H)
    values[0] = -0.05 * H.diagonal().mean()  # as rounding may leave a singular moment; 0.01 is not enough
    pruned, _ = SparseGPT().prune(weight, Moment((vectors * values @ vectors.mT)[None]), NM(2, 4))
    assert pruned.isfinite().all()
    with pytest.raises(InputError, match="damping 0 is not positive"):
        SparseGPT(damping=0)
    with pytest.raises(InputError, match="not positive semidefinite"):
        SparseGPT().prune(weight, Moment(-1e3 * torch.eye(16)[None]), NM(2, 4))


def test_ria_without_activations_is_relative_importance():
    weight, H = problem(4, 8)
    relative = weight.abs() / weight.abs().sum(1, keepdim=True) + weight.abs() / weight.abs().sum(0)
    torch.testing.assert_close(RIA(exponent=0).saliency(weight, Moment(H[None])), relative)


class Halves(Pruner):
    """Keeps the first half of every group: a pruner of a user's own."""

    needs = "nothing"

    def saliency(self, weight: Tensor, moment: Moment | None) -> Tensor:
        return -torch.arange(weight.shape[1], device=weight.device).expand_as(weight).float()


def test_a_users_pruner_is_named_by_its_import_path(tmp_path, monkeypatch: pytest.MonkeyPatch):
    weight, H = problem(4, 8)
    kept = torch.tensor([True, True, False, False]).repeat(4, 2)
    assert torch.equal(resolve_pruner(f"{__name__}.Halves").mask(weight, None, NM(2, 4)), kept)
    (tmp_path / "my_pruners.py").write_text(
        "from rotpruner.pruners import Pruner\n\n\n"
        "class InputsOnly(Pruner):\n"
        "    def saliency(self, weight, moment):\n"
        "        return moment.diagonal().expand_as(weight)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pruned, mask = resolve_pruner("my_pruners.InputsOnly").prune(weight, Moment(H[None]), NM(1, 4))
    assert torch.equal(mask, NM(1, 4).mask(H.diagonal().expand_as(weight)))
    assert torch.equal(pruned, weight * mask)


@pytest.mark.parametrize("name", ["banana", "no_such_module.Pruner", "rotpruner.pruners.ria.Nothing", "math.sqrt"])
def test_unknown_pruners_are_refused_with_the_known_names(name: str):
    with pytest.raises(InputError, match=r"magnitude, wanda, ria, sparsegpt, alps"):
        resolve_pruner(name)


@pytest.mark.parametrize("name", ["wanda", "ria"])
def test_a_dead_input_has_a_gradient(name):
    H = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0])).requires_grad_()
    weight = torch.ones(2, 4, requires_grad=True)
    resolve_pruner(name).saliency(weight, Moment(H[None])).square().sum().backward()
    assert H.grad.isfinite().all()
    assert weight.grad.isfinite().all()
