"""Run by `test_devices.py` in a process of its own: on the GPU, or without one on a device that tells stray tensors."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from elsewhere import ELSEWHERE, elsewhere
from tiny_models import exact, rotated_model, tiny

from experiments.__main__ import main
from rotpruner.calibration import gather_model_moments
from rotpruner.compensation import compensate
from rotpruner.diagnostics import layer_table
from rotpruner.learning import learn
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.perplexity import perplexity
from rotpruner.pruners import PRUNERS, resolve_pruner
from rotpruner.replay import moments_by_block
from rotpruner.rotations import LearnedRotations, merge_rotations, random_rotations
from rotpruner.slicegpt import slice_per_block
from rotpruner.surrogates import Surrogate

pytestmark = pytest.mark.gpu

DEVICES = torch.device("cpu"), ELSEWHERE
IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(one, other, tolerance=1e-6):
    for first, second in zip(one, other, strict=True):
        assert first.device.type == second.device.type == "cpu"
        assert (first - second).double().norm() <= tolerance * first.double().norm().clamp_min(1)


def test_the_device_tells_a_stray_tensor():
    with elsewhere() as device:
        x = torch.ones(3, device=device)
        assert (x + x).device == device
        assert (x + 1).sum().item() == 6
        with pytest.raises(RuntimeError, match=r"on (one|the same) device"):
            x + torch.ones(3)
        x.add_(x.cpu().to(device))
        assert x.cpu().tolist() == [2, 2, 2]


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "slice:0.25"])
@pytest.mark.parametrize("pruner", PRUNERS)
@torch.no_grad()
def test_blocks_are_pruned_there(pruner, pattern):
    if pattern.startswith("slice") and pruner != "magnitude":
        pytest.skip("a slice has no pruner")
    found = []
    with elsewhere():
        for device in DEVICES:
            model = tiny("smollm2") if pattern.startswith("slice") else exact(tiny("smollm2"))
            prune_model(model, resolve_pruner(pruner), parse_pattern(pattern), IDS.split(1), device=device)
            found.append(weights(model))
    # What is solved in steps ends a little elsewhere: attention takes another path on the device. Slices are float32.
    assert_same(*found, tolerance={"alps": 1e-2, "magnitude": 1e-5}.get(pruner, 1e-6))


@pytest.mark.parametrize("name", ["llama-3", "opt"])
@torch.no_grad()
def test_rotated_masks_with_dense_statistics_and_the_update(name):
    masked, updated = [], []
    with elsewhere():
        for device in DEVICES:
            model, dense = exact(tiny(name)), exact(tiny(name))
            rotations = random_rotations(model.config, ["residual", "value_heads"], 0)
            merge_rotations(dense, rotations)
            pruner = resolve_pruner("wanda")
            gather = partial(moments_by_block, device=device)
            moments = gather_model_moments(dense, pruner, (), IDS.split(1), gather)
            merge_rotations(model, rotations)
            prune_model(model, pruner, parse_pattern("2:4"), moments=moments, device=device)
            masked.append(weights(model))
            length = compensate(model, dense, IDS.split(1), device=device)
            updated.append([*weights(model), torch.tensor(length)])
    assert_same(*masked)
    assert_same(*updated, tolerance=1e-2)  # conjugate gradients, and a parabola


@pytest.mark.parametrize("placement", ["shared", "per_layer"])
@torch.no_grad()
def test_a_model_that_is_there_as_a_whole_is_pruned_and_updated_there(placement):
    found = []
    with elsewhere():
        for device in DEVICES:
            model, dense, ids = exact(tiny("llama-3")).to(device), exact(tiny("llama-3")).to(device), IDS.to(device)
            rotations = random_rotations(model.config, ["residual", "value_heads", "mlp"], 0, placement=placement)
            prune_model(model, resolve_pruner("wanda"), parse_pattern("2:4"), ids.split(1), rotations, device=device)
            length = compensate(model, dense, ids.split(1), rotations=rotations, device=device)
            ppl = perplexity(model, ids.flatten(), seq_len=16, device=device)
            found.append([*(weight.cpu() for weight in weights(model)), torch.tensor([length, ppl])])
    assert_same(*found, tolerance=1e-2)


WHOLE = {
    "update": [
        "--pruner",
        "wanda",
        "--pattern",
        "2:4",
        "--rotations",
        "random",
        "--statistics",
        "dense",
        "--compensate",
        "4",
    ],
    "owl": ["--pruner", "magnitude", "--pattern", "0.5", "--layer_sparsity", "owl", "--update", "sparsegpt"],
    "slice": ["--pattern", "slice:0.25"],
    "slice per block": ["--pattern", "slice:0.25", "--placement", "per_block"],
}


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_the_command_prunes_a_model_that_waits_there(
    options, tokenizer, text_file, test_text_file, tmp_path, monkeypatch, capsys
):
    exact(tiny("llama-3", vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = []
    given = ["--model", tmp_path / "model", "--calibration", text_file, "--text", test_text_file]
    sizes = ["--num_sequences", "4", "--seq_len", "32", "--max_tokens", "256", "--json"]
    for module in ("experiments.prune", "datamodules.evaluation"):
        monkeypatch.setattr(f"{module}.home_of", lambda model, device, *_: device)
    with elsewhere():
        for device in DEVICES:
            assert main(["prune", *map(str, given), *options, *sizes, "--device", str(device)]) == 0
            found.append(json.loads(capsys.readouterr().out))
    for one, other in zip(*(each["ppl"].values() for each in found), strict=True):
        assert one == pytest.approx(other, rel=2e-2)  # stock norms are float32: the steps of a solver go elsewhere
    assert found[1]["sparsity"] == found[0]["sparsity"]


@torch.no_grad()
def test_every_block_has_a_basis_of_its_own_there():
    found = []
    with elsewhere():
        for device in DEVICES:
            model = exact(tiny("llama-2"))
            slice_per_block(model, 16, IDS.split(1), device=device)
            found.append([model(input_ids=IDS).logits])
    assert_same(*found, tolerance=1e-5)


@torch.no_grad()
def test_rotations_follow_the_model_there():
    model = exact(tiny("llama-3"))
    expected = model(input_ids=IDS).logits
    with elsewhere() as device:
        there = copy.deepcopy(model).to(device)
        merge_rotations(there, random_rotations(model.config, ["residual", "value_heads", "mlp"], 0))
        assert_same([expected], [there(input_ids=IDS.to(device)).logits.cpu()], tolerance=1e-5)


@pytest.mark.parametrize(("name", "placement"), [("llama-3", "shared"), ("opt", "shared"), ("llama-2", "per_layer")])
@torch.no_grad()
def test_a_model_that_stays_here_is_merged_there(name, placement):
    found = []
    with elsewhere():
        for device in (None, *DEVICES):
            model = exact(tiny(name))
            spaces = ["residual", "value_heads", "mlp"]
            merge_rotations(model, random_rotations(model.config, spaces, 0, placement=placement), device)
            found.append(weights(model))
    assert_same(found[0], found[1], 0)
    assert_same(found[0], found[2], 1e-12)


@torch.no_grad()
def test_layers_are_looked_at_there():
    rows = []
    with elsewhere():
        for device in (None, *DEVICES):
            rotated = rotated_model(exact(tiny("llama-3")))
            rotated.calibrate(IDS.split(1))
            pruned = exact(tiny("llama-3"))
            judged = rotated.rotations(), rotated.moments, rotated.pruner, rotated.patterns
            prune_model(pruned, rotated.pruner, rotated.pattern, rotations=judged[0], moments=rotated.moments)
            rows.append(layer_table(exact(tiny("llama-3")), pruned, *judged, device=device))
    assert rows[0] == rows[1]
    for one, other in zip(rows[0], rows[2], strict=True):
        assert one["kept_mass"] == pytest.approx(other["kept_mass"])
        assert one["error"] == pytest.approx(other["error"], rel=1e-5)


def test_models_are_made_there():
    """Lightning makes a module's tensors where it will run."""
    with elsewhere() as device:
        with torch.device(device):
            rotations = LearnedRotations(tiny("llama-3").config, ["residual", "value_heads", "mlp"], start="random")
        assert {tensor.device for tensor in rotations.state_dict().values()} == {device}


@pytest.mark.parametrize("name", ["llama-2", "opt", "gemma-2"])
def test_perplexity_is_measured_there(name):
    model = exact(tiny(name))
    here = perplexity(model, IDS.flatten(), seq_len=16)
    with elsewhere() as device:
        there = perplexity(model, IDS.flatten(), seq_len=16, device=device)
    assert there == pytest.approx(here, rel=1e-7)  # Gemma's norms are float32 in any model


#: Not `gumbel`: a device made in Python has no generator of noise.
LEARNING = {
    "wanda": {},
    "sparsegpt": {"pruner": "sparsegpt"},
    "straight-through": {"surrogate": Surrogate("straight_through"), "pattern": "0.5"},
    "SR-STE": {"surrogate": Surrogate("sr_ste"), "objective": Objective(cross_entropy=1, cosine=1)},
    "sigmoid": {"surrogate": Surrogate("sigmoid"), "pattern": "0.5"},
    "concentration": {"objective": Objective(kl=0, entropy=1, lost_mass=1)},
    "checkpointing": {"gradient_checkpointing": True},
    "slice": {"pattern": "slice:0.25", "spaces": ["residual"], "start": "pca"},
    "permutation": {"spaces": ["residual", "value_heads", "mlp"], "start": "permutation"},
    "per layer": {"placement": "per_layer"},
    "owl": {"pattern": "0.5", "layer_sparsity": "owl"},
}


@pytest.mark.parametrize("settings", LEARNING.values(), ids=LEARNING)
def test_learning_gives_there_what_it_gives_on_the_cpu(settings):
    found = []
    with elsewhere():
        for device in DEVICES:
            torch.manual_seed(0)
            found.append(learned(device, **copy.deepcopy(settings)))
    assert_same(*found)


def learned(device, start="identity", **settings):
    rotated = rotated_model(exact(tiny("llama-3")), start=start, **settings).to(device)
    ids = IDS.to(device)
    rotated.calibrate(ids.split(1))
    rotated.start_from_statistics(start)
    losses: list[float] = []
    batches = [(ids, torch.arange(len(ids)))] * 2
    learn(rotated, batches, steps=2, refresh_every=1, on_step=lambda step, found: losses.append(found["loss"]))
    return [torch.tensor(losses), *(Q.detach().cpu() for Q in rotated.rotations().values())]


@pytest.mark.parametrize(("name", "offload"), [("llama-3", False), ("opt", True)])
def test_learning_goes_on_there_behind_an_update(name, offload):
    found = []
    with elsewhere():
        for device in DEVICES:
            dense = exact(tiny(name))
            given = random_rotations(dense.config, ["residual", "value_heads"], 0, torch.float64)
            pruned = exact(tiny(name))
            prune_model(pruned, resolve_pruner("magnitude"), parse_pattern("2:4"), rotations=given)
            rotated = rotated_model(exact(tiny(name)), gradient_checkpointing=True, offload=offload).to(device)
            rotated.rotations.restart(given)
            rotated.calibrate(IDS.to(device).split(1))
            rotated.take_over(dense, pruned, given)
            rotated.refresh_masks()
            loss = rotated.loss(IDS.to(device))["loss"]
            loss.backward()
            found.append([loss.detach().cpu(), *(Q.grad.cpu() for Q in rotated.rotations.parameters())])
    assert_same(*found)
