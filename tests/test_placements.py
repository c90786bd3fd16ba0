"""Residual rotations that change on the way: the same function, learned, merged, exported, sliced."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_families import draw
from tiny_models import MODELS, exact, rotated_model, tiny, tiny_ids
from transformers import AutoTokenizer

import rotpruner
from rotpruner.artifacts import save_model
from rotpruner.errors import InputError
from rotpruner.families import available_spaces
from rotpruner.layout import residual_boundaries
from rotpruner.measures import sparsity_of
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.placements import basis_changes, residual_sites
from rotpruner.pruners import resolve_pruner
from rotpruner.rotations import merge_rotations, random_rotations
from rotpruner.shortcuts import check_exportable, online_cost, shortcuts_of

PLACEMENTS = ("per_layer", "per_block", 3)
ROTATING = [name for name, (_, _, spaces) in MODELS.items() if "residual" in spaces]


@pytest.fixture
def ids():
    return tiny_ids(2)


def random_in(config, placement, dtype=torch.float64):
    return random_rotations(config, available_spaces(config), seed=3, dtype=dtype, placement=placement)


def test_matrices_are_shared_by_neighbouring_boundaries():
    config = tiny("llama-2").config
    assert residual_boundaries(config) == 5
    assert [residual_sites(config, placement) for placement in ("shared", "per_layer", "per_block", 2)] == [1, 3, 5, 2]
    assert basis_changes(config, 1) == []
    assert basis_changes(config, 3) == [1, 3]  # each after an MLP
    assert basis_changes(config, 5) == [0, 1, 2, 3]
    for wrong in (0, 6, "per_head"):
        with pytest.raises(InputError, match="up to 5"):
            residual_sites(config, wrong)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ROTATING)
def test_placements_leave_the_logits_of_every_family_alone(name, placement, ids):
    model = exact(tiny(name))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        rotations = random_in(model.config, placement)
        merged = copy.deepcopy(model)
        merge_rotations(merged, rotations)
        # A copy's hooks are its own.
        twin = copy.deepcopy(merged)
        for shortcut in shortcuts_of(merged):
            shortcut.weight.zero_()
        assert (twin(input_ids=ids).logits - expected).abs().max() < 1e-9
        assert (merged(input_ids=ids).logits - expected).abs().max() > 1e-3
        online = rotated_model(copy.deepcopy(model), tuple(rotations), placement=placement)
        online.rotations.restart(rotations)
        assert (online(ids, pruned=False).logits - expected).abs().max() < 1e-9
        with online.dense() as dense:
            assert (dense(input_ids=ids).logits - expected).abs().max() < 1e-9


#: Judges exports in a fresh process: logits, and greedy continuation with and without the cache.
JUDGE = """
import sys, torch
{imports}
for directory in sys.argv[1:]:
    found = torch.load(directory + ".pt", weights_only=True)
    model = {load}.eval()
    with torch.no_grad():
        assert (model(input_ids=found["ids"]).logits - found["logits"]).abs().max() < 1e-4, directory
    for cache in (True, False):
        tokens = model.generate(found["ids"], max_new_tokens=6, do_sample=False, use_cache=cache)
        assert torch.equal(tokens, found["tokens"]), (directory, cache)
assert ("rotpruner" in sys.modules) == {ours}
"""
PLAINLY = JUDGE.format(
    imports="from transformers import AutoModelForCausalLM",
    load="AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)",
    ours=False,
)
BY_ROTPRUNER = JUDGE.format(imports="import rotpruner", load="rotpruner.load(directory)", ours=True)


def exported(model, directory, model_directory, ids):
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    torch.save({"ids": ids, "logits": logits, "tokens": tokens}, f"{directory}.pt")
    save_model(model, AutoTokenizer.from_pretrained(model_directory), directory)
    return str(directory)


def judge(script, directories, cwd):
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules")}
    subprocess.run([sys.executable, "-c", script, *directories], cwd=cwd, env=environment, check=True)


def test_exports_of_every_family_load_without_this_package(ids, tmp_path, model_directory):
    directories = []
    for name in ROTATING:
        model = tiny(name)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        merge_rotations(model, random_in(model.config, "per_block", torch.float32))
        with torch.no_grad():
            assert (model(input_ids=ids).logits - expected).abs().max() < 1e-4
        directories.append(exported(model, tmp_path / name.replace(" ", ""), model_directory, ids))
        assert (Path(directories[-1]) / "modeling_rotated.py").is_file()
    judge(PLAINLY, directories, tmp_path)


def test_every_placement_as_it_is_and_packed_makes_the_round_trip(ids, tmp_path, model_directory):
    directories, as_they_are = [], []
    for placement in ("shared", *PLACEMENTS):
        model = tiny("smollm2")
        rotations = random_in(model.config, placement, torch.float32)
        prune_model(model, resolve_pruner("magnitude"), parse_pattern("2:4"), rotations=rotations)
        directory = exported(model, tmp_path / str(placement), model_directory, ids)
        rotpruner.pack(directory, f"{directory}-packed")
        shutil.copy(f"{directory}.pt", f"{directory}-packed.pt")
        rotpruner.unpack(f"{directory}-packed", f"{directory}-unpacked")
        shutil.copy(f"{directory}.pt", f"{directory}-unpacked.pt")
        directories += [directory, f"{directory}-packed", f"{directory}-unpacked"]
        as_they_are += [directory, f"{directory}-unpacked"]
    judge(BY_ROTPRUNER, directories, tmp_path)
    judge(PLAINLY, as_they_are, tmp_path)


def test_an_export_saved_again_is_the_same_checkpoint(ids, tmp_path, model_directory):
    model = tiny("qwen2")
    merge_rotations(model, random_in(model.config, "per_block", torch.float32))
    first = rotpruner.load(exported(model, tmp_path / "first", model_directory, ids))
    second = rotpruner.load(exported(first, tmp_path / "second", model_directory, ids))
    configs = [{**each.config.to_dict(), "_name_or_path": ""} for each in (first, second)]
    assert configs[0] == configs[1]
    for (name, one), (other, two) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_learned_placements_prune_as_they_were_trained(placement, ids):
    model = exact(tiny("llama-3"))
    settings = dict(placement=placement, objective=Objective(kl=1.0, cosine=0.5))
    rotated = rotated_model(copy.deepcopy(model), available_spaces(model.config), **settings)
    rotated.calibrate(ids.split(1))
    optimizer = torch.optim.Adam(rotated.rotations.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        rotated.refresh_masks()
        loss = rotated.loss(ids, torch.arange(len(ids)))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0]
    rotated.refresh_masks()
    rotations = {space: Q.detach() for space, Q in rotated.rotations().items()}
    assert len(rotations["residual"].flatten(1).unique(dim=0)) > 1  # neighbours have parted
    with torch.no_grad():
        expected = rotated(ids).logits
        prune_model(model, rotated.pruner, rotated.pattern, rotations=rotations, moments=rotated.moments)
        assert sparsity_of(model) == 0.5
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-9


def test_gradient_checkpointing_changes_no_gradient(ids):
    gradients = []
    for checkpointing in (False, True):
        model = exact(tiny("llama-3"))
        settings = dict(pruner="magnitude", placement="per_block", gradient_checkpointing=checkpointing)
        rotated = rotated_model(model, ("residual",), **settings)
        rotated.rotations.restart(random_rotations(model.config, ("residual",), 3, torch.float64, "per_block"))
        rotated.refresh_masks()
        rotated.loss(ids)["loss"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in rotated.rotations.parameters()]))
    torch.testing.assert_close(*gradients)


def test_shared_rotations_are_where_more_of_them_start(ids):
    model = exact(tiny("llama-2"))
    shared = draw(model.config, ("residual",))
    many = rotated_model(exact(tiny("llama-2")), ("residual",), placement="per_block")
    many.rotations.restart(shared)
    assert torch.equal(many.rotations()["residual"], shared["residual"].expand(5, -1, -1, -1))
    three = random_rotations(model.config, ("residual",), 4, torch.float64, placement=3)
    parted = rotated_model(exact(tiny("llama-2")), ("residual",), placement="per_block")
    parted.rotations.restart(three)
    assert torch.equal(parted.rotations()["residual"], three["residual"][[0, 0, 1, 1, 2]])
    online = rotated_model(model, ("residual",))
    online.rotations.restart(shared)
    with torch.no_grad():
        torch.testing.assert_close(many(ids, pruned=False).logits, online(ids, pruned=False).logits)


@pytest.mark.parametrize("placement", ["per_layer", "per_block"])
def test_slices_of_every_placement_are_what_was_learned(placement, ids, tmp_path, model_directory):
    model = tiny("llama-3")
    pattern = parse_pattern("slice:0.3")
    settings = dict(pattern="slice:0.3", start="pca", placement=placement)
    rotated = rotated_model(copy.deepcopy(model), ("residual",), **settings)
    rotated.calibrate(ids.split(1))
    rotated.start_from_statistics("pca")
    rotations = {space: Q.detach() for space, Q in rotated.rotations().items()}
    with torch.no_grad():
        expected = rotated(ids).logits
        prune_model(model, resolve_pruner("wanda"), pattern, ids.split(1), rotations)
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-4
        width = model.config.hidden_size
        assert width < 24
        changes = len(basis_changes(model.config, len(rotations["residual"])))
        assert online_cost(model) == (changes * width**2, 2 * changes * width**2)
    save_model(model, AutoTokenizer.from_pretrained(model_directory), tmp_path / "export")
    assert rotpruner.load(tmp_path / "export").config.hidden_size == width


def test_streams_that_change_basis_take_no_more_rotations(ids):
    model = tiny("llama-2")
    merge_rotations(model, random_in(model.config, "per_block", torch.float32))
    with pytest.raises(InputError, match="changes basis on the way"):
        random_rotations(model.config, ("residual",), seed=0)
    config = copy.deepcopy(model.config)
    config.model_type = "toy"
    with pytest.raises(InputError, match="choose placement shared"):
        check_exportable(config)
