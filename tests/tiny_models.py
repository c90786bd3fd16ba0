"""A tiny random model of every family, what makes it exact and what it reads."""

from __future__ import annotations

import copy
from types import MappingProxyType

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from rotpruner.allotment import Allotment
from rotpruner.families import SPACES, family_of
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import LearnedRotations

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
    "qwen3": ("Qwen3", dict(**GATED, tie_word_embeddings=True), ("residual", "value_heads", "mlp")),
    "gemma": ("Gemma", GATED, SPACES),
    "gemma-2": ("Gemma2", {**GATED, **SLIDING, **SOFTCAPS}, ("value_heads", "query_key", "mlp")),
    "gemma-3": ("Gemma3", {**GATED, **SLIDING, "query_pre_attn_scalar": 16}, ("value_heads", "mlp")),
    "opt": ("OPT", OPT, SPACES),
    "opt, plain norms": (
        "OPT",
        dict(**OPT, layer_norm_elementwise_affine=False, enable_bias=False, layerdrop=0.5, attention_dropout=0.5),
        SPACES,
    ),
    "opt, post-norm": (
        "OPT",
        dict(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
        ("value_heads", "query_key", "mlp"),
    ),
}


def config_of(name: str, **overrides):
    kind, settings, _ = MODELS[name]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    return getattr(transformers, kind + suffix)(**copy.deepcopy({**settings, **overrides}))


@torch.no_grad()
def tiny(name: str, **overrides):
    """A random model with random norm gains and biases, in evaluation mode."""
    config = config_of(name, **overrides)
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


def rotated_model(
    base,
    spaces=("residual", "value_heads"),
    *,
    pruner="wanda",
    pattern="2:4",
    orthogonal_map="cayley",
    start="identity",
    placement="shared",
    layer_sparsity="uniform",
    exceptions=MappingProxyType({}),
    **settings,
) -> RotatedModel:
    """A model under learnable rotations, which are in float64 if it is."""
    rotations = LearnedRotations(base.config, spaces, orthogonal_map, start, placement=placement)
    if base.dtype == torch.float64:
        rotations = rotations.double()
    allotment = Allotment(parse_pattern(pattern), layer_sparsity, exceptions)
    return RotatedModel(base, rotations, resolve_pruner(pruner), allotment, **settings)


def calibrated_in(rotations, dense, ids, **settings) -> RotatedModel:
    """A copy of a model under the given rotations, its statistics gathered, as learning on begins."""
    rotated = rotated_model(copy.deepcopy(dense), list(rotations), **settings)
    rotated.rotations.restart(rotations)
    rotated.calibrate(ids.split(1))
    return rotated


def byte_bpe(text: str, size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many entries, cut into words like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_ids(rows: int) -> torch.Tensor:
    """Sequences of 12 tokens that all tiny models know, none of them special."""
    return torch.randint(3, 64, (rows, 12), generator=torch.Generator().manual_seed(1))
