"""Objectives that judge a basis by the importance of weights alone."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import entropy as scipy_entropy
from tiny_models import exact, rotated_model, tiny, tiny_ids

from experiments.__main__ import main
from lightning_modules.rotation_module import RotationModule
from rotpruner.allotment import allot
from rotpruner.calibration import gather_model_moments
from rotpruner.concentration import entropy, lost_mass
from rotpruner.errors import InputError
from rotpruner.objectives import Objective
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import merge_rotations, random_rotations


@pytest.fixture
def ids():
    return tiny_ids(4)


def learner(objective, **settings) -> RotatedModel:
    return rotated_model(exact(tiny("llama-3")), objective=objective, **settings)


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 9))
def test_entropy_is_that_of_rows_and_columns(seed, rows, columns):
    importance = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = np.mean([scipy_entropy(row) for row in importance.numpy()])
    assert entropy(importance, 1).item() == pytest.approx(expected, abs=1e-12)
    assert entropy(importance.T, 0).item() == pytest.approx(expected, abs=1e-12)
    assert entropy(torch.zeros(rows, columns), 1) < 1e-30


def test_gradients_are_those_of_finite_differences():
    importance = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: entropy(x, 1), importance)
    assert torch.autograd.gradcheck(lambda x: lost_mass(x, parse_pattern("2:4")), importance)


def test_weights_of_zero_have_finite_gradients():
    weight = torch.tensor([[0.0, 1, 2], [0, 0, 0]], requires_grad=True)
    (entropy(weight.square(), 0) + entropy(weight.square(), 1)).backward()
    assert weight.grad.isfinite().all()


def test_mass_is_lost_where_the_mask_says():
    importance = torch.tensor([[4.0, 3, 2, 1], [1, 1, 8, 10]])
    assert lost_mass(importance, parse_pattern("2:4")).item() == pytest.approx((3 + 2) / 30)


def wanda_importance(W, H):
    return W**2 * np.diag(H)


def obs_importance(W, H):
    return W**2 / np.diag(np.linalg.inv(H + 0.01 * np.diag(H).mean() * np.eye(len(H))))


@pytest.mark.parametrize(
    ("pruner", "placement", "importance_of"),
    [
        ("wanda", "shared", wanda_importance),
        ("wanda", "per_layer", wanda_importance),
        ("sparsegpt", "shared", obs_importance),
    ],
)
def test_terms_are_those_of_the_merged_model(pruner, placement, importance_of, ids):
    """An oracle: merge the rotations, gather statistics anew, and score the plain model's weights by the formula."""
    rotated = learner(Objective(kl=0, entropy=1.0, lost_mass=0.5), placement=placement, pruner=pruner)
    config = rotated.base.config
    rotations = random_rotations(config, ("residual", "value_heads"), 3, torch.float64, placement)
    rotated.calibrate(ids.split(1))
    rotated.rotations.restart(rotations)
    found = rotated.loss(ids)
    merged = exact(tiny("llama-3"))
    merge_rotations(merged, rotations)
    moments = gather_model_moments(merged, resolve_pruner("sparsegpt"), (), ids.split(1))
    entropies, masses = [], []
    for linear in rotated.linears:
        place = linear.place
        weight = merged.get_submodule(place.name).weight.detach().numpy()
        importance = importance_of(weight, moments[place.group].full().numpy())
        lost = np.sort(importance.reshape(-1, 4))[:, :2]
        masses.append(lost.sum() / importance.sum())
        if place.spec.reads in rotations:
            entropies.append(scipy_entropy(importance, axis=1).mean())
        if place.spec.writes in rotations:
            entropies.append(scipy_entropy(importance, axis=0).mean())
    # q, k, gate, up read; down writes; v and o do both.
    assert len(entropies) == config.num_hidden_layers * 9
    assert found["entropy"].item() == pytest.approx(np.mean(entropies), rel=1e-5)
    assert found["lost_mass"].item() == pytest.approx(np.mean(masses), rel=1e-5)
    assert found["loss"].item() == pytest.approx(np.mean(entropies) + 0.5 * np.mean(masses), rel=1e-5)


def test_an_order_is_no_rotation_that_could_lower_an_entropy(ids):
    """The terms of features in another order are those of the same features."""
    found = []
    for spaces in (["residual", "value_heads"], ["residual", "value_heads", "mlp"]):
        rotated = learner(Objective(kl=0, entropy=1.0), spaces=spaces)
        rotated.calibrate(ids.split(1))
        given = random_rotations(rotated.base.config, spaces, 3, torch.float64)
        rotated.rotations.restart(given)
        found.append(rotated.loss(ids)["entropy"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("term", ["entropy", "lost_mass"])
def test_learning_concentrates_importance_without_running_the_model(term, ids, monkeypatch):
    rotated = learner(Objective(**{"kl": 0, term: 1.0}), placement="per_layer")
    rotated.calibrate(ids.split(1))
    rotated.refresh_masks()
    monkeypatch.setattr(rotated.base, "forward", None)
    monkeypatch.setattr(rotated.base.base_model, "forward", None)
    optimizer = torch.optim.Adam(rotated.rotations.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = rotated.loss(ids)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_it_goes_with_objectives_of_outputs_and_not_with_slices(ids, model_directory):
    both = learner(Objective(kl=1.0, entropy=0.1))
    both.calibrate(ids.split(1))
    both.refresh_masks()
    terms = both.loss(ids)
    assert terms["loss"].item() == pytest.approx(terms["kl"].item() + 0.1 * terms["entropy"].item())
    with pytest.raises(InputError, match="judge weights: set them to 0"):
        RotationModule(
            str(model_directory), pattern="slice:0.25", spaces=["residual"], objective=Objective(kl=1, entropy=1)
        )


def test_mass_is_lost_by_each_blocks_own_pattern(ids):
    rotated = learner(Objective(kl=0, lost_mass=1.0))
    rotated.calibrate(ids.split(1))
    losses = []
    for patterns in ((0.0, 0.0), (0.0, 0.75), (0.75, 0.0), (0.75, 0.75)):
        rotated.patterns = allot(rotated.base.config, list(map(parse_pattern, patterns)), {})
        losses.append(rotated.loss(ids)["lost_mass"].item())
    assert losses[0] == 0
    assert 0.01 < losses[1] != losses[2]
    assert losses[1] + losses[2] == pytest.approx(losses[3])


def test_a_fit_of_the_entropy_is_the_warm_start_of_a_fit_of_the_loss(model_directory, text_file, tmp_path):
    def fit(run, **model):
        settings = {"model": {"model": str(model_directory), "base_dtype": "float32", **model}}
        settings["data"] = {"calibration": str(text_file), "num_sequences": 8, "seq_len": 32}
        finish = {"texts": [str(text_file)], "seq_len": 32, "max_tokens": 128, "controls": []}
        callbacks = [
            {"class_path": "callbacks.repruning.Repruning"},
            {"class_path": "callbacks.finish.Finish", "init_args": finish},
        ]
        trainer = dict(accelerator="cpu", max_steps=15, log_every_n_steps=1, default_root_dir=str(tmp_path / run))
        settings["trainer"] = {**trainer, "callbacks": callbacks, "enable_model_summary": False}
        config = tmp_path / f"{run}.yaml"
        config.write_text(json.dumps(settings))
        assert main(["fit", "-c", str(config)]) == 0
        with next((tmp_path / run).rglob("metrics.csv")).open() as file:
            rows = list(csv.DictReader(file))
        linears = json.loads((tmp_path / run / "layers.json").read_text())["linears"]
        masses = [np.mean([row["kept_mass"][basis] for row in linears]) for basis in ("own", "learned")]
        rotation = load_file(tmp_path / run / "rotations" / "rotations.safetensors")["residual"]
        return rows, masses, rotation

    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}}
    rows, (own, learned), warm = fit("warm", objective={"kl": 0, "entropy": 1}, optimizer=adam)
    assert "train/kl" not in rows[0]
    entropies = [float(row["train/entropy"]) for row in rows if row["train/entropy"]]
    assert entropies[-1] < entropies[0] - 0.05
    assert learned > own + 0.01
    gentle = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}}
    rows, _, end = fit("on", init_rotations=str(tmp_path / "warm" / "rotations"), optimizer=gentle)
    losses = [float(row["train/kl"]) for row in rows if row["train/kl"]]
    assert losses[-1] < losses[0]
    moved = (end - warm).norm()
    assert 0 < moved < 0.2 * (warm - torch.eye(len(warm[0, 0]))).norm()
