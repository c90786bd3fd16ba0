"""The mathematics: rotations leave the function alone, moments rotate with their inputs, masks stay put."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama
from tiny_models import exact, rotated_model

from rotpruner.calibration import gather_model_moments
from rotpruner.errors import InputError
from rotpruner.fusion import fuse_norms
from rotpruner.layout import block_linears, linear_modules
from rotpruner.learning import learn
from rotpruner.measures import sparsity_of
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.orthogonal import (
    orthogonality_error,
    rotate_weight,
)
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotations import merge_rotations, random_rotations, sides
from rotpruner.surrogates import Surrogate

SPACES = ("residual", "value_heads")


def in_float64(rotations):
    """float32 rotations made orthogonal to float64 precision."""
    return {space: torch.linalg.qr(Q.double())[0] for space, Q in rotations.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_fused_and_rotated_logits_equal_the_original(tied, kv_heads, head_dim, ids):
    shape = dict(tie_word_embeddings=tied, num_key_value_heads=kv_heads, head_dim=head_dim, attention_bias=True)
    model = exact(tiny_llama(**shape))
    expected = model(input_ids=ids).logits
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    assert (fused(input_ids=ids).logits - expected).abs().max() < 1e-9
    assert not fused.config.tie_word_embeddings
    assert all((module.weight == 1).all() for name, module in fused.named_modules() if name.endswith("norm"))

    rotations = in_float64(random_rotations(model.config, SPACES, seed=3))
    merged = copy.deepcopy(model)
    merge_rotations(merged, rotations)
    assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-9

    online = rotated_model(copy.deepcopy(model))
    online.rotations.restart(rotations)
    assert (online(ids, pruned=False).logits - expected).abs().max() < 1e-9
    with online.dense() as dense:
        assert (dense(input_ids=ids).logits - expected).abs().max() < 1e-9

    stock = tiny_llama(**shape)
    expected32 = stock(input_ids=ids).logits
    merge_rotations(stock, random_rotations(model.config, SPACES, seed=3))
    assert (stock(input_ids=ids).logits - expected32).abs().max() < 1e-4


def test_pruned_online_model_equals_the_pruned_merged_one(ids):
    model = exact(tiny_llama())
    plain = copy.deepcopy(model)
    online = rotated_model(model)
    rotations = in_float64(random_rotations(plain.config, SPACES, seed=4))
    online.rotations.restart(rotations)
    online.calibrate(ids.split(1))
    online.refresh_masks()
    pruner, pattern = resolve_pruner("wanda"), parse_pattern("2:4")
    moments = gather_model_moments(plain, pruner, rotations, ids.split(1))
    prune_model(plain, pruner, pattern, rotations=rotations, moments=moments)
    assert sparsity_of(plain) == 0.5
    assert (online(ids).logits - plain(input_ids=ids).logits).abs().max() < 1e-9


def test_sequential_statistics_come_from_pruned_predecessors(ids):
    """Against pruning one block at a time by running the whole model anew."""
    pruner, pattern = resolve_pruner("wanda"), parse_pattern("2:4")
    model, naive = exact(tiny_llama()), exact(tiny_llama())
    prune_model(model, pruner, pattern, ids.split(1))
    for layer in range(2):
        moments = gather_model_moments(naive, pruner, (), ids.split(1))
        for linear in block_linears(naive.config):
            if linear.layer == layer:
                weight = naive.get_submodule(linear.name).weight
                weight.data.copy_(pruner.prune(weight, moments[linear.group], pattern)[0])
    for (name, weight), expected in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_one_shot_without_rotations_leaves_the_model_unfused_and_tied(ids):
    model = tiny_llama(tie_word_embeddings=True)
    gain = model.model.layers[0].input_layernorm.weight.clone()
    prune_model(model, resolve_pruner("wanda"), parse_pattern(0.5), ids.split(1))
    assert torch.equal(model.model.layers[0].input_layernorm.weight, gain)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_wanda_scores_do_not_change_by_fusion_but_magnitude_scores_do(ids):
    pattern = parse_pattern("2:4")
    for name, equal in (("wanda", True), ("magnitude", False)):
        masks = []
        for fuse in (False, True):
            model = exact(tiny_llama(tie_word_embeddings=False))
            if fuse:
                fuse_norms(model)
            prune_model(model, resolve_pruner(name), pattern, ids.split(1))
            masks.append(model.model.layers[1].mlp.up_proj.weight != 0)
        assert torch.equal(*masks) == equal, name


def test_random_rotations_are_orthogonal_and_reproducible():
    config = tiny_llama().config
    first, again, other = (random_rotations(config, SPACES, seed) for seed in (0, 0, 1))
    for space in SPACES:
        assert orthogonality_error(first[space]) < 1e-5
        assert torch.equal(first[space], again[space])
        assert not torch.equal(first[space], other[space])


def test_sr_ste_is_straight_through_plus_the_penalty(ids):
    gradients = []
    for explicit in (False, True):
        online = rotated_model(
            exact(tiny_llama()),
            surrogate=Surrogate("straight_through" if explicit else "sr_ste", decay=0.1),
        )
        online.rotations.restart(in_float64(random_rotations(online.base.config, SPACES, seed=5)))
        online.calibrate(ids.split(1))
        online.refresh_masks()
        loss = online.loss(ids)["loss"]
        if explicit:
            rotations = online.rotations()
            for linear in online.linears:
                weight = rotate_weight(linear.weight, *sides(online.base.config, rotations, linear.place))
                loss = loss + 0.05 * weight.masked_fill(linear.mask, 0).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in online.rotations.parameters()])
    for penalised, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(penalised, expected)


def test_constant_mask_gradient_is_that_of_the_masked_model(ids):
    online = rotated_model(exact(tiny_llama()), objective=Objective(kl=1.0, cross_entropy=0.5, cosine=0.1))
    online.calibrate(ids.split(1))
    online.refresh_masks()
    parameter = online.rotations.spaces["residual"].turn
    online.loss(ids)["loss"].backward()
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (parameter.grad * direction).sum()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.copy_(step * direction)
            values.append(online.loss(ids)["loss"])
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, expected, rtol=1e-5, atol=1e-9)


# -- training --------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_memory_not_gradients(ids):
    gradients, calls = [], []
    for checkpointing in (False, True):
        online = rotated_model(exact(tiny_llama()), gradient_checkpointing=checkpointing)
        online.calibrate(ids.split(1))
        online.refresh_masks()
        count = []
        online.linears[0].register_forward_hook(lambda *_, count=count: count.append(1))
        online.loss(ids, torch.arange(3))["loss"].backward()
        calls.append(len(count))
        gradients.append([parameter.grad for parameter in online.rotations.parameters()])
    assert calls[1] == calls[0] + 1, "the backward pass did not recompute the block"
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_learning_lowers_the_loss_and_stays_orthogonal(ids):
    online = rotated_model(tiny_llama())
    online.calibrate(ids.split(1))
    optimizer = torch.optim.Adam(online.rotations.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        if step % 5 == 0:
            online.refresh_masks()
        loss = online.loss(ids, torch.arange(3))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    masks = [linear.mask for linear in online.linears]
    flipped = online.refresh_masks()
    differing = [(linear.mask != mask).float().mean() for linear, mask in zip(online.linears, masks, strict=True)]
    sizes = [mask.numel() for mask in masks]
    assert flipped == pytest.approx(sum(d * n for d, n in zip(differing, sizes, strict=True)) / sum(sizes))
    assert flipped > 0
    assert all(orthogonality_error(Q) < 1e-5 for Q in online.rotations().values())
    assert all(torch.equal(Q, torch.eye(Q.shape[-1]).expand_as(Q)) for Q in online.rotations.started().values())


def test_what_was_left_out_before_learning_is_named(ids):
    online = rotated_model(exact(tiny_llama()))
    with pytest.raises(InputError, match="no masks are chosen yet"):
        online.loss(ids)
    with pytest.raises(InputError, match="no masks are chosen yet"):
        online(ids)
    with pytest.raises(InputError, match=r"Wanda needs statistics, and none are gathered: call calibrate\(batches\)"):
        online.refresh_masks()
    with pytest.raises(InputError, match="Wanda needs statistics"):
        online.start_from_statistics("permutation")
    with pytest.raises(InputError, match="unknown start 'sorted'; choose one of identity"):
        online.start_from_statistics("sorted")
    anywhere = rotated_model(exact(tiny_llama()), pattern="0.5")
    with pytest.raises(InputError, match="helps groups of N:M"):
        anywhere.start_from_statistics("permutation")
    heads = rotated_model(exact(tiny_llama()), ["value_heads"])
    with pytest.raises(InputError, match="add residual"):
        heads.start_from_statistics("pca")
    shared_out = rotated_model(exact(tiny_llama()), pruner="magnitude", pattern="0.5", layer_sparsity="owl")
    with pytest.raises(InputError, match=r"layer_sparsity owl needs statistics.*call calibrate\(batches\)"):
        shared_out.refresh_masks()
    with pytest.raises(InputError, match=r"3:7.* is not divisible by 7"):
        rotated_model(exact(tiny_llama()), pattern="3:7")
    online.calibrate(ids.split(1))
    with pytest.raises(InputError, match="the batches ended after 2 of 3 steps"):
        learn(online, [(ids, None)] * 2, steps=3)


def test_the_core_imports_no_shell():
    code = (
        "import sys, rotpruner, rotpruner.rotated_model, rotpruner.oneshot, rotpruner.artifacts, rotpruner.api; "
        "shell = ('lightning', 'pytorch_lightning', 'wandb', 'datasets', 'torchmetrics'); "
        "print([name for name in shell if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dense_loss_is_zero_against_itself_and_gives_weight_gradients():
    """The floor of the step benchmark runs the untouched function, with a gradient at every weight."""
    model = exact(tiny_llama())
    online = rotated_model(model, pruner="magnitude")
    online.refresh_masks()
    ids = torch.randint(0, 320, (2, 16))
    assert online.loss(ids)["loss"] > 1e-3
    model.requires_grad_(True)
    loss = online.dense_loss(ids)["loss"]
    assert abs(loss.item()) < 1e-9
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
def test_given_masks_need_no_statistics(pruner):
    model, like = tiny_llama(), tiny_llama()
    masks = {name: torch.rand_like(linear.weight) < 0.5 for name, linear in linear_modules(model).items()}
    prune_model(model, resolve_pruner(pruner), parse_pattern("0.5"), masks=masks)
    for name, linear in linear_modules(model).items():
        torch.testing.assert_close(linear.weight, linear_modules(like)[name].weight * masks[name], rtol=0, atol=0)
