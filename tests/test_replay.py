"""Block-by-block execution gives every block what the whole model gives it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, tiny

from rotpruner.allotment import Allotment
from rotpruner.calibration import gather_model_moments, linears_to_watch
from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.layout import block_linears, linear_modules, module_at
from rotpruner.measures import sparsity_of
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.replay import BlockReplay, moments_by_block
from rotpruner.rotations import random_rotations
from rotpruner.statistics import gather_moments, watch_inputs


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_replayed_blocks_compute_what_the_model_computes(name):
    model = tiny(name).eval()
    batches = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0)).split(1)
    blocks = module_at(model, family_of(model.config).blocks)
    expected: list[list[torch.Tensor]] = [[] for _ in blocks]

    def keep(layer):
        return lambda module, args, output: expected[layer].append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    for input_ids in batches:
        model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()

    replay = BlockReplay(model, batches)
    assert all("forward" not in vars(block) for block in blocks), "the blocks were left changed"
    for layer in range(len(blocks)):
        for found, states in zip(replay.run(layer), expected[layer], strict=True):
            assert torch.equal(found, states)
        replay.advance(layer)
    final = [model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state for input_ids in batches]
    for found, states in zip(replay.finish(), final, strict=True):
        assert torch.equal(found, states)
    assert all("forward" not in vars(block) for block in blocks), "the blocks were left changed"


def test_batches_share_their_masks_and_positions():
    """Or each would hold a T × T matrix where attention takes one, as Gemma-2's does."""
    batches = torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(0)).split(1)
    replay = BlockReplay(tiny("gemma-2"), batches)
    for layer in replay._arguments:
        assert len({id(arguments["attention_mask"]) for arguments in layer}) == 1
        assert layer[0]["attention_mask"].shape[-2:] == (16, 16)


def test_statistics_need_batches():
    model, untouched = tiny("llama-2"), tiny("llama-2")
    rotations = random_rotations(model.config, ["residual"], 0)
    with pytest.raises(InputError, match="Wanda needs statistics, and no calibration batches are given"):
        prune_model(model, resolve_pruner("wanda"), parse_pattern("2:4"), rotations=rotations)
    with pytest.raises(InputError, match=r"pattern slice:0\.3 needs statistics"):
        prune_model(model, resolve_pruner("magnitude"), parse_pattern("slice:0.3"))
    with pytest.raises(InputError, match="layer_sparsity owl needs statistics"):
        prune_model(model, resolve_pruner("magnitude"), Allotment(parse_pattern("0.5"), "owl"))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), untouched.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_moments_by_block_are_those_of_the_whole_model(name):
    model, batches = tiny(name), torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0)).split(1)
    watched = linears_to_watch(model, block_linears(model.config), "full", ())
    found, expected = moments_by_block(model, *watched, batches), gather_moments(model, *watched, batches)
    assert found.keys() == expected.keys()
    for group, moment in expected.items():
        assert torch.equal(found[group].blocks, moment.blocks)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_every_family_is_pruned_block_by_block(name, pruner):
    model = tiny(name).eval()
    batches = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0)).split(1)
    prune_model(model, resolve_pruner(pruner), parse_pattern("2:4"), batches)
    assert sparsity_of(model) == 0.5
    assert torch.isfinite(model(input_ids=batches[0]).logits).all()


@torch.no_grad()
def test_blocks_visit_the_device_one_at_a_time(monkeypatch):
    """Each block goes there once and comes back before the next one goes; the result is the same."""
    model, alone = tiny("llama-3"), tiny("llama-3")
    batches = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0)).split(1)
    blocks, moves = list(module_at(model, family_of(model.config).blocks)), []
    original = torch.nn.Module.to

    def spied(module, *args, **kwargs):
        moves.extend(layer for layer, block in enumerate(blocks) if block is module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", spied)
    prune_model(model, resolve_pruner("sparsegpt"), parse_pattern("2:4"), batches, device=torch.device("cpu"))
    assert moves == [0, 0, 1, 1]
    prune_model(alone, resolve_pruner("sparsegpt"), parse_pattern("2:4"), batches)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("given", [True, False], ids=["dense statistics", "sequential"])
@torch.no_grad()
def test_update_keeps_the_masks_and_brings_the_output_nearer(given):
    """Wanda chooses, SparseGPT's update makes up for what is gone."""
    dense = tiny("llama-2")
    batches = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(0)).split(8)
    expected = torch.cat([dense(input_ids=ids).logits for ids in batches])
    wanda, pattern = resolve_pruner("wanda"), parse_pattern("2:4")
    plain, updated = tiny("llama-2"), tiny("llama-2")
    moments = gather_model_moments(tiny("llama-2"), wanda, (), batches) if given else None
    prune_model(plain, wanda, pattern, batches, moments=moments)
    prune_model(updated, wanda, pattern, batches, moments=moments, update=resolve_pruner("sparsegpt"))
    first = module_at(plain, "model.layers.0.self_attn.q_proj").weight
    assert torch.equal(module_at(updated, "model.layers.0.self_attn.q_proj").weight != 0, first != 0)
    if given:
        for one, other in zip(linear_modules(plain).values(), linear_modules(updated).values(), strict=True):
            assert torch.equal(one.weight != 0, other.weight != 0)
    errors = [(torch.cat([m(input_ids=ids).logits for ids in batches]) - expected).norm() for m in (plain, updated)]
    assert errors[1] < 0.95 * errors[0]


@torch.no_grad()
def test_moments_stay_float32_under_autocast():
    """Only the model's own products may be bfloat16; a Hessian of that precision ruins every reconstruction."""
    linear, x = torch.nn.Linear(8, 4), torch.randn(64, 8)
    with watch_inputs({"it": linear}, {"it": 8}) as sums, torch.autocast("cpu", dtype=torch.bfloat16):
        linear(x)
    H = sums.means()["it"].full()
    assert H.dtype == torch.float32
    assert torch.allclose(H, x.mT @ x / 64, atol=1e-6)
