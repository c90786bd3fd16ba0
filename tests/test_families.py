"""Every family: rotations of its spaces leave the function alone, what it does not have is refused with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import toy_family
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from rotpruner.artifacts import load_rotations, save_rotations
from rotpruner.errors import InputError
from rotpruner.families import SPACES, available_spaces, check_space, family_of, module_at
from rotpruner.fusion import fuse_norms
from rotpruner.loading import check_pattern, meta_model
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model, sparsity_of
from rotpruner.orthogonal import OrthogonalMatrices, constraint_error, orthogonality_error, random_orthogonal
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import (
    LearnedRotations,
    check_rotation,
    merge_rotations,
    random_rotations,
    space_constraint,
)

# Two query heads to a key-value head, and heads × head_dim ≠ hidden_size.
GATED = dict(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=32,
    initializer_range=0.1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
OPT = dict(
    hidden_size=24,
    ffn_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=32,
    init_std=0.1,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
SOFTCAPS = dict(final_logit_softcapping=3.0, attn_logit_softcapping=5.0)

#: Name → class of the model, its config and the spaces that it has.
MODELS = {
    "llama-2": ("Llama", {**GATED, "num_key_value_heads": 4}, SPACES),
    "llama-3": ("Llama", dict(**GATED, rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True), SPACES),
    "smollm2": ("Llama", dict(**GATED, tie_word_embeddings=True), SPACES),
    "smollm3": ("SmolLM3", dict(**GATED, no_rope_layers=[1, 0]), SPACES),
    "mistral": ("Mistral", dict(**GATED, sliding_window=4), SPACES),
    "qwen2": ("Qwen2", dict(**GATED, use_sliding_window=True, **SLIDING, tie_word_embeddings=True), SPACES),
    "qwen3": ("Qwen3", dict(**GATED, tie_word_embeddings=True), ("residual", "value_heads")),
    "gemma": ("Gemma", GATED, SPACES),
    "gemma-2": ("Gemma2", {**GATED, **SLIDING, **SOFTCAPS}, ("value_heads", "query_key")),
    "gemma-3": ("Gemma3", {**GATED, **SLIDING, "query_pre_attn_scalar": 16}, ("value_heads",)),
    "opt": ("OPT", OPT, SPACES),
    "opt, plain norms": ("OPT", dict(**OPT, layer_norm_elementwise_affine=False, enable_bias=False), SPACES),
    "opt, post-norm": (
        "OPT",
        dict(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
        ("value_heads", "query_key"),
    ),
}


def config_of(name: str):
    kind, settings, _ = MODELS[name]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    return getattr(transformers, kind + suffix)(**copy.deepcopy(settings))


@torch.no_grad()
def tiny(name: str):
    """A random model with random norm gains and biases, in evaluation mode."""
    config = config_of(name)
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[name][0] + "ForCausalLM")(config).eval()
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            parameter.normal_(std=0.2)
        elif "norm" in path:
            parameter.uniform_(0.5, 2.0).sub_(family_of(config).gain_offset)
    return model


class OffsetRMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with Gemma's gain of 1 + w."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


def exact(model):
    """The model in float64, its norms by torch's own; stock RMS norms compute in float32 whatever the dtype."""
    model = model.double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            kind = OffsetRMSNorm if type(module).__name__.startswith("Gemma") else nn.RMSNorm
            norm = kind(len(module.weight), eps=eps, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    return model


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small lose more to the waiting of threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _softmax_in_its_own_dtype(monkeypatch):
    """Eager attention, the only one with Gemma-2's caps, asks for a softmax in float32."""
    softmax = F.softmax

    def in_float64(x, dim, dtype=None, **options):
        return softmax(x, dim, dtype=x.dtype if x.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(F, "softmax", in_float64)


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def rotated_model(base, spaces, dtype=torch.float64, **settings) -> RotatedModel:
    rotations = LearnedRotations(base.config, spaces).to(dtype)
    return RotatedModel(base, rotations, resolve_pruner("wanda"), parse_pattern("2:4"), **settings)


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
    rotations = LearnedRotations(base.config, spaces, map_name, start="random").double()
    online = RotatedModel(base, rotations, resolve_pruner("wanda"), parse_pattern("2:4"), objective=Objective(kl=1.0))
    rotations.restart(draw(plain.config, spaces))
    online.calibrate(ids.split(1))
    optimizer = torch.optim.Adam(rotations.parameters(), lr=1e-2)
    for _ in range(2):
        online.refresh_masks()
        online.loss(ids)["loss"].backward()
        for space, matrices in rotations.spaces.items():
            assert matrices.skew.grad.isfinite().all(), space
            assert matrices.skew.grad.any(), space
        optimizer.step()
        optimizer.zero_grad()
    learned = {space: Q.detach() for space, Q in rotations().items()}
    for space, Q in learned.items():
        assert orthogonality_error(Q) < 1e-12
        assert constraint_error(Q, space_constraint(plain.config, space)) < 1e-12
        check_rotation(plain.config, space, Q.float())
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
    online = rotated_model(base, ["value_heads"], objective=Objective(cross_entropy=1.0, kl=0.0))
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


# -- constraints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("map_name", ["cayley", "exponential"])
@pytest.mark.parametrize("constraint", ["none", "fixes_ones", "planes"])
def test_maps_and_draws_keep_their_constraint(constraint, map_name):
    matrices = OrthogonalMatrices(2, 3, 6, map_name, constraint).double()
    torch.testing.assert_close(matrices(), torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6))
    assert matrices.skew[0, 0].numel() == {"none": 15, "fixes_ones": 10, "planes": 3}[constraint]
    drawn = random_orthogonal(2, 3, 6, torch.Generator().manual_seed(0), constraint, torch.float64)
    matrices.restart(drawn)
    with torch.no_grad():
        matrices.skew.normal_()
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
def test_rotations_that_would_change_the_function_are_refused(name, space, tmp_path):
    model = tiny(name)
    good = random_rotations(model.config, [space], seed=0)
    bad = {space: random_orthogonal(*good[space].shape[:3], torch.Generator().manual_seed(0))}
    before = copy.deepcopy(model.state_dict())
    for use in (
        lambda rotations: LearnedRotations(model.config, [space]).restart(rotations),
        lambda rotations: merge_rotations(model, rotations),
        lambda rotations: load_rotations(saved(rotations, model, tmp_path), model),
    ):
        with pytest.raises(InputError, match=rf"'{space}' would change what this {model.config.model_type} model"):
            use(bad)
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
    assert torch.equal(load_rotations(saved(good, model, tmp_path), model)[space], good[space])


def saved(rotations, model, directory):
    save_rotations(rotations, model, directory, replace=True)
    return directory


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
        (config_of("opt, post-norm"), "residual", "stands behind a sum"),
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
        with pytest.raises(
            InputError,
            match=f"space '{space}' does not exist in this .*{reason}.*; it has value_heads|"
            f"space '{space}' does not exist in this .*{reason}.*; it has residual",
        ):
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


def test_a_final_norm_that_cannot_be_folded_is_refused_before_anything_changes(ids):
    model = tiny("opt")
    norm = model.model.decoder.final_layer_norm
    with torch.no_grad():
        norm.weight[5] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="final_layer_norm has a gain of 0"):
        rotated_model(model, ["residual"], torch.float32)
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
    with torch.no_grad():
        norm.bias[5] = 0
    assert largest_difference(exact(model), ["residual"], ids) < 1e-9


# -- from outside, and at full size ----------------------------------------------------------------


def test_a_family_from_outside_the_package(ids, tmp_path):
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
def test_full_sizes_on_the_meta_device(config, millions):
    model = meta_model(config)
    check_pattern(model, parse_pattern("2:4"))
    assert round(model.num_parameters() / 1e6) == millions
    with torch.device("meta"):
        learned = LearnedRotations(config, available_spaces(config))
    width = config.hidden_size - (config.model_type == "opt")
    assert learned.spaces["residual"].skew.numel() == width * (width - 1) // 2
