"""What the Python door refuses, and when."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from conftest import tiny_llama
from tiny_models import rotated_model, tiny

import rotpruner
from rotpruner.pruners import resolve_pruner
from rotpruner.rotations import random_rotations


def test_learning_that_diverges_at_its_last_step_leaves_no_rotations_behind(tokenizer, texts, tmp_path, monkeypatch):
    def diverge(rotated, *_, **__):
        for parameter in rotated.rotations.parameters():
            parameter.data.fill_(math.nan)

    monkeypatch.setattr("rotpruner.pruning.learn", diverge)
    settings = dict(num_sequences=2, seq_len=32, steps=3, rotations_directory=tmp_path / "rotations")
    with pytest.raises(rotpruner.InputError, match="learning has diverged"):
        rotpruner.prune(tiny_llama(), tokenizer, texts, **settings)
    assert not (tmp_path / "rotations").exists()


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        (dict(pattern="5:4"), "5:4"),
        (dict(num_sequences=0), "num_sequences 0"),
        (dict(num_sequences=10_000), "10000"),
        (dict(seq_len=1), "seq_len 1"),
        (dict(spaces=("attic",)), "attic"),
        (dict(spaces="residual"), r"\['residual'\]"),
        (dict(steps=-1), "steps -1"),
        (dict(lr=-1.0), "lr -1.0"),
        (dict(spaces=("residual", "mlp"), pattern=0.5), "leave mlp out"),
        (dict(pruner="banana"), "banana"),
        (dict(pruner=type(resolve_pruner("magnitude"))), "call the class"),
        (dict(pruner="rotpruner.pruners.Pruner"), "cannot be made: Can.t instantiate"),
        (dict(rotate="banana"), "banana"),
        (dict(rotate="none", rotations_directory="kept"), "kept"),
        (dict(rotate="per_layer", spaces=("value_heads",)), "add residual"),
        (dict(dtype=torch.float16), "float16"),
        (dict(layer_sparsity="owl"), "owl"),
        (dict(second_fit=rotpruner.SecondFit(2)), "compensate is 0"),
        (dict(second_fit=rotpruner.SecondFit(2), compensate=2, rotate="none"), "nothing rotates"),
        (
            dict(second_fit=rotpruner.SecondFit(2), compensate=2, surrogate=rotpruner.Surrogate("gumbel")),
            "gumbel has none",
        ),
        (
            dict(second_fit=rotpruner.SecondFit(2), compensate=2, surrogate=rotpruner.Surrogate("sigmoid")),
            "keeps the masks, and surrogate sigmoid",
        ),
        (
            dict(second_fit=rotpruner.SecondFit(2), compensate=2, objective=rotpruner.Objective(lost_mass=1)),
            "keeps the masks, and objective lost_mass",
        ),
        (dict(scope="layer"), "pattern 2:4 has none: leave scope layer out"),
        (dict(surrogate=rotpruner.Surrogate("gumbel"), pattern=0.5), "gumbel"),
        (dict(objective=rotpruner.Objective(entropy=1), pattern="slice:0.25"), "entropy"),
    ],
)
def test_prune_refuses(changes, mention, tokenizer, texts):
    with pytest.raises(rotpruner.InputError, match=mention):
        rotpruner.prune(tiny_llama(), tokenizer, texts, **{"num_sequences": 2, "seq_len": 32, **changes})


def test_spaces_that_a_model_does_not_have_are_refused_before_the_work(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(import_module("rotpruner.api"), "_calibration_rows", lambda *_: pytest.fail("read the texts"))
    with pytest.raises(rotpruner.InputError, match="gemma2"):
        rotpruner.prune(tiny("gemma-2"), tokenizer, texts, num_sequences=2, seq_len=16)
    model = tiny_llama()
    orders = rotpruner.Rotations.of(random_rotations(model.config, ["mlp"], 0), model)
    with pytest.raises(rotpruner.InputError, match=r"none of the spaces .* to learn"):
        rotpruner.prune(model, tokenizer, texts, rotate=orders, num_sequences=2, seq_len=16)


def test_one_string_is_no_list_of_texts(tokenizer, texts):
    with pytest.raises(rotpruner.InputError, match=r"as in \[text\]"):
        rotpruner.prune(tiny_llama(), tokenizer, texts[0], num_sequences=2, seq_len=32)


def test_adam_does_not_learn_points_of_the_manifold():
    rotated = rotated_model(tiny_llama(), pruner="magnitude", orthogonal_map="manifold")
    with pytest.raises(rotpruner.InputError, match="manifold"):
        rotpruner.learn(rotated, [], steps=1)
    with pytest.raises(rotpruner.InputError, match="refresh_every 0"):
        rotpruner.learn(rotated_model(tiny_llama(), pruner="magnitude"), [], steps=1, refresh_every=0)
