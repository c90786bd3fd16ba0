"""Spaces: rotations keep their constraints, and what a model does not have is refused with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import OPT, config_of, tiny

from rotpruner.errors import InputError
from rotpruner.families import available_spaces, check_space, family_of
from rotpruner.orthogonal import OrthogonalMatrices, constraint_error, orthogonality_error, random_orthogonal
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import LearnedRotations, merge_rotations, random_rotations

# -- constraints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("map_name", ["cayley", "exponential"])
@pytest.mark.parametrize("constraint", ["none", "fixes_ones", "planes"])
def test_maps_and_draws_keep_their_constraint(constraint, map_name):
    matrices = OrthogonalMatrices(2, 3, 6, map_name, constraint).double()
    torch.testing.assert_close(matrices(), torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6))
    assert matrices.turn[0, 0].numel() == {"none": 15, "fixes_ones": 10, "planes": 3}[constraint]
    drawn = random_orthogonal(2, 3, 6, torch.Generator().manual_seed(0), constraint, torch.float64)
    matrices.restart(drawn)
    with torch.no_grad():
        matrices.turn.normal_()
    for Q in (drawn, matrices()):
        assert orthogonality_error(Q) < 1e-12
        assert constraint_error(Q, constraint) < 1e-12
        ones = torch.ones(6, dtype=torch.float64)
        assert torch.allclose(ones @ Q, ones) == (constraint == "fixes_ones")
        turned = torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.diag(torch.arange(1.0, 4.0))).double()
        assert torch.allclose(turned @ Q, Q @ turned) == (constraint == "planes")
    assert not torch.allclose(matrices(), drawn)


def test_draws_in_planes_are_turns_by_any_angle():
    Q = random_orthogonal(1, 500, 4, torch.Generator().manual_seed(0), "planes", torch.float64)
    assert (torch.linalg.det(Q) - 1).abs().max() < 1e-12
    angles = torch.atan2(Q[..., 0, 2], Q[..., 0, 0])
    assert angles.histc(4, -torch.pi, torch.pi).min() > 90


@pytest.mark.parametrize(("name", "space"), [("opt", "residual"), ("llama-2", "query_key")])
def test_rotations_that_would_change_the_function_are_refused(name, space):
    model = tiny(name)
    good = random_rotations(model.config, [space], seed=0)
    bad = {space: random_orthogonal(*good[space].shape[:3], torch.Generator().manual_seed(0))}
    before = copy.deepcopy(model.state_dict())
    for use in (
        lambda rotations: LearnedRotations(model.config, [space]).restart(rotations),
        lambda rotations: merge_rotations(model, rotations),
        lambda rotations: Rotations.of(rotations, model).check_model(model),
        lambda rotations: Rotations.of(rotations, model).merge(model),
    ):
        with pytest.raises(InputError, match=rf"'{space}' would change what this {model.config.model_type} model"):
            use(bad)
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
    Rotations.of(good, model).check_model(model)


def test_rotations_that_are_none_are_refused():
    config = config_of("llama-2")
    learned = LearnedRotations(config, ["residual"])
    for bad, reason in ((torch.zeros(1, 1, 24, 24), "not orthogonal"), (torch.eye(8)[None, None], "have shape")):
        with pytest.raises(InputError, match=reason):
            learned.restart({"residual": bad})
    with pytest.raises(InputError, match="spaces"):
        learned.restart({"value_heads": torch.eye(8)})


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "space", "reason"),
    [
        (config_of("opt, post-norm"), "residual", "stands after a sum"),
        (transformers.OPTConfig(**OPT, word_embed_proj_dim=16), "residual", "width 16 are projected to 24"),
        (transformers.OPTConfig(**OPT, _remove_final_layer_norm=True), "residual", "no norm"),
        (transformers.OPTConfig(**OPT, enable_bias=False), "residual", "no bias"),
        (config_of("gemma-2"), "residual", "norms stand between"),
        (config_of("gemma-3"), "residual", "norms stand between"),
        (config_of("gemma-3"), "query_key", "norms of their own"),
        (config_of("qwen3"), "query_key", "norms of their own"),
        (
            transformers.LlamaConfig(
                rope_parameters=dict(rope_theta=1e4, rope_type="default", partial_rotary_factor=0.5)
            ),
            "query_key",
            "a share of 0.5",
        ),
    ],
)
def test_a_missing_space_is_refused_with_the_reason(config, space, reason):
    for ask in (check_space, lambda config, space: LearnedRotations(config, [space])):
        with pytest.raises(InputError, match=f"space '{space}' does not exist in this .*{reason}.*; it has "):
            ask(config, space)
    assert space not in available_spaces(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.MixtralConfig(), "mixture of experts"),
        (transformers.Qwen3MoeConfig(), "mixture of experts"),
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.Gemma3Config(), "multimodal"),
        (transformers.GPT2Config(), "unknown model family 'gpt2'; known are gemma, .*register_family"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(config, reason):
    with pytest.raises(InputError, match=reason):
        family_of(config)
