"""What a pruned model looks like inside: kept mass, errors and heat maps, against definitions and by hand."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from command_line import fit_arguments
from conftest import tiny_llama
from tiny_models import rotated_model

from callbacks import finish
from experiments.__main__ import main
from rotpruner.allotment import allot
from rotpruner.calibration import gather_model_moments
from rotpruner.diagnostics import (
    block_means,
    kept_mass,
    layer_table,
    masked_share,
    pooled_rms,
    relative_error,
    write_diagnostics,
)
from rotpruner.layout import linear_modules
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotations import merge_rotations, random_rotations
from rotpruner.statistics import Moment


def test_kept_mass_and_error_by_hand():
    saliency, mask = torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([[True, False], [True, False]])
    assert kept_mass(saliency, mask) == pytest.approx(5 / 8)
    weight = torch.tensor([[1.0, 2.0]])
    H = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    moment = Moment(H[None])
    # Ŵ = (1, 0): E‖2 x₂‖² = 4, E‖W x‖² = 4 + 2·2·1 + 4 = 12.
    assert relative_error(weight, weight * torch.tensor([[1.0, 0.0]]), moment) == pytest.approx(math.sqrt(4 / 12))
    assert relative_error(weight, weight * torch.tensor([[0.0, 1.0]]), None) == pytest.approx(math.sqrt(1 / 5))


def test_looking_at_saliencies_leaves_no_inverses_behind(ids):
    """Of which each is as large as the moment that it was taken of."""
    rotated = rotated_model(tiny_llama(), pruner="sparsegpt")
    rotated.calibrate(ids.split(1))
    rotated.refresh_masks()
    before = {group: len(moment._derived) for group, moment in rotated.moments.items()}
    assert len(masked_share(rotated)) == 14
    rotations = {space: Q.detach() for space, Q in rotated.rotations().items()}
    layer_table(tiny_llama(), tiny_llama(), rotations, rotated.moments, rotated.pruner, rotated.patterns)
    assert {group: len(moment._derived) for group, moment in rotated.moments.items()} == before


@pytest.mark.parametrize(("n", "heads"), [(8, 1), (4, 2), (8, 2)])
def test_errors_do_not_depend_on_the_basis(n, heads):
    """The same error, seen from x Q with W Q: blocks gathered by head, whole, and whole but rotated by head."""
    generator = torch.Generator().manual_seed(n + heads)
    width = 8
    X = torch.randn(64, width, generator=generator)
    X[:, 1] += X[:, 0]
    H = X.mT @ X / len(X)
    Q = torch.linalg.qr(torch.randn(heads, width // heads, width // heads, generator=generator)).Q
    blocks = torch.stack([H[i : i + n, i : i + n] for i in range(0, width, n)])
    W, pruned = torch.randn(2, 5, width, generator=generator).unbind()
    turn = torch.block_diag(*Q)
    own = relative_error(W, pruned, Moment(blocks))
    assert relative_error(W @ turn, pruned @ turn, Moment(blocks).rotate(Q)) == pytest.approx(own, rel=1e-5)
    if n == width:
        direct = ((W - pruned) @ X.mT).norm() / (W @ X.mT).norm()
        assert own == pytest.approx(direct.item(), rel=1e-5)


def test_layer_table_reports_what_the_pruner_did():
    rotations = random_rotations(tiny_llama().config, ["residual", "value_heads"], 0)
    pruner, pattern = resolve_pruner("wanda"), parse_pattern("0.75")
    patterns = allot(tiny_llama().config, [pattern] * 2, {})
    batches = list(torch.randint(0, 320, (2, 1, 32), generator=torch.Generator().manual_seed(0)))
    model, pruned = tiny_llama(), tiny_llama()
    moments = gather_model_moments(model, pruner, rotations, batches)
    prune_model(pruned, pruner, pattern, rotations=rotations, moments=moments)
    rows = layer_table(tiny_llama(), pruned, rotations, moments, pruner, patterns)
    assert [row["layer"] for row in rows] == [0] * 7 + [1] * 7
    for row in rows:
        assert row["sparsity"] == pytest.approx(0.75, abs=1e-6)
        assert 0.25 < row["kept_mass"]["own"] < 1
        assert 0.25 < row["kept_mass"]["learned"] < 1
        assert 0.1 < row["error"] < 1
    other = layer_table(tiny_llama(), _shuffled(pruned), rotations, moments, pruner, patterns)
    for row, worse in zip(rows, other, strict=True):
        assert worse["kept_mass"]["learned"] < row["kept_mass"]["learned"], "of the masks that are there"
    # Queries, of the merged model with statistics of its own: what the pruner has judged.
    merged, wanda = tiny_llama(), resolve_pruner("wanda")
    merge_rotations(merged, rotations)
    full = gather_model_moments(merged, resolve_pruner("sparsegpt"), (), batches)
    for row in rows[::7]:
        weight, moment = merged.get_submodule(row["name"]).weight.detach(), full[row["name"]]
        error = relative_error(weight, pruned.get_submodule(row["name"]).weight.detach(), moment)
        saliency = wanda.saliency(weight, moment)
        assert row["error"] == pytest.approx(error, rel=1e-3)
        assert row["kept_mass"]["learned"] == pytest.approx(kept_mass(saliency, pattern.mask(saliency)), rel=1e-3)
        assert abs(row["kept_mass"]["own"] - row["kept_mass"]["learned"]) > 1e-3
    # Of a narrower model, what is missing counts; a pattern of whole directions has no masks to speak of.
    narrow = tiny_llama(hidden_size=16, intermediate_size=24)
    row = layer_table(tiny_llama(), narrow, {}, {}, pruner, [])[4]
    assert row["sparsity"] == pytest.approx(0.75)
    assert row["error"] is row["kept_mass"] is None


def test_a_heat_map_shows_root_mean_squares():
    torch.testing.assert_close(pooled_rms(torch.tensor([[1.0, -3.0]])), torch.tensor([[1.0, 3.0]]) / math.sqrt(5))


def test_masks_are_scored_in_the_rotations_that_they_were_chosen_in(ids):
    """While it learns as afterwards."""
    rotated = rotated_model(tiny_llama(), start="random")
    rotated.calibrate(ids.split(1))
    rotated.refresh_masks()
    rotations = {space: Q.detach() for space, Q in rotated.rotations().items()}
    pruned = tiny_llama()
    prune_model(pruned, rotated.pruner, rotated.pattern, rotations=rotations, moments=rotated.moments)
    rows = layer_table(tiny_llama(), pruned, rotations, rotated.moments, rotated.pruner, rotated.patterns)
    for row, learning in zip(rows, masked_share(rotated), strict=True):
        assert learning["name"] == row["name"]
        assert learning["kept_mass"] == pytest.approx(row["kept_mass"]["learned"], rel=1e-4)


def _shuffled(model):
    """The same model with its zeros elsewhere."""
    shuffled = copy.deepcopy(model)
    for name, linear in linear_modules(shuffled).items():
        order = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(len(name)))
        linear.weight.data = linear.weight.data[:, order]
    return shuffled


def test_means_of_blocks_are_over_weights():
    rows = [
        {"layer": 0, "weights": 1, "of": 0},
        {"layer": 0, "weights": 3, "of": 1},
        {"layer": 1, "weights": 2, "of": 5},
    ]
    assert block_means(rows, lambda row: row["of"]) == {0: 0.75, 1: 5}


def test_each_block_is_scored_by_the_pattern_that_it_was_pruned_by():
    pruner, blocks = resolve_pruner("magnitude"), [parse_pattern(0.0), parse_pattern(0.75)]
    patterns = allot(tiny_llama().config, blocks, {})
    rows = layer_table(tiny_llama(), tiny_llama(), {}, {}, pruner, patterns)
    assert all(row["kept_mass"] == {"own": 1, "learned": 1} for row in rows if row["layer"] == 0)
    assert all(0.25 < row["kept_mass"]["own"] < 0.8 for row in rows if row["layer"] == 1)


def test_a_fit_with_shared_out_sparsity_is_diagnosed_by_its_shares(
    model_directory, text_file, test_text_file, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr(finish, "write_diagnostics", lambda *all: given.append(all[6]) or write_diagnostics(*all))
    arguments = fit_arguments(model_directory, text_file, test_text_file, tmp_path / "run")
    owl = ["--model.pattern", "0.5", "--model.layer_sparsity", "owl"]
    assert main(["fit", "-c", "experiments/configs/quickstart.yaml", *arguments, *owl]) == 0
    shares = list(dict.fromkeys(pattern.sparsity for pattern in given[0].values()))
    assert len(set(shares)) == 2
    for row in json.loads((tmp_path / "run" / "layers.json").read_text())["linears"]:
        assert row["sparsity"] == pytest.approx(shares[row["layer"]], abs=0.02), "rounded in each row"
