"""Exceptions: decoder linears that get another pattern than the rest, or stay dense."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import MODELS, calibrated_in, exact, rotated_model, tiny, tiny_ids
from transformers import AutoModelForCausalLM

import rotpruner
from experiments.__main__ import main
from lightning_modules.rotation_module import RotationModule
from rotpruner.allotment import Allotment, allot, parse_exceptions
from rotpruner.calibration import gather_model_moments
from rotpruner.errors import InputError
from rotpruner.layout import linear_modules
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.patterns import NM, Unstructured
from rotpruner.pruners import PRUNERS, resolve_pruner
from rotpruner.rotations import random_rotations
from rotpruner.surrogates import Surrogate

#: 2:4 but for the values, which stay dense, and for what the second block's mlp writes.
EXCEPTIONS = {"*.v_proj": Unstructured(0.0), "model.layers.1.*.down_proj": NM(4, 8)}
GIVEN = {"*.v_proj": 0.0, "model.layers.1.*.down_proj": "4:8"}
SHOWN = "2:4 (*.v_proj 0, model.layers.1.*.down_proj 4:8)"


def shares(model):
    """Of every decoder linear, its share of zeros."""
    return {name: (linear.weight == 0).float().mean().item() for name, linear in linear_modules(model).items()}


def assert_excepted(model):
    for name, share in shares(model).items():
        assert share == (0 if "v_proj" in name else 0.5), name
    others = {name for name, linear in linear_modules(model).items() if not NM(2, 4).holds(linear.weight)}
    values = {f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)}
    assert others == values | {"model.layers.1.mlp.down_proj"}
    assert NM(4, 8).holds(model.model.layers[1].mlp.down_proj.weight)


def test_the_last_match_counts():
    config = tiny("llama-2").config
    found = allot(config, [Unstructured(0.25), Unstructured(0.75)], {"*.mlp.*": NM(2, 4), "*.layers.1.*": NM(4, 8)})
    assert found["model.layers.0.self_attn.q_proj"] == Unstructured(0.25)
    assert found["model.layers.0.mlp.up_proj"] == NM(2, 4)
    assert {found[name] for name in found if ".layers.1." in name} == {NM(4, 8)}
    assert parse_exceptions(GIVEN) == EXCEPTIONS
    assert parse_exceptions({"*": 0.5}, "layer")["*"] == Unstructured(0.5, "layer")


@pytest.mark.parametrize("pruner", PRUNERS)
@torch.no_grad()
def test_what_is_excepted_changes_nothing_for_the_rest_of_its_group(pruner):
    """With given statistics; q and k read what v reads."""
    dense, batches = exact(tiny("llama-3")), tiny_ids(4).split(1)
    resolved = resolve_pruner(pruner)
    moments = gather_model_moments(dense, resolved, (), batches)
    found = []
    for exceptions in ({}, EXCEPTIONS):
        model = copy.deepcopy(dense)
        prune_model(model, resolved, Allotment(NM(2, 4), exceptions=exceptions), moments=moments)
        found.append(linear_modules(model))
    assert_excepted(model)
    own = linear_modules(dense)
    for name, linear in found[1].items():
        if "v_proj" in name:
            assert torch.equal(linear.weight, own[name].weight)
        elif name != "model.layers.1.mlp.down_proj":
            torch.testing.assert_close(linear.weight, found[0][name].weight)


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@torch.no_grad()
def test_nothing_but_exceptions_can_be_pruned(pruner):
    model, given = exact(tiny("opt")), Allotment(Unstructured(0.0), exceptions={"*.fc1": NM(2, 4)})
    with pytest.raises(InputError, match="no calibration batches"):
        prune_model(model, resolve_pruner(pruner), given)
    prune_model(model, resolve_pruner(pruner), given, tiny_ids(2).split(1))
    assert all(share == ("fc1" in name) / 2 for name, share in shares(model).items())


@pytest.mark.parametrize(
    ("surrogate", "objective"),
    [
        (Surrogate(), Objective(kl=1)),
        (Surrogate("straight_through"), Objective(kl=1)),
        (Surrogate("sigmoid"), Objective(kl=1)),
        (Surrogate(), Objective(kl=0, entropy=1, lost_mass=1)),
    ],
    ids=["constant", "straight-through", "sigmoid", "concentration"],
)
@pytest.mark.parametrize("start", ["identity", "permutation"])
def test_learning_sees_the_model_that_will_be_exported(surrogate, objective, start):
    dense, ids = exact(tiny("llama-3")), tiny_ids(4)
    spaces = ["residual", "value_heads", "mlp"] if start == "permutation" else ["residual", "value_heads"]
    rotated = rotated_model(
        copy.deepcopy(dense), spaces, surrogate=surrogate, objective=objective, exceptions=EXCEPTIONS
    )
    rotated.calibrate(ids.split(1))
    rotated.start_from_statistics(start)
    rotated.refresh_masks()
    rotated.loss(ids)["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in rotated.rotations.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in rotated.rotations.parameters())
    pruned = copy.deepcopy(dense)
    prune_model(pruned, rotated.pruner, rotated.pattern, **rotated.learned()._asdict())
    assert_excepted(pruned)
    torch.testing.assert_close(rotated(ids).logits, pruned(input_ids=ids).logits)


def test_an_entropy_is_of_what_is_pruned():
    dense, ids = exact(tiny("llama-2")), tiny_ids(4)
    found = []
    for exceptions in ({}, {"*.down_proj": Unstructured(0.0)}, {"*.mlp.*": Unstructured(0.0)}):
        rotated = rotated_model(copy.deepcopy(dense), objective=Objective(kl=0, entropy=1), exceptions=exceptions)
        rotated.calibrate(ids.split(1))
        found.append(rotated.loss(ids)["entropy"].item())
    assert len(set(found)) == 3
    nothing = {"*.v_proj": Unstructured(0.0), "*.o_proj": Unstructured(0.0)}
    rotated = rotated_model(dense, ["value_heads"], objective=Objective(kl=0, entropy=1), exceptions=nothing)
    rotated.calibrate(ids.split(1))
    with pytest.raises(InputError, match="entropy is of what rotates and is pruned, and no linear is both"):
        rotated.loss(ids)


@torch.no_grad()
def test_orders_are_of_what_has_the_pattern():
    """Nobody orders features for a linear that keeps all of them."""
    ids, found = tiny_ids(4), []
    for names in ("*.v_proj", "*.self_attn.[qkv]_proj"):
        rotated = rotated_model(
            exact(tiny("llama-2")), ["residual", "value_heads", "mlp"], exceptions={names: Unstructured(0.0)}
        )
        rotated.calibrate(ids.split(1))
        rotated.start_from_statistics("permutation")
        found.append(rotated.rotations())
    assert not torch.equal(found[0]["residual"], found[1]["residual"])
    assert torch.equal(found[0]["mlp"], found[1]["mlp"])


@torch.no_grad()
def test_learning_goes_on_behind_an_update_under_exceptions():
    dense, ids = exact(tiny("llama-3")), tiny_ids(2)
    rotations = random_rotations(dense.config, MODELS["llama-3"][2], 0, torch.float64)
    pruned = copy.deepcopy(dense)
    prune_model(pruned, resolve_pruner("magnitude"), Allotment(NM(2, 4), exceptions=EXCEPTIONS), rotations=rotations)
    for exceptions in (EXCEPTIONS, {}):
        rotated = calibrated_in(rotations, dense, ids, exceptions=exceptions)
        if exceptions:
            rotated.take_over(dense, pruned, rotations)
            rotated.refresh_masks()
            torch.testing.assert_close(rotated(ids).logits, pruned(input_ids=ids).logits)
            continue
        with pytest.raises(InputError, match=r"v_proj of the pruned model does not keep to the pattern 2:4"):
            rotated.take_over(dense, pruned, rotations)


def test_a_fit_and_its_controls_make_exceptions(fit):
    given = ["--model.exceptions", json.dumps(GIVEN), "--model.compensate", "2"]
    status, run = fit(*given)
    assert status == 0
    assert_excepted(AutoModelForCausalLM.from_pretrained(run / "export"))
    card = (run / "export" / "README.md").read_text()
    assert "| pattern | `2:4`, but `0` in `*.v_proj`, but `4:8` in `model.layers.1.*.down_proj` |" in card
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    assert rows["pruner"]["sparsity"] == rows["rotpruner"]["sparsity"] < 0.5
    assert rows["pruner"]["pattern"] == rows["rotpruner"]["pattern"] == SHOWN
    assert "\n- 2:4\n" not in card
    for row in json.loads((run / "layers.json").read_text())["linears"]:
        assert row["sparsity"] == (0 if "v_proj" in row["name"] else 0.5)
        assert (row["kept_mass"]["own"] == 1) is ("v_proj" in row["name"])


def test_the_prune_command_and_python_make_exceptions(model_directory, text_file, tokenizer, texts, tmp_path, capsys):
    given = ["prune", "--model", model_directory, "--pruner", "wanda", "--pattern", "2:4", "--calibration", text_file]
    given += ["--num_sequences", 4, "--seq_len", 32, "--rotations", "random", "--statistics", "dense"]
    given += [item for names, pattern in GIVEN.items() for item in ("--except", f"{names}={pattern}")]
    assert main([*map(str, given), "--output", str(tmp_path / "pruned"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pattern"] == SHOWN
    assert_excepted(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"))
    settings = dict(exceptions=GIVEN, num_sequences=4, seq_len=32, steps=2)
    for rotate in ("none", "shared"):
        model = rotpruner.load_model(str(model_directory))
        assert_excepted(rotpruner.prune(model, tokenizer, texts, rotate=rotate, **settings))


@torch.no_grad()
def test_owl_shares_out_around_them():
    model = tiny("llama-2")
    given = Allotment(Unstructured(0.5), "owl", {"*.o_proj": Unstructured(0.0)})
    prune_model(model, resolve_pruner("wanda"), given, tiny_ids(4).split(1))
    found = shares(model)
    assert found["model.layers.0.self_attn.o_proj"] == 0
    assert found["model.layers.0.mlp.up_proj"] != found["model.layers.1.mlp.up_proj"]


def test_what_cannot_be_excepted_is_refused(model_directory, capsys):
    config = tiny("llama-2").config
    with pytest.raises(InputError, match=r"'\*\.down' matches no decoder linear; a name of one is model\.layers\.0\."):
        allot(config, [NM(2, 4)] * 2, {"*.down": NM(4, 8)})
    with pytest.raises(InputError, match="leave no linear to prune"):
        allot(config, [NM(2, 4)] * 2, {"*": Unstructured(0.0)})
    with pytest.raises(InputError, match=r"slice:0\.5 is of the residual stream"):
        parse_exceptions({"*": "slice:0.5"})
    for settings, reason in (
        ({"pattern": "slice:0.25", "spaces": ["residual"], "exceptions": {"*": 0.5}}, "narrows all linears alike"),
        ({"surrogate": Surrogate("gumbel"), "exceptions": GIVEN}, "gumbel learns masks of one pattern"),
        ({"exceptions": {"*.q_proj": "1:5"}}, r"q_proj: its input width 32 is not divisible by 5"),
        ({"exceptions": {"*.nowhere": 0.5}}, "matches no decoder linear"),
    ):
        with pytest.raises(InputError, match=reason):
            RotationModule(str(model_directory), **settings)
    assert main(["prune", "--model", str(model_directory), "--pattern", "2:4", "--except", "*.q_proj"]) == 2
    assert "is not of the form NAMES=PATTERN" in capsys.readouterr().err
    given = ["prune", "--model", str(model_directory), "--pruner", "wanda", "--pattern", "2:4", "--output", "nowhere"]
    assert main([*given, "--except", "*.q_proj=0", "--except", "*=4:8", "--except", "*.q_proj=0"]) == 2
    assert "--except *.q_proj is given twice" in capsys.readouterr().err


def test_a_pattern_need_not_fit_where_it_is_not_used(fit):
    """The mlp is 48 wide; 7:32 fits everywhere else."""
    without = ["--trainer.callbacks.init_args.controls", "[pruner]"]
    assert fit("--model.pattern", "7:32", *without)[0] == 2
    status, run = fit("--model.pattern", "7:32", "--model.exceptions", '{"*.down_proj": "2:4"}', *without)
    assert status == 0
    assert [row["pattern"] for row in json.loads((run / "results.json").read_text())["rows"]] == [
        None,
        "7:32 (*.down_proj 2:4)",
        "7:32 (*.down_proj 2:4)",
    ]
