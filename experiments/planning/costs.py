"""Arithmetic and disk space of a fit, reckoned from its settings; the symbols are those of `planning.sizes`.

A matrix product of (a, b) by (b, c) counts 2abc operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.planning.sizes import Setup, Term, summed
from rotpruner.families import family_of
from rotpruner.placements import head_dim


@dataclass(frozen=True)
class MapCost:
    """What an orthogonal map of matrices (n, n) takes; copies are of all n² entries, measured with PyTorch's profiler.

    Attributes:
        kept: copies that wait for the backward pass, the result among them.
        indices: whether the indices of the triangle (int64) wait too.
        backward: copies that the backward pass adds, of all spaces together.
        backward_one: copies that it adds of one space at a time.
        step: copies that the optimiser's step adds, of one space at a time.
        flops: thirds of n³ operations, forward and backward, and of the step where the optimiser does them.
        why: where the operations come from.
    """

    kept: int
    indices: bool
    backward: int
    backward_one: int
    step: int
    flops: int
    why: str


MAP_COSTS = {
    # LU and its solution 8/3 n³, Q₀ times it 2 n³; backward 2 n³ each for Q₀, the solve and the outer product.
    "cayley": MapCost(4, True, 5, 0, 0, 32, "solved, times Q₀, gradients"),
    # A polynomial of degree 18 takes 5 products, and in the backward pass of a matrix twice as wide (torch 2.13).
    "exponential": MapCost(2, True, 1, 56, 0, 3 * 94, "at most; 5 products, of twice the width backward"),
    # Q₀ P, its gradient; `CayleySGD` takes 5 products and a solve.
    "manifold": MapCost(1, False, 1, 0, 9, 50, "times Q₀, gradient, CayleySGD's solve and 5 products"),
}


def step_flops(setup: Setup) -> list[Term]:
    """Operations of one optimiser step on one device; all in the model's precision but those of "orthogonal map"."""
    config, tau = setup.config, setup.tokens
    M = setup.decoder_weights
    linears = 2 * M * tau
    # PyTorch stops recomputing a block at its last product, whose result nothing needs.
    last = sum(
        outputs * inputs for place, outputs, inputs in setup.linears if place.spec is family_of(config).linears[-1]
    )
    heads = config.num_attention_heads * head_dim(config)
    attention = 2 * setup.layers * heads * setup.seq_len * tau  # queries by keys and weights by values, half of each
    again = 1 if setup.gradient_checkpointing else 0
    redone, repeated = (M - last, f" + {M - last:,}") if again else (0, "")
    heads_work = f"2 · {setup.layers} · {heads} · {setup.seq_len} · {tau}"
    terms = [
        Term("linears", 2 * tau * (3 * M + redone),
             f"2 B T · (3 M{repeated}) = 2 · {tau} · (3 · {M:,}{repeated}): forward, two gradients"
             + ", all but the last of a block again" * again),
        Term("attention", int((3.5 + again) * attention),
             f"{3.5 + again} · 2 L h e T · B T = {3.5 + again} · {heads_work}"),
        _rotated_weights(setup, again),
        _orthogonal_map(setup),
    ]  # fmt: skip
    V, d = config.vocab_size, config.hidden_size
    if "residual" in setup.spaces:
        terms.append(Term("ends of the stream", 10 * d * d * tau,
                          f"5 · 2 d² B T = 10 · {d}² · {tau}: into the basis and out of it, gradients"))  # fmt: skip
    if setup.basis_changes:
        changes, times = setup.basis_changes, 3 + again
        terms.append(Term("basis changes", changes * times * 2 * d * d * (d + tau),
                          f"{changes} · {times} · 2 d² (d + B T) = {changes} · {times} · 2 · {d}² · ({d} + {tau}): "
                          "T = QᵢᵀQᵢ₊₁ and x T for a residual connection, gradients"))  # fmt: skip
    passes = 3 * bool(setup.objective.kl) + 2 * bool(setup.objective.cross_entropy)
    formula = f"{passes} · 2 V d B T = {passes} · 2 · {V:,} · {d} · {tau}: pruned forward, gradient; dense for kl"
    terms.append(Term("logits", passes * 2 * V * d * tau, formula))
    if setup.objective.needs_teacher:
        seen = setup.steps * setup.batch_size
        once = min(setup.num_sequences, seen)
        terms.append(Term("teacher", once * (linears + attention) // seen,
                          f"share · (2 B T M + 2 L h e T · B T) = {once} / {seen} · (2 · {tau} · {M:,} + {heads_work})"
                          ": forward, for each sequence once"))  # fmt: skip
    return terms


def _rotated_weights(setup: Setup, again: int) -> Term:
    """W' = Q_Bᵀ W Q_A: a product a side, one for each gradient of Q, and one through the outer of two sides."""
    amount, parts, times = 0, [], 2 + again
    for place, outputs, inputs in setup.block:
        reads, writes = setup.width(place.spec.reads), setup.width(place.spec.writes)
        between = writes if reads else 0
        widths = times * (reads + writes) + between
        amount += 2 * setup.layers * outputs * inputs * widths
        if widths:
            parts.append(f"{outputs} · {inputs} · {widths}")
    return Term("rotated weights", amount,
                f"2 L Σ O I ({times} (n_A + n_B) + n_B if both rotate) = 2 · {setup.layers} · {summed(parts)}: "
                "forward, gradients" + ", recomputed" * again)  # fmt: skip


def _orthogonal_map(setup: Setup) -> Term:
    cost = MAP_COSTS[setup.orthogonal_map]
    cubes = sum(count * n**3 for count, n in setup.matrices)
    numbers = summed(f"{count} · {n}³" for count, n in setup.matrices)
    formula = f"{cost.flops}/3 Σ matrices · n³ = {cost.flops} / 3 · {numbers}"
    return Term("orthogonal map", cubes * cost.flops // 3, f"{formula}: {cost.why}, in the rotations' precision")


def disk_space(setup: Setup) -> list[Term]:
    """Bytes that a run directory and the calibration cache take at the most, without what `cache_dense` keeps.

    A second fit keeps the first one's directory in its own.
    """
    config, r = setup.config, setup.r
    K, k = setup.rotation_entries, setup.trainable
    tied = getattr(config, "tie_word_embeddings", False) and "residual" in setup.spaces
    exported, size = setup.exported_parameters, setup.checkpoint_size
    text = f"P · {size} = {exported:,} · {size}" + ", the head untied" * tied + ", sliced" * setup.sliced
    fit = [
        Term("export", exported * size, text),
        Term("rotations", K * 4, f"4 K = 4 · {K:,}"),
        Term("checkpoint", (2 * K + (1 + setup.optimizer_states) * k) * r,
             f"(2 K + {1 + setup.optimizer_states} k) r = (2 · {K:,} + {1 + setup.optimizer_states} · {k:,}) · {r}"),
    ]  # fmt: skip
    second = [replace(term, name=f"{term.name}, second fit") for term in fit] if setup.second_steps else []
    return [
        *fit,
        *second,
        Term("a control, until it is evaluated", exported * size, text),
        Term("calibration tokens", 8 * setup.num_sequences * setup.seq_len,
             f"8 N T = 8 · {setup.num_sequences} · {setup.seq_len}"),
    ]  # fmt: skip
