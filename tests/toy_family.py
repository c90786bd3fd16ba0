"""A model family from outside the package: a model of one's own, registered with transformers, and its table."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rotpruner.families import Family, LinearSpec, register_family


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)

register_family(
    Family(
        model_types=("toy",),
        linears=(
            LinearSpec("self_attn.q_proj", reads="residual", writes="query_key", norm="input_layernorm"),
            LinearSpec("self_attn.k_proj", reads="residual", writes="query_key", norm="input_layernorm"),
            LinearSpec("self_attn.v_proj", reads="residual", writes="value_heads", norm="input_layernorm"),
            LinearSpec("self_attn.o_proj", reads="value_heads", writes="residual"),
            LinearSpec("mlp.gate_proj", reads="residual", writes="mlp", norm="post_attention_layernorm"),
            LinearSpec("mlp.up_proj", reads="residual", writes="mlp", norm="post_attention_layernorm"),
            LinearSpec("mlp.down_proj", reads="mlp", writes="residual"),
        ),
    )
)
