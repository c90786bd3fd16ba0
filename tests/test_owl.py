"""Layer sparsities by outlier ratio."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from rotpruner.allotment import Allotment, allot
from rotpruner.calibration import linear_patterns
from rotpruner.errors import InputError
from rotpruner.oneshot import prune_model
from rotpruner.owl import outlier_sparsities
from rotpruner.patterns import NM, Unstructured
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import LearnedRotations


def layer(outliers: int, size: int = 1000) -> torch.Tensor:
    saliency = torch.ones(size)
    saliency[:outliers] = 100.0  # with at most 10 % of them, the mean stays below a fifth of 100
    return saliency


def test_outliers_lower_a_layers_sparsity_linearly():
    # Ratios 0, 0.01, 0.02, 0.05 have mean 0.02; the last is the farthest from it, 0.03 above.
    sparsities = outlier_sparsities([layer(0), layer(10), layer(20), layer(50)], 0.6, spread=0.09)
    assert sparsities == pytest.approx([0.66, 0.63, 0.6, 0.51])


def test_threshold_is_a_multiple_of_the_layers_mean():
    saliency = torch.tensor([1.0] * 98 + [5.0, 9.0])  # mean 1.12: 5 × mean = 5.6, 4 × mean = 4.48
    assert outlier_sparsities([saliency, torch.ones(4)], 0.5, threshold=5) == pytest.approx([0.42, 0.58])
    even = torch.tensor([1.0] * 99 + [9.0])  # one outlier of 100, whatever the threshold
    higher, lower = outlier_sparsities([even, saliency], 0.5, threshold=4)
    assert higher > 0.5 > lower
    assert outlier_sparsities([even, saliency], 0.5, threshold=5) == [0.5, 0.5]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.floats(0.1, 0.9), st.floats(0, 0.09))
@settings(max_examples=100)
def test_mean_is_exact_and_bounds_hold(outliers: list[int], sparsity: float, spread: float):
    sparsities = outlier_sparsities((layer(count) for count in outliers), sparsity, spread=spread)
    assert sum(sparsities) / len(sparsities) == pytest.approx(sparsity, abs=1e-12)
    assert all(sparsity - spread - 1e-12 <= each <= sparsity + spread + 1e-12 for each in sparsities)
    order = sorted(range(len(outliers)), key=lambda index: outliers[index])
    assert all(sparsities[low] >= sparsities[high] - 1e-12 for low, high in pairwise(order))


def test_layers_alike_share_one_sparsity_and_none_give_none():
    assert outlier_sparsities([layer(3)] * 3, 0.5) == [0.5] * 3
    assert outlier_sparsities([torch.zeros(5), torch.zeros(5)], 0.5) == [0.5, 0.5]
    assert outlier_sparsities([], 0.5) == []


def shares(patterns):
    """The sparsity of each block, whose linears have the same."""
    found = dict.fromkeys((name.split(".layers.")[1].split(".")[0], each.sparsity) for name, each in patterns.items())
    assert len(found) == 2
    return [sparsity for _, sparsity in found]


@torch.no_grad()
def test_the_block_with_outliers_keeps_more():
    ids, found = torch.arange(16)[None], []
    for outlying in (0, 1):
        model = tiny("llama-2")
        model.model.layers[outlying].mlp.down_proj.weight[:2] *= 40
        saliencies: list[list[torch.Tensor]] = [[], []]
        for layer, block in enumerate(model.model.layers):
            for linear in block.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.register_forward_pre_hook(
                        lambda linear, args, own=saliencies[layer]: own.append(
                            (linear.weight.abs() * args[0].square().mean((0, 1)).sqrt()).flatten()
                        )
                    )
        found.append(shares(linear_patterns(model, Allotment(Unstructured(0.5), "owl"), [ids])))
        for own in saliencies:
            own.clear()
        model(input_ids=ids)
        assert found[-1] == pytest.approx(outlier_sparsities([torch.cat(own) for own in saliencies], 0.5))
    assert sorted(found[-1]) == pytest.approx([0.42, 0.58])


def test_sparsities_that_were_shared_out_before_are_kept():
    model = tiny("opt")
    given = [Unstructured(0.25), Unstructured(0.75)]
    prune_model(model, resolve_pruner("magnitude"), Unstructured(0.5), patterns=allot(model.config, given, {}))
    for block, pattern in zip(model.model.decoder.layers, given, strict=True):
        assert (block.fc1.weight == 0).float().mean().item() == pytest.approx(pattern.sparsity)


@pytest.mark.parametrize(("sparsity", "spread"), [(0.05, 0.08), (0.95, 0.08), (0.5, -0.1), (1.2, 0.0)])
def test_a_spread_out_of_bounds_is_refused(sparsity: float, spread: float):
    with pytest.raises(InputError, match="or layer_sparsity uniform"):
        outlier_sparsities([layer(1)], sparsity, spread=spread)


@pytest.mark.parametrize("name", ["llama-2", "opt"])  # the latter's norms have biases
@torch.no_grad()
def test_learning_and_pruning_share_the_sparsity_out_alike(name):
    """Masks of a fit under OWL are those of one-shot pruning with the same statistics, in the learned basis."""
    model = tiny(name)
    batches = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0)).split(1)
    pruner, shared_out = resolve_pruner("wanda"), Allotment(Unstructured(0.5), "owl")
    rotations = LearnedRotations(model.config, ["residual"], start="random")
    online = RotatedModel(copy.deepcopy(model), rotations, pruner, shared_out)
    online.calibrate(batches)
    online.refresh_masks()
    sparsities = shares(online.patterns)
    assert sum(sparsities) / 2 == pytest.approx(0.5)
    assert sparsities[0] != sparsities[1]
    assert shares(linear_patterns(model, shared_out, batches, fused=True)) == sparsities
    prune_model(model, pruner, shared_out, batches, rotations(), online.moments)
    for linear in online.linears:
        kept = model.get_submodule(linear.place.name).weight != 0
        assert (kept == linear.mask).float().mean() > 0.995  # float32 products against float64 ones
    with pytest.raises(InputError, match="unstructured"):
        Allotment(NM(2, 4), "owl")
