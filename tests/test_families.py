"""Every family: rotations of its spaces leave the function alone, learned and merged."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import toy_family
import transformers
from tiny_models import GATED, MODELS, config_of, exact, rotated_model, tiny, tiny_ids
from transformers import AutoModelForCausalLM

from rotpruner.errors import InputError
from rotpruner.families import SPACES, available_spaces, family_of
from rotpruner.fusion import fuse_norms
from rotpruner.layout import module_at
from rotpruner.loading import check_pattern, meta_model
from rotpruner.measures import sparsity_of
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.orthogonal import constraint_error, orthogonality_error
from rotpruner.patterns import parse_pattern
from rotpruner.placements import turns
from rotpruner.pruners import resolve_pruner
from rotpruner.rotations import LearnedRotations, check_rotation, merge_rotations, random_rotations, space_constraint


@pytest.fixture(autouse=True)
def _softmax_in_its_own_dtype(monkeypatch):
    """Eager attention, the only one with Gemma-2's caps, asks for a softmax in float32."""
    softmax = F.softmax

    def in_float64(x, dim, dtype=None, **options):
        return softmax(x, dim, dtype=x.dtype if x.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(F, "softmax", in_float64)


@pytest.fixture
def ids():
    return tiny_ids(2)


def draw(config, spaces):
    return random_rotations(config, spaces, seed=3, dtype=torch.float64)


@torch.no_grad()
def largest_difference(model, spaces, ids) -> float:
    """Of the logits after random rotations, merged and online."""
    expected = model(input_ids=ids).logits
    rotations = draw(model.config, spaces)
    merged = copy.deepcopy(model)
    merge_rotations(merged, rotations)
    weights = [dict(each.named_parameters()) for each in (model, merged)]
    assert any(not torch.allclose(weights[0][path], weight) for path, weight in weights[1].items())
    online = rotated_model(copy.deepcopy(model), spaces)
    online.rotations.restart(rotations)
    results = merged(input_ids=ids).logits, online(ids, pruned=False).logits
    with online.dense() as dense:
        results = *results, dense(input_ids=ids).logits
    return max((logits - expected).abs().max().item() for logits in results)


# -- the function stays ----------------------------------------------------------------------------


def test_rotations_leave_the_logits_of_every_family_alone(ids, capsys):
    columns = (*SPACES, "all of them")
    lines = [f"{'largest logit difference, fp64':32}" + "".join(f"{column:>14}" for column in columns)]
    worst = 0.0
    for name, (_, _, spaces) in MODELS.items():
        model = exact(tiny(name))
        assert available_spaces(model.config) == spaces
        line = f"{name:32}"
        for column in columns:
            if column in SPACES and column not in spaces:
                line += f"{'no such space':>14}"
                continue
            difference = largest_difference(model, (column,) if column in SPACES else spaces, ids)
            worst = max(worst, difference)
            line += f"{difference:14.1e}"
        lines.append(line)
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert worst <= 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_merged_models_load_plainly_in_their_own_class(name, ids, tmp_path):
    model = tiny(name)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    spaces = available_spaces(model.config)
    merge_rotations(model, random_rotations(model.config, spaces, seed=3))
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert (loaded.eval()(input_ids=ids).logits - expected).abs().max() < 1e-4
    is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.config.tie_word_embeddings == is_tied == (tied and "residual" not in spaces)


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_rounds_every_weight_once(name):
    narrow = tiny(name).bfloat16()
    wide = copy.deepcopy(narrow).double()
    for model in (narrow, wide):
        merge_rotations(model, draw(model.config, available_spaces(model.config)))
    expected = dict(wide.named_parameters())
    for path, weight in narrow.named_parameters():
        assert torch.equal(weight, expected[path].bfloat16()), path


@pytest.mark.parametrize("name", ["llama-2", "gemma", "opt"])
def test_fusing_leaves_gains_of_one_and_can_be_repeated(name, ids):
    model = exact(tiny(name))
    expected = model(input_ids=ids).logits
    fuse_norms(model)
    once = copy.deepcopy(model.state_dict())
    fuse_norms(model)
    assert all(torch.equal(tensor, once[path]) for path, tensor in model.state_dict().items())
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-9
    family = family_of(model.config)
    assert (module_at(model, family.final_norm).weight + family.gain_offset == 1).all()
    for spec in family.linears:
        if spec.norm:
            norm = module_at(model, f"{family.blocks}.0.{spec.norm}")
            assert (norm.weight + family.gain_offset == 1).all()
            assert (getattr(norm, "bias", None) is None) or not norm.bias.any()


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_name", ["cayley", "exponential"])
@pytest.mark.parametrize("name", MODELS)
def test_learned_rotations_stay_inside_and_equal_the_merged_pruned_model(name, map_name, ids):
    plain = exact(tiny(name))
    base, spaces = copy.deepcopy(plain), available_spaces(plain.config)
    online = rotated_model(base, spaces, orthogonal_map=map_name, start="random")
    rotations = online.rotations
    rotations.restart(draw(plain.config, spaces))
    online.calibrate(ids.split(1))
    optimizer = torch.optim.Adam(rotations.parameters(), lr=1e-2)
    for _ in range(2):
        online.refresh_masks()
        online.loss(ids)["loss"].backward()
        for space, matrices in rotations.spaces.items():
            assert matrices.turn.grad.isfinite().all(), space
            assert matrices.turn.grad.any(), space
        optimizer.step()
        optimizer.zero_grad()
    learned = {space: Q.detach() for space, Q in rotations().items()}
    for space, Q in learned.items():
        assert orthogonality_error(Q) < 1e-12
        assert constraint_error(Q, space_constraint(plain.config, space)) < 1e-12
        check_rotation(plain.config, space, Q.float() if turns(space) else Q)
    if "residual" in learned and name.startswith("opt"):
        assert (learned["residual"].sum(-2) - 1).abs().max() < 1e-12

    online.refresh_masks()
    merge_rotations(plain, learned)
    with torch.no_grad():
        for linear in online.linears:
            module_at(plain, linear.place.name).weight.mul_(linear.mask)
        assert sparsity_of(plain) == 0.5
        assert (online(ids).logits - plain(input_ids=ids).logits).abs().max() < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_the_objective_sees_the_logits_of_the_model(name, ids):
    base = exact(tiny(name))
    with torch.no_grad():
        logits = base(input_ids=ids).logits[:, :-1]
    objective = Objective(cross_entropy=1.0, kl=0.0)
    online = rotated_model(base, ["value_heads"], pruner="magnitude", pattern="0.0", objective=objective)
    online.refresh_masks()  # which keep all
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(online.loss(ids)["loss"], expected)


@pytest.mark.parametrize("name", ["gemma-2", "gemma-3", "opt, post-norm"])
def test_pruning_works_where_the_residual_stream_cannot_rotate(name, ids):
    for spaces in ((), available_spaces(config_of(name))):
        model = tiny(name)
        rotations = random_rotations(model.config, spaces, seed=0)
        prune_model(model, resolve_pruner("wanda"), parse_pattern("2:4"), ids.split(1), rotations)
        assert sparsity_of(model) == 0.5
        assert model(input_ids=ids).logits.isfinite().all()
        assert model.config.tie_word_embeddings


def test_a_final_norm_that_cannot_be_folded_is_refused_before_anything_changes(ids):
    model = tiny("opt", tie_word_embeddings=True)
    norm = model.model.decoder.final_layer_norm
    with torch.no_grad():
        norm.weight[5] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="final_layer_norm has a gain of 0"):
        rotated_model(model, ["residual"])
    with pytest.raises(InputError, match="final_layer_norm has a gain of 0"):
        merge_rotations(model, random_rotations(model.config, ["residual"], 0))
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        norm.bias[5] = 0
    assert largest_difference(exact(model), ["residual"], ids) < 1e-9


# -- from outside, and at full size ----------------------------------------------------------------


def test_a_family_from_outside_the_package_keeps_its_function(ids, tmp_path):
    model = toy_family.ToyForCausalLM(toy_family.ToyConfig(**GATED)).eval()
    assert largest_difference(exact(copy.deepcopy(model)), SPACES, ids) < 1e-9
    expected = model(input_ids=ids).logits
    prune_model(model, resolve_pruner("wanda"), parse_pattern("0.0"), (), random_rotations(model.config, SPACES, 0))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is toy_family.ToyForCausalLM
    assert (loaded(input_ids=ids).logits - expected).abs().max() < 1e-4


def opt_size(hidden: int, layers: int, heads: int):
    return transformers.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads
    )


def gated_size(kind: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more):
    return getattr(transformers, kind + "Config")(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        **more,
    )


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (opt_size(768, 12, 12), 125),
        (opt_size(2048, 24, 32), 1316),
        (gated_size("Llama", 4096, 11008, 32, 32, 32, 32000), 6738),
        (gated_size("Llama", 4096, 14336, 32, 32, 8, 128256), 8030),
        (gated_size("Qwen2", 3584, 18944, 28, 28, 4, 152064), 7616),
        (gated_size("Qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128), 8191),
    ],
    ids=["opt-125m", "opt-1.3b", "llama-2-7b", "llama-3-8b", "qwen2-7b", "qwen3-8b"],
)
def test_full_sizes_have_the_published_parameters_and_take_2_4(config, millions):
    model = meta_model(config)
    check_pattern(model, parse_pattern("2:4"))
    assert round(model.num_parameters() / 1e6) == millions
    with torch.device("meta"):
        learned = LearnedRotations(config, available_spaces(config))
    width = config.hidden_size - (config.model_type == "opt")
    assert learned.spaces["residual"].turn.numel() == width * (width - 1) // 2
