"""Going on after an update: what a pruned model keeps, in the place of a dense model's own weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import MODELS, calibrated_in, exact, rotated_model, tiny, tiny_ids
from transformers import AutoModelForCausalLM

from rotpruner.errors import InputError
from rotpruner.kept_weights import take_kept_weights
from rotpruner.layout import linear_modules
from rotpruner.loading import load_model
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import merge_rotations, random_rotations

PLACED = [(name, "shared") for name in MODELS] + [("llama-3", "per_layer"), ("opt", "per_block")]


def pruned_and_updated(dense, rotations):
    """Pruned in a rotated basis, what is kept a little other than it was."""
    model = copy.deepcopy(dense)
    prune_model(model, resolve_pruner("magnitude"), parse_pattern("2:4"), rotations=rotations)
    for linear in linear_modules(model).values():
        linear.weight.data *= 1.5
    return model


@pytest.mark.parametrize(("name", "placement"), PLACED, ids=map(" ".join, PLACED))
@torch.no_grad()
def test_under_its_mask_it_is_the_pruned_model(name, placement):
    dense, ids = exact(tiny(name)), tiny_ids(2)
    rotations = random_rotations(dense.config, MODELS[name][2], 0, torch.float64, placement)
    expected = dense(input_ids=ids).logits
    pruned = pruned_and_updated(dense, rotations)

    merged = copy.deepcopy(dense)
    merge_rotations(merged, rotations)
    own = {path: linear.weight.clone() for path, linear in linear_modules(merged).items()}
    taken = copy.deepcopy(dense)
    take_kept_weights(taken, pruned, rotations)
    assert (taken(input_ids=ids).logits - expected).abs().max() > 1e-3
    merge_rotations(taken, rotations)
    for path, linear in linear_modules(taken).items():
        kept = linear_modules(pruned)[path].weight
        torch.testing.assert_close(linear.weight, torch.where(kept != 0, kept, own[path]))
        linear.weight.masked_fill_(kept == 0, 0)
    torch.testing.assert_close(taken(input_ids=ids).logits, pruned(input_ids=ids).logits)


@torch.no_grad()
def test_a_model_that_keeps_its_weights_stays_as_it_is():
    dense, ids = exact(tiny("llama-3")), tiny_ids(2)
    rotations = random_rotations(dense.config, ["residual", "value_heads", "mlp"], 0, torch.float64)
    pruned, taken = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_model(pruned, resolve_pruner("magnitude"), parse_pattern("2:4"), rotations=rotations)
    take_kept_weights(taken, pruned, rotations)
    torch.testing.assert_close(taken(input_ids=ids).logits, dense(input_ids=ids).logits)


@pytest.mark.parametrize("placement", ["shared", "per_layer"])
def test_learning_goes_on_where_the_pruned_model_is(placement):
    dense, ids = exact(tiny("llama-3")), tiny_ids(2)
    spaces = ["residual", "value_heads", "mlp"]
    given = random_rotations(dense.config, spaces, 0, torch.float64, placement)
    pruned = pruned_and_updated(dense, given)
    rotated = calibrated_in(given, dense, ids, placement=placement)
    rotated.take_over(copy.deepcopy(dense), pruned, given)
    assert rotated.refresh_masks() == 0  # wanda would choose others
    torch.testing.assert_close(rotated(ids).logits, pruned(input_ids=ids).logits)
    states = dense.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(rotated._dense_states(ids), states)
    assert not any("teacher" in name for name, _ in rotated.named_parameters())
    rotated.loss(ids)["loss"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in rotated.rotations.parameters())
    masks = rotated.learned().masks
    assert all(torch.equal(masks[path], linear.weight != 0) for path, linear in linear_modules(pruned).items())
    rotated.leave()
    with pytest.raises(RuntimeError, match="the teacher has left"):  # the base is no dense model
        rotated.loss(ids)


@pytest.mark.parametrize(("given", "own", "fits"), [(1, 2, True), (2, 5, True), (2, 4, True), (2, 3, False)])
def test_masks_stay_in_the_basis_that_they_were_chosen_in(given, own, fits):
    """Two blocks have five boundaries; of three matrices, the second has one of each basis that two had."""
    dense, ids = exact(tiny("llama-3")), tiny_ids(2)
    drawn = random_rotations(dense.config, ["residual", "value_heads"], 0, torch.float64, given)
    pruned = pruned_and_updated(dense, drawn)
    rotated = calibrated_in(drawn, dense, ids, placement=own)
    if fits:
        rotated.take_over(dense, pruned, drawn)
        rotated.refresh_masks()
        torch.testing.assert_close(rotated(ids).logits, pruned(input_ids=ids).logits)
    else:
        with pytest.raises(InputError, match=r"pruned in 2 bases.*set placement to 2, or to per_block"):
            rotated.take_over(dense, pruned, drawn)


def test_a_linear_that_is_not_to_be_pruned_gets_back_what_was_removed():
    dense, ids = exact(tiny("llama-3")), tiny_ids(2)
    drawn = random_rotations(dense.config, ["residual", "value_heads"], 0, torch.float64)
    pruned = pruned_and_updated(dense, drawn)
    exceptions = {"*.v_proj": parse_pattern("0")}
    rotated = calibrated_in(drawn, dense, ids, exceptions=exceptions)
    rotated.take_over(copy.deepcopy(dense), pruned, drawn)
    rotated.refresh_masks()
    taken = copy.deepcopy(dense)
    take_kept_weights(taken, pruned, drawn)
    prune_model(taken, rotated.pruner, rotated.allotment, **rotated.learned()._asdict())
    assert (linear_modules(taken)["model.layers.0.self_attn.v_proj"].weight != 0).all()
    torch.testing.assert_close(taken(input_ids=ids).logits, rotated(ids).logits)


def test_another_runs_rotations_are_refused():
    dense = exact(tiny("llama-3"))
    drawn, other = (random_rotations(dense.config, ["residual", "value_heads"], seed, torch.float64) for seed in (0, 1))
    pruned = pruned_and_updated(dense, drawn)
    before = copy.deepcopy(dense.state_dict())
    for wrong in (other, {**drawn, "value_heads": other["value_heads"]}, {}):
        with pytest.raises(InputError, match=r"give the rotations and the export of one run of this model"):
            take_kept_weights(dense, pruned, wrong)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("pruner", ["magnitude", "sparsegpt"])
def test_a_fit_goes_on_and_ends_with_what_it_took_over(pruner, fit, tmp_path):
    """With rotations that stand still, its export is that which it began with."""
    given = ["--model.pruner", pruner, "--model.start", "random", "--trainer.max_steps", "1"]
    assert fit(*given)[0] == 0
    first = (tmp_path / "run").rename(tmp_path / "first")
    export = AutoModelForCausalLM.from_pretrained(first / "export", dtype=torch.float32)
    for linear in linear_modules(export).values():
        linear.weight.data *= 0.5  # by which pruners would choose others
    export.save_pretrained(first / "export")
    went_on = ["--model.init_rotations", str(first / "rotations"), "--model.init_weights", str(first / "export")]
    still = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e-20"]
    status, run = fit(*given, *went_on, *still)
    assert status == 0
    found = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    for path, linear in linear_modules(found).items():
        expected = linear_modules(export)[path].weight
        torch.testing.assert_close(linear.weight, expected, atol=1e-6, rtol=1e-4)
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    before = {row["name"]: row for row in json.loads((first / "results.json").read_text())["rows"]}
    assert rows["rotpruner"]["ppl"] != before["rotpruner"]["ppl"]
    assert "| learning continued from | `export`, whose kept weights" in (run / "export" / "README.md").read_text()
    assert rows["pruner"]["ppl"] == before["pruner"]["ppl"], "the control is of the untouched model"


def test_what_cannot_be_taken_over_is_refused(fit, model_directory, tmp_path, capsys):
    dense = tiny("llama-2")
    with pytest.raises(InputError, match="no decoder weight of the pruned model is zero"):
        take_kept_weights(dense, tiny("llama-2"), {})
    with pytest.raises(InputError, match="intermediate_size of 64, the model one of 32"):
        take_kept_weights(dense, tiny("llama-2", intermediate_size=64), {})
    pruned = copy.deepcopy(dense)
    prune_model(pruned, resolve_pruner("magnitude"), parse_pattern("0.5"))
    rotated = rotated_model(copy.deepcopy(dense), pruner="magnitude")
    with pytest.raises(InputError, match="does not keep to the pattern 2:4"):
        rotated.take_over(dense, pruned, {})
    rotated = rotated_model(copy.deepcopy(dense), pruner="magnitude", pattern="0.7")
    with pytest.raises(InputError, match=r"does not keep to the pattern 0\.7"):
        rotated.take_over(dense, pruned, {})
    assert fit("--model.init_weights", str(model_directory))[0] == 2
    assert "give its init_rotations" in capsys.readouterr().err
    model = load_model(model_directory)
    drawn = random_rotations(model.config, ["residual", "value_heads"], 0)
    Rotations.of(drawn, model).save_pretrained(tmp_path / "Q")
    given = ["--model.init_weights", str(model_directory), "--model.init_rotations", str(tmp_path / "Q")]
    assert fit(*given, "--model.surrogate.name", "gumbel")[0] == 2
    assert "and surrogate gumbel has none" in capsys.readouterr().err
