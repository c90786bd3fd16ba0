"""What the forward pass of decoder blocks leaves for the backward pass; symbols are those of `planning.sizes`."""

from __future__ import annotations

from experiments.planning.sizes import Setup, Term, summed
from rotpruner.families import family_of
from rotpruner.layout import module_at
from rotpruner.placements import head_dim, key_value_heads, mlp_width

_COPIES = "Σ copies · O · I · s"
_WHICH = ": masked, by head, between two sides"


def rotated_weights(setup: Setup) -> tuple[int, str]:
    """Bytes of rotated weights that the backward pass through one block needs, and their formula.

    Each linear keeps its masked weight, a permuted copy if it reads rotated heads, and what lies between if both
    of its sides rotate, with Q_B in the model's precision if that is the residual's.
    """
    d, entries, parts = setup.config.hidden_size, 0, []
    for place, outputs, inputs in setup.block:
        reads, writes = place.spec.reads in setup.spaces, place.spec.writes in setup.spaces
        by_head = reads and place.spec.reads != "residual"
        copies = 1 + by_head + (reads and writes) + setup.keeps_unmasked
        entries += copies * outputs * inputs
        parts.append(f"{copies} · {outputs} · {inputs}")
        if reads and place.spec.writes == "residual" and writes and setup.s < setup.r:
            entries += d**2
            parts.append(f"{d}²")
    return entries * setup.s, f"{summed(parts)} · {setup.s}"


def block_activations(setup: Setup) -> tuple[int, str]:
    """Bytes of activations that the backward pass through one block needs, for one token, and their formula."""
    config, s = setup.config, setup.s
    d, h, e = config.hidden_size, config.num_attention_heads, head_dim(config)
    g, f = key_value_heads(config), mlp_width(config)
    family = family_of(config)
    block = module_at(setup.model, f"{family.blocks}.0")
    names = [type(module).__name__ for module in block.modules()]
    # RMSNorm of transformers keeps its input in float32; torch's LayerNorm keeps it as it is.
    copies = sum(s if name == "LayerNorm" else max(4, s) for name in names if name.endswith("Norm"))
    outputs = len({spec.norm for spec in family.linears if spec.norm})
    # Gated: gate, its activation, up, their product. Plain: what the activation gives, which is what ReLU keeps.
    mlp = 4 if sum(spec.writes == "mlp" for spec in family.linears) == 2 else 1
    size = mlp * f * s + d * copies + outputs * d * s + (2 * h + 2 * g) * e * s + 4 * h
    formula = f"{mlp} f s + norms' inputs {copies} d + {outputs} d s + (2h + 2g) e s + 4h, with "
    return size, formula + f"f = {f}, d = {d}, h = {h}, g = {g}, e = {e}, s = {s}"


def kept(setup: Setup) -> list[Term]:
    """From the forward to the backward pass."""
    tokens, d, s = setup.tokens, setup.config.hidden_size, setup.s
    ends = tokens * d * (4 + 4 * s)
    terms = [Term("ends of the stream", ends, f"B T d (4 + 4s) = {tokens} · {d} · {4 + 4 * s}: embedding, final norm")]
    if setup.basis_changes:
        # Under gradient checkpointing those of one block at a time, of at most two sublayers.
        changes = min(2, setup.basis_changes) if setup.gradient_checkpointing else setup.basis_changes
        each = tokens * d * s + d * d * s
        formula = f"{changes} · (B T d s + d² s) = {changes} · ({tokens} · {d} · {s} + {d}² · {s})"
        terms.append(Term("basis changes", changes * each, formula))
    if setup.gradient_checkpointing:
        size = setup.layers * tokens * d * s
        return [*terms, Term("blocks' inputs", size, f"L B T d s = {setup.layers} · {tokens} · {d} · {s}")]
    per_token, formula = block_activations(setup)
    size = setup.layers * tokens * per_token
    weights, sizes = rotated_weights(setup)
    return [
        *terms,
        Term("activations", size, f"L B T · a = {setup.layers} · {tokens} · {per_token:,}; a = {formula}"),
        Term("rotated weights", setup.layers * weights, f"L {_COPIES} = {setup.layers} · {sizes}{_WHICH}"),
    ]


def recomputed(setup: Setup) -> list[Term]:
    """One block's activations and weights, under gradient checkpointing."""
    if not setup.gradient_checkpointing:
        return []
    per_token, formula = block_activations(setup)
    weights, sizes = rotated_weights(setup)
    return [
        Term("one block's activations", setup.tokens * per_token,
             f"B T · a = {setup.tokens} · {per_token:,}; a = {formula}"),
        Term("one block's rotated weights", weights, f"{_COPIES} = {sizes}{_WHICH}"),
        *_fetched_block(setup),
    ]  # fmt: skip


def _fetched_block(setup: Setup) -> list[Term]:
    """Offloaded weights wait on the device from a block's recomputation until its gradients are there."""
    if not setup.fetches:
        return []
    sizes = summed(f"{outputs} · {inputs}" for _, outputs, inputs in setup.block)
    return [Term("one block's own weights", setup.decoder_weights // setup.layers * setup.s,
                 f"Σ O · I · s = {sizes} · {setup.s}: as they came from the host")]  # fmt: skip
