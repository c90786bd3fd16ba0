"""The Python door, and what the README shows of it."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from conftest import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

import rotpruner
from rotpruner.batches import chosen_windows
from rotpruner.families import _FAMILIES, LLAMA
from rotpruner.layout import linear_modules
from rotpruner.learning import passes
from rotpruner.measures import sparsity_of
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import Pruner, resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import LearnedRotations, random_rotations
from rotpruner.shortcuts import online_cost


class RelativeToColumn(Pruner):
    """The README's example of a pruner of one's own."""

    needs = "nothing"

    def saliency(self, weight, moment):
        size = weight.float().abs()
        return size / size.norm(dim=0).clamp_min(1e-8)


def test_prune_returns_a_pruned_copy_and_leaves_the_model_alone(tokenizer, texts, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = []
    pruned = rotpruner.prune(
        model,
        tokenizer,
        texts,
        steps=6,
        num_sequences=8,
        seq_len=32,
        dtype=torch.float32,
        lr=1e-2,
        on_step=lambda step, found: losses.append(found["loss"]),
    )
    assert len(losses) == 6
    assert sparsity_of(pruned) == 0.5
    assert type(pruned) is type(model)
    assert not pruned.config.tie_word_embeddings
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    pruned.save_pretrained(tmp_path / "pruned")
    assert sparsity_of(rotpruner.load_model(str(tmp_path / "pruned"))) == 0.5


@pytest.mark.parametrize("rotate", ["shared", "none"])
def test_compensate_comes_nearer_under_the_same_masks(rotate, tokenizer, texts):
    settings = dict(rotate=rotate, steps=2, num_sequences=16, seq_len=32, dtype=torch.float32)
    plain, updated = (
        rotpruner.prune(tiny_llama(), tokenizer, texts, **settings, compensate=compensate) for compensate in (0, 16)
    )
    one, other = (linear_modules(model) for model in (plain, updated))
    assert all(torch.equal(one[name].weight != 0, other[name].weight != 0) for name in one)
    assert updated.origin.update == "compensation"
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[:, :512].view(16, 32)
    with torch.no_grad():
        dense = tiny_llama()(input_ids=ids).logits
        errors = [(model(input_ids=ids).logits - dense).square().mean() for model in (plain, updated)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("rotate", ["shared", "none"])
def test_pruners_that_rebuild_outputs_see_pruned_predecessors(rotate, tokenizer, texts):
    settings = dict(num_sequences=4, seq_len=32, dtype=torch.float32, pruner="sparsegpt", seed=3)
    found = rotpruner.prune(tiny_llama(), tokenizer, texts, rotate=rotate, steps=0, **settings)
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    rows = chosen_windows(rows, 4, seed=3)
    expected = tiny_llama()
    rotations = None
    if rotate == "shared":
        rotations = LearnedRotations(expected.config)()
    prune_model(expected, resolve_pruner("sparsegpt"), parse_pattern("2:4"), rows.split(1), rotations)
    for name, module in linear_modules(found).items():
        torch.testing.assert_close(module.weight, linear_modules(expected)[name].weight, atol=1e-4, rtol=1e-3)


#: The sizes and the dtype of the fixture's fits.
AS_A_FIT = dict(num_sequences=4, seq_len=32, dtype=torch.float32)


def given(model_directory, text_file):
    """What a call is given first, from what a fit names."""
    return rotpruner.load_model(model_directory), rotpruner.load_tokenizer(model_directory), [text_file.read_text()]


def assert_exported(pruned, run) -> None:
    exported = rotpruner.load_model(run / "export").state_dict()
    for name, weight in pruned.state_dict().items():
        torch.testing.assert_close(weight, exported[name], atol=1e-5, rtol=0, msg=name)


def test_a_call_does_what_a_fit_does(fit, model_directory, text_file, tmp_path):
    status, run = fit(
        "--trainer.max_steps", "7", "--seed_everything", "3", "--trainer.callbacks.init_args.controls", "[]"
    )
    assert status == 0
    pruned = rotpruner.prune(
        *given(model_directory, text_file), steps=7, seed=3, rotations_directory=tmp_path / "kept", **AS_A_FIT
    )
    kept, learned = (rotpruner.Rotations.from_pretrained(path) for path in (tmp_path / "kept", run / "rotations"))
    for space, Q in learned.items():
        assert not torch.equal(Q, torch.eye(Q.shape[-1]).expand_as(Q))
        torch.testing.assert_close(kept[space], Q, atol=1e-6, rtol=0)
    assert_exported(pruned, run)


def test_a_call_with_a_second_fit_does_what_such_a_fit_does(fit, model_directory, text_file, tmp_path):
    changes = ["--trainer.max_steps", "3", "--model.compensate", "4", "--second_fit", "{steps: 4, lr_factor: 0.5}"]
    status, run = fit(*changes, "--trainer.callbacks.init_args.controls", "[]")
    assert status == 0
    told = []
    pruned = rotpruner.prune(
        *given(model_directory, text_file),
        steps=3,
        compensate=4,
        second_fit=rotpruner.SecondFit(steps=4, lr_factor=0.5),
        rotations_directory=tmp_path / "kept",
        on_step=lambda step, losses: told.append(step),
        **AS_A_FIT,
    )
    assert told == [*range(7)]
    assert (pruned.origin.steps, pruned.origin.second_steps, pruned.origin.training_tokens) == (7, 4, 7 * 32)
    assert not pruned.origin.learned_masks
    kept = rotpruner.Rotations.from_pretrained(tmp_path / "kept")
    for part, alike in (("first-fit", False), (".", True)):
        learned = rotpruner.Rotations.from_pretrained(run / part / "rotations")
        assert all(torch.allclose(kept[space], Q, atol=1e-6) for space, Q in learned.items()) == alike
    assert_exported(pruned, run)


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "alps"])
def test_a_second_fit_that_stands_still_changes_no_weight(pruner, tokenizer, texts):
    """Its weights have been fitted, also those that a pruner would fit again under given masks."""
    settings = dict(num_sequences=4, seq_len=32, dtype=torch.float32, steps=1, lr=1e-2, pruner=pruner, compensate=2)
    expected = rotpruner.prune(tiny_llama(), tokenizer, texts, **settings)
    still = rotpruner.SecondFit(1, lr_factor=1e-20)
    found = rotpruner.prune(tiny_llama(), tokenizer, texts, second_fit=still, **settings)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, msg=name)


def test_a_notebooks_global_state_changes_nothing(tokenizer, texts):
    settings = dict(num_sequences=4, seq_len=32, dtype=torch.float32, steps=2, lr=1e-2)
    expected = rotpruner.prune(tiny_llama(), tokenizer, texts, **settings)
    with torch.no_grad():
        found = rotpruner.prune(tiny_llama(), tokenizer, texts, gradient_checkpointing=True, **settings)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, msg=name)


def test_prune_learns_and_prunes_in_what_it_has_learned(tokenizer, texts, tmp_path):
    settings = dict(num_sequences=1, seq_len=32, dtype=torch.float32)
    moved = []
    for lr in (1e-2, 1e-4):
        losses, kept = [], tmp_path / f"{lr}"
        found = dict(on_step=lambda step, found, losses=losses: losses.append(found["loss"]), rotations_directory=kept)
        rotpruner.prune(tiny_llama(), tokenizer, texts, steps=8, lr=lr, **settings, **found)
        Q = rotpruner.Rotations.from_pretrained(kept)["residual"]
        moved.append((Q - torch.eye(Q.shape[-1])).norm())
        if lr == 1e-2:
            assert losses[-1] < 0.98 * losses[0]
    assert moved[0] > 10 * moved[1] > 0


def test_objectives_surrogates_and_layer_sparsity_reach_what_learns(tokenizer, texts):
    settings = dict(num_sequences=4, seq_len=32, dtype=torch.float32, steps=3, lr=1e-2)
    losses = {}
    objective = rotpruner.Objective(kl=1, cosine=1)
    rotpruner.prune(
        tiny_llama(),
        tokenizer,
        texts,
        **settings,
        objective=objective,
        on_step=lambda step, found: losses.update(found),
    )
    assert losses["loss"] == pytest.approx(losses["kl"] + losses["cosine"])
    gumbel = rotpruner.Surrogate("gumbel", lr=1.0)
    learned = rotpruner.prune(tiny_llama(), tokenizer, texts, **settings, surrogate=gumbel)
    chosen = rotpruner.prune(tiny_llama(), tokenizer, texts, **settings)
    assert learned.origin.learned_masks
    assert not chosen.origin.learned_masks
    one, other = (linear_modules(model)["model.layers.0.mlp.up_proj"].weight != 0 for model in (learned, chosen))
    assert (one != other).float().mean() > 0.02
    for rotate in ("shared", "none"):
        shared_out = rotpruner.prune(
            tiny_llama(), tokenizer, texts, **settings, rotate=rotate, pattern=0.5, layer_sparsity="owl"
        )
        kept = [sum(int((w != 0).sum()) for w in block.parameters()) for block in shared_out.model.layers]
        assert kept[0] != kept[1]
        assert sparsity_of(shared_out) == pytest.approx(0.5, abs=0.01)


def test_compensate_takes_the_first_sequences(tokenizer, texts, monkeypatch):
    seen = []
    monkeypatch.setattr("rotpruner.oneshot.compensate", lambda pruned, dense, fitted, **_: seen.extend(fitted))
    settings = dict(num_sequences=4, seq_len=32, rotate="none", seed=3)
    rotpruner.prune(tiny_llama(), tokenizer, texts, **settings, compensate=2)
    rows = rotpruner.api._calibration_rows(tokenizer, texts, 4, 32, 3)
    assert torch.equal(torch.cat(seen), rows[:2])


def test_scope_reaches_the_masks(tokenizer, texts):
    settings = dict(num_sequences=2, seq_len=32, pattern=0.5, steps=1)
    for scope, alike in (("row", True), ("layer", False)):
        pruned = rotpruner.prune(tiny_llama(), tokenizer, texts, **settings, scope=scope)
        kept = (pruned.model.layers[0].mlp.up_proj.weight != 0).sum(1)
        assert (len(kept.unique()) == 1) is alike


def test_all_that_takes_long_shows_its_progress(tokenizer, texts):
    seen = {}

    def progress(items, name):
        items = list(items)
        seen[name] = len(items)
        return items

    settings = dict(num_sequences=4, seq_len=32, dtype=torch.float32, steps=3, compensate=2)
    rotpruner.prune(tiny_llama(), tokenizer, texts, **settings, progress=progress)
    assert seen.pop("learning") == 3
    assert seen.pop("pruning block by block") == seen.pop("updating block by block") == 2
    assert len(seen) == 1, "calibration"


def test_batches_are_rows_by_their_numbers():
    """By which the teacher's states are found again."""
    rows = torch.arange(5)[:, None] + 100 * torch.arange(3)
    order = passes(rows, 0)
    batches = [next(order) for _ in range(10)]
    assert all(torch.equal(ids, rows[index]) for ids, index in batches)
    assert sorted(index.item() for _, index in batches) == sorted([*range(5)] * 2)
    assert [index.item() for _, index in batches] != [*range(5)] * 2


def test_other_placements_and_orders_reach_the_pruned_model(tokenizer, texts, tmp_path):
    settings = dict(steps=0, num_sequences=2, seq_len=32, dtype=torch.float32)
    pruned = rotpruner.prune(tiny_llama(), tokenizer, texts, **{**settings, "steps": 1}, rotate="per_block")
    assert online_cost(pruned).flops > 0
    rotpruner.prune(
        tiny_llama(), tokenizer, texts, spaces=("residual", "mlp"), rotations_directory=tmp_path / "orders", **settings
    )
    order = rotpruner.Rotations.from_pretrained(tmp_path / "orders")["mlp"]
    assert not torch.equal(order, torch.arange(order.shape[-1]).expand_as(order))


def test_prune_without_spaces_is_the_pruner_alone(tokenizer, texts):
    model = tiny_llama(tie_word_embeddings=True)
    pruned = rotpruner.prune(model, tokenizer, texts, spaces=(), num_sequences=4, seq_len=32, pattern=0.75)
    assert sparsity_of(pruned) == 0.75
    assert pruned.config.tie_word_embeddings
    same = rotpruner.prune(model, tokenizer, texts, rotate="none", num_sequences=4, seq_len=32, pattern=0.75)
    assert all(torch.equal(same.state_dict()[name], weight) for name, weight in pruned.state_dict().items())


@pytest.mark.parametrize("pattern", ["2:4", "slice:0.25"])
def test_kept_rotations_prune_to_the_same_model(pattern, tokenizer, texts, tmp_path):
    settings = dict(pattern=pattern, num_sequences=4, seq_len=32, dtype=torch.float32, lr=1e-2)
    directory = tmp_path / "rotations"
    learned = rotpruner.prune(tiny_llama(), tokenizer, texts, steps=3, rotations_directory=directory, **settings)
    rotations = rotpruner.Rotations.from_pretrained(directory)
    again = rotpruner.prune(tiny_llama(), tokenizer, texts, rotate=rotations, steps=0, **settings)
    for name, weight in learned.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-5, rtol=1e-5)
    with pytest.raises(rotpruner.InputError, match="exists already"):
        rotpruner.prune(tiny_llama(), tokenizer, texts, rotations_directory=directory, **settings)
    with pytest.raises(rotpruner.InputError, match="another model"):
        rotpruner.prune(tiny_llama(num_hidden_layers=1), tokenizer, texts, rotate=rotations, **settings)
    if "value_heads" in rotations:
        with pytest.raises(rotpruner.InputError, match="residual directions only"):
            rotpruner.prune(tiny_llama(), tokenizer, texts, rotate=rotations, **{**settings, "pattern": "slice:0.25"})


def test_a_pruner_of_ones_own_is_named_by_its_import_path(tokenizer, texts):
    own = rotpruner.prune(
        tiny_llama(), tokenizer, texts, pruner="test_api.RelativeToColumn", spaces=(), num_sequences=4, seq_len=32
    )
    expected = tiny_llama().model.layers[0].mlp.up_proj.weight
    kept = parse_pattern("2:4").mask(RelativeToColumn().saliency(expected, None))
    assert torch.equal(own.model.layers[0].mlp.up_proj.weight != 0, kept)
    assert not torch.equal(kept, parse_pattern("2:4").mask(expected.abs())), "magnitude's masks would do as well"


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class Own(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_model_class_that_transformers_does_not_know_is_pruned(tokenizer, texts, monkeypatch):
    monkeypatch.setitem(_FAMILIES, "own_llama", LLAMA)
    settings = tiny_llama().config.to_dict()
    settings.pop("model_type")
    model = Own(OwnConfig(**settings))
    pruned = rotpruner.prune(model, tokenizer, texts, steps=1, num_sequences=2, seq_len=16, dtype=torch.float32)
    assert sparsity_of(pruned) == 0.5


def test_given_rotations_are_used_whatever_spaces_say(tokenizer, texts):
    rotations = rotpruner.Rotations.of(random_rotations(tiny_llama().config, ["residual"], 0), tiny_llama())
    pruned = rotpruner.prune(
        tiny_llama(), tokenizer, texts, rotate=rotations, spaces=(), steps=0, num_sequences=2, seq_len=32
    )
    assert pruned.origin.spaces == ("residual",)


@pytest.mark.parametrize(
    ("spaces", "basis"), [(("residual", "mlp"), "permutation"), (("residual", "value_heads"), "none")]
)
def test_the_origin_tells_what_no_steps_have_done(spaces, basis, tokenizer, texts):
    pruned = rotpruner.prune(tiny_llama(), tokenizer, texts, spaces=spaces, steps=0, num_sequences=4, seq_len=32)
    assert pruned.origin.basis == basis
    assert pruned.origin.spaces == (() if basis == "none" else spaces)


def test_learning_in_16_bits_keeps_the_rotary_frequencies(tokenizer, texts, monkeypatch):
    bases = []

    def spied(base, *given, **settings):
        bases.append(base)
        return RotatedModel(base, *given, **settings)

    monkeypatch.setattr(import_module("rotpruner.pruning"), "RotatedModel", spied)
    model = tiny_llama(tie_word_embeddings=True)
    rotpruner.prune(model, tokenizer, texts, steps=1, num_sequences=2, seq_len=32, dtype=torch.bfloat16)
    (base,) = bases
    assert {parameter.dtype for parameter in base.model.layers.parameters()} == {torch.bfloat16}
    assert torch.equal(base.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
