"""The closed-form update under given masks: its least squares, its line search, its commands."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from command_line import fit_arguments
from tiny_models import MODELS, exact, tiny

from experiments.__main__ import main
from rotpruner import compensation
from rotpruner.compensation import _distance_to, _fit, check_compensation, compensate, line_search
from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.layout import block_linears, linear_modules, module_at, residual_sublayers
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.replay import final_states
from rotpruner.rotations import merge_rotations, random_rotations
from rotpruner.teacher import head_at


def batches(count: int = 16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(seed)).split(1)


def pair(name: str, pattern: str = "2:4", placement: str | None = None):
    """(pruned by Wanda, dense), float64; with a placement, in random bases of it."""
    dense = exact(tiny(name))
    if placement is not None:
        spaces = ("residual", "value_heads")
        merge_rotations(dense, random_rotations(dense.config, spaces, 0, torch.float64, placement))
    pruned = copy.deepcopy(dense)
    prune_model(pruned, resolve_pruner("wanda"), parse_pattern(pattern), batches())
    return pruned, dense


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_family_comes_nearer_and_keeps_its_masks(name):
    pruned, dense = pair(name)
    masks = {path: linear.weight != 0 for path, linear in linear_modules(pruned).items()}
    distance = _distance_to(dense, batches()[-5:], None, None)
    before = distance(pruned)
    length = compensate(pruned, dense, batches())
    assert 0 < length <= 1
    assert distance(pruned) < before
    for path, linear in linear_modules(pruned).items():
        assert torch.equal(linear.weight != 0, masks[path]), path


@pytest.mark.parametrize(("name", "placement"), [("llama-3", None), ("opt", None), ("llama-3", "per_block")])
@torch.no_grad()
def test_every_row_is_the_least_squares_of_what_it_sees(name, placement):
    """Against `lstsq` over the kept weights: readers of the dense model's outputs, writers of its stream."""
    pruned, dense = pair(name, "0.5", placement)
    before = copy.deepcopy(pruned)
    _fit(pruned, dense, batches(), 1e-9, None, None, lambda items, description: items)
    norm = residual_sublayers(dense.config)[1].norm
    untouched = copy.deepcopy(dense)
    for place in block_linears(dense.config):
        block = place.name.removesuffix(place.spec.path)
        # What the row saw: predecessors updated, itself and its successors not.
        seen = copy.deepcopy(before)
        names = [other.name for other in block_linears(dense.config)]
        for other in names[: names.index(place.group)]:
            module_at(seen, other).weight.copy_(module_at(pruned, other).weight)
        x = _inputs(seen, place.name)
        W, V0, V = (module_at(model, place.name).weight for model in (dense, seen, pruned))
        if place.spec.writes == "residual":
            after = block + norm if place.spec.path.endswith(("o_proj", "out_proj")) else None
            after = after or place.layer + 1
            target = x @ V0.mT + _stream(dense, after) - _stream(seen, after)
        else:
            target = _inputs(dense, place.name) @ W.mT
        for row in range(0, len(V), 5):
            kept = V0[row] != 0
            solution = torch.linalg.lstsq(x[:, kept], target[:, row]).solution
            errors = [(x[:, kept] @ weights - target[:, row]).square().sum() for weights in (V[row, kept], solution)]
            assert errors[0] <= errors[1] * (1 + 1e-5)
    for one, other in zip(dense.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, other)


def _inputs(model, path: str) -> torch.Tensor:
    found = []
    handle = module_at(model, path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for ids in batches():
        model(input_ids=ids)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in found])


def _stream(model, after: str | int) -> torch.Tensor:
    """What a norm gets, or a block by its number, after the last one the final norm."""
    if isinstance(after, int):
        family = family_of(model.config)
        last = after == model.config.num_hidden_layers
        after = family.final_norm if last else f"{family.blocks}.{after}"
    return _inputs(model, after)


@torch.no_grad()
def test_online_bases_are_made_up_for_too():
    pruned, dense = pair("llama-2", placement="per_block")
    distance = _distance_to(dense, batches()[-5:], None, None)
    before = distance(pruned)
    assert compensate(pruned, dense, batches()) > 0
    assert distance(pruned) < before


@pytest.mark.parametrize("damping", [0.01, 10.0])
@torch.no_grad()
def test_a_model_that_lost_nothing_stays(damping):
    """Without the line search, which would not go where it does harm; damping pulls to the weights as they are."""
    dense = exact(tiny("smollm2"))
    same = copy.deepcopy(dense)
    _fit(same, dense, batches(4), damping, None, None, lambda items, description: items)
    for one, other in zip(linear_modules(same).values(), linear_modules(dense).values(), strict=True):
        torch.testing.assert_close(one.weight, other.weight)


def test_what_finds_the_step_was_not_fitted(monkeypatch):
    pruned, dense = pair("smollm2")
    fitted, tried, given = [], [], batches()
    monkeypatch.setattr(compensation, "_fit", lambda pruned, dense, these, *rest: fitted.extend(these))
    monkeypatch.setattr(
        compensation, "_distance_to", lambda dense, these, *rest: tried.extend(these) or (lambda model: 0.0)
    )
    compensate(pruned, dense, given)
    assert (len(fitted), len(tried)) == (11, 5)
    assert [*map(id, fitted + tried)] == [*map(id, given)]


@torch.no_grad()
def test_a_tied_head_is_brought_to_the_device_after_the_states_are_there(monkeypatch):
    """On a GPU it takes the embedding with it, which the states begin with."""
    pruned, dense = pair("smollm2")
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    at_device: list[int] = []

    @contextmanager
    def head(model, device):
        at_device.append(1)
        with head_at(model, None) as found:
            yield found
        at_device.pop()

    def states(*given):
        assert not at_device
        return final_states(*given)

    monkeypatch.setattr(compensation, "head_at", head)
    monkeypatch.setattr(compensation, "final_states", states)
    assert _distance_to(dense, batches(2), None, None)(pruned) > 0
    assert not at_device


@pytest.mark.parametrize("name", ["llama-2", "opt"])
@torch.no_grad()
def test_checkpoints_in_float16_are_updated_under_bfloat16(name):
    """As the hub's OPT and LLaMA-2 are, and the shipped configs' products."""
    dense = tiny(name).half()
    pruned = copy.deepcopy(dense)
    prune_model(pruned, resolve_pruner("wanda"), parse_pattern("2:4"), batches(), calibration_dtype=torch.bfloat16)
    distance = _distance_to(dense, batches()[-5:], torch.bfloat16, None)
    before = distance(pruned)
    assert compensate(pruned, dense, batches(), calibration_dtype=torch.bfloat16) > 0
    assert distance(pruned) < before
    assert pruned.dtype == torch.float16


@pytest.mark.parametrize("vertex", [0.1, 0.43, 0.9])
def test_the_line_search_finds_the_vertex(vertex):
    assert line_search(lambda length: 3 + 2 * (length - vertex) ** 2) == pytest.approx(vertex)


@pytest.mark.parametrize(("slope", "best"), [(1.0, 0.0), (-1.0, 1.0), (0.0, 0.0)])
def test_the_line_search_stays_in_its_range(slope, best):
    assert line_search(lambda length: slope * length) == best
    assert line_search(lambda length: slope * (length + length**2)) == best


@torch.no_grad()
def test_a_step_that_helps_nowhere_is_not_taken():
    losses = {0.0: 1.0, 0.5: 1.1, 1.0: 2.0}
    assert line_search(lambda length: losses.get(length, 1.01)) == 0


def test_too_few_or_too_many_sequences_and_slices_are_refused(capsys):
    with pytest.raises(InputError, match="1 batches: an update needs one to fit and one to try"):
        compensate(tiny("llama-2"), tiny("llama-2"), batches()[:1])
    pattern = parse_pattern("2:4")
    check_compensation(0, 1, pattern)
    check_compensation(8, 8, pattern)
    with pytest.raises(InputError, match="give 2 or more"):
        check_compensation(1, 8, pattern)
    with pytest.raises(InputError, match="more than the 8 calibration sequences"):
        check_compensation(9, 8, pattern)
    arguments = ["prune", "--model", "smollm2-135m", "--pattern", "slice:0.3", "--compensate", "8", "--output", "x"]
    assert main(arguments) == 2
    assert "leave compensate out" in capsys.readouterr().err


def test_the_command_says_how_far_it_went(model_directory, text_file, test_text_file, tmp_path, capsys):
    arguments = ["prune", "--model", str(model_directory), "--pruner", "wanda", "--pattern", "2:4", "--compensate", "8"]
    arguments += ["--calibration", str(text_file), "--num_sequences", "8", "--seq_len", "32"]
    arguments += ["--output", str(tmp_path / "export"), "--text", str(test_text_file), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["step_length"] <= 1
    assert result["sparsity"] == pytest.approx(0.5)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "compensation" in card
    assert "--compensate 8" in card


def test_a_fit_updates_all_its_rows_under_their_masks(
    model_directory, text_file, test_text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("callbacks.ending.Ending._elapsed", lambda self: 1000.0)
    run = tmp_path / "run"
    arguments = ["fit", "-c", "experiments/configs/quickstart.yaml"]
    arguments += fit_arguments(model_directory, text_file, test_text_file, run)
    assert main([*arguments, "--model.compensate", "100000"]) == 2
    assert "calibration sequences; give fewer" in capsys.readouterr().err
    controls = ["--trainer.callbacks.init_args.controls", "[pruner, random_rotation, no_update]"]
    assert main([*arguments, *controls]) == 2
    assert "no_update is rotpruner itself where compensate is 0" in capsys.readouterr().err
    assert main([*arguments, *controls, "--model.compensate", "4"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["device"] == "cpu"
    pruned = {row["name"]: row for row in results["rows"] if row["name"] != "dense"}
    assert list(pruned) == ["pruner", "random_rotation", "no_update", "rotpruner"]
    assert all(row["sparsity"] == 0.5 for row in pruned.values())
    assert all(0 < pruned[name]["step_length"] <= 1 for name in ("pruner", "random_rotation", "rotpruner"))
    assert "step_length" not in pruned["no_update"]
    learned = [name for name, row in pruned.items() if row["seconds"] >= 1000]
    assert learned == ["no_update", "rotpruner"]
    assert pruned["no_update"]["ppl"] != pruned["rotpruner"]["ppl"]
    assert "this model before the weight update" in (run / "export" / "README.md").read_text()
    assert "compensation" in (run / "export" / "README.md").read_text()
