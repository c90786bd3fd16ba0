"""The memory of a fit, part by part, reckoned from its settings; symbols and sizes are those of `planning.sizes`.

A plan is the resident parts, which stay for the whole fit, plus the largest of the phases of a step, which follow each
other. Counts of copies are those of the code that they describe (`rotated_model`, `objectives`, `orthogonal`) as
PyTorch's autograd keeps them; tests hold them against what it keeps and against the kernel's count of resident pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from experiments.planning.blocks import kept, recomputed
from experiments.planning.costs import MAP_COSTS
from experiments.planning.sizes import Setup, Term, summed, total
from rotpruner.families import family_of
from rotpruner.layout import module_at, residual_sublayers
from rotpruner.measures import parameter_count
from rotpruner.objectives import CHUNK
from rotpruner.permutations import MOST_ROWS

#: Bytes that libraries take at their first use. CPU: measured, code and scratch space of matrix products. GPU: the
#: CUDA context and cuBLAS workspaces, from what is commonly seen; not measured here.
RUNTIME = {"cpu": 64 * 2**20, "gpu": 700 * 2**20}


Phases = dict[str, list[Term]]


def largest(phases: Phases) -> str:
    """The phase that takes most."""
    return max(phases, key=lambda phase: total(phases[phase]))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device and on its host; with a CPU, which is both, they add up.

    Attributes:
        resident: what stays on the device.
        phases: what comes and goes there, by phase of learning.
        kept_by_host: what stays on the host while it learns.
        host_phases: what it has there: while it loads, beside all that stays while it learns, and at the end of the
            run, which is reckoned but not measured.
        device: `cpu` or `gpu`.
    """

    resident: list[Term]
    phases: Phases
    kept_by_host: list[Term]
    host_phases: Phases
    device: str

    @property
    def learning(self) -> int:
        """The peak on the device while it learns."""
        beside = total(self.kept_by_host) + total(self.host_phases["learning"]) if self.device == "cpu" else 0
        return total(self.resident) + beside + total(self.phases[largest(self.phases)])

    @property
    def host(self) -> int:
        """The peak on the host, from beginning to end."""
        peaks = {name: total(terms) for name, terms in self.host_phases.items()}
        peaks["learning"] += total(self.kept_by_host) + (total(self.resident) if self.device == "cpu" else 0)
        return max(peaks.values())

    @property
    def peak(self) -> int:
        """On the device, from beginning to end."""
        return max(self.learning, self.host) if self.device == "cpu" else self.learning


def memory_plan(setup: Setup) -> MemoryPlan:
    """The memory of a fit on one device and on its host."""
    k, r = setup.trainable, setup.r
    frozen = [*_weights(setup), *_masks(setup)]
    others = [
        _statistics(setup),
        *_inverses(setup),
        _rotations(setup),
        Term("optimiser states", setup.optimizer_states * k * r,
             f"{setup.optimizer_states} k r = {setup.optimizer_states} · {k:,} · {r}"),
        Term("runtime", RUNTIME[setup.device], "what libraries take at their first use"),
    ]  # fmt: skip
    phases = {
        "logits": [*kept(setup), _map(setup), _logits(setup)],
        "blocks, backward": [*kept(setup), *recomputed(setup), _map(setup), _weight_gradients(setup)],
        "rotations, backward": [_map_backward(setup)],
        "optimiser step": [_step(setup)],
        "mask refresh": [_refresh(setup), *_fetched_linear(setup)],
    }
    if setup.start == "pca":
        phases["principal directions"] = [_pca(setup)]
    if setup.start == "permutation":
        phases["orders of features"] = [_orders(setup), *_fetched_linear(setup)]
    if setup.layer_sparsity == "owl":
        phases["outlier ratios"] = [_outliers(setup), *_fetched_linear(setup)]
    kept_by_host = [_offloaded(setup)] if setup.offload else []
    over = []
    if setup.device != "cpu" and not setup.sharded:
        over = [*kept_by_host, _back_from_gpu(setup, frozen)]
    host_phases = _host_phases(setup, over, _left(setup, frozen, others, kept_by_host))
    return MemoryPlan([*frozen, *_second_teacher(setup), *others], phases, kept_by_host, host_phases, setup.device)


def _back_from_gpu(setup: Setup, frozen: list[Term]) -> Term:
    """What Lightning moves to the host when learning is over, on all ranks; FSDP2 leaves it where it is."""
    amounts = " + ".join(f"{term.amount:,}" for term in frozen)
    return Term("frozen weights and masks, back from the GPU", setup.ranks * total(frozen),
                f"ranks · (weights + masks) = {setup.ranks} · ({amounts})")  # fmt: skip


def _left(setup: Setup, frozen: list[Term], others: list[Term], kept_by_host: list[Term]) -> list[Term]:
    """What the host still has at a run's end: decoder weights that nothing shards are given up by then, and masks,
    unless they came with the weights; pinned memory, however, goes back to PyTorch only."""
    if setup.sharded:
        return [*frozen, *others] if setup.device == "cpu" else []
    ranks = 1 if setup.device == "cpu" else setup.ranks
    P, M, s = setup.parameters, setup.decoder_weights, setup.s
    rest = Term("embeddings, head and norms", ranks * (P - M) * s,
                f"ranks · (P − M) s = {ranks} · ({P:,} − {M:,}) · {s}")  # fmt: skip
    masks = _masks(setup) if setup.second_teacher else []
    if setup.device == "cpu":
        return [rest, *masks, *others]
    statistics = _statistics(setup)
    return [rest, *masks, Term("statistics H, copied", statistics.amount, statistics.formula), *kept_by_host]


def _host_phases(setup: Setup, over: list[Term], left: list[Term]) -> Phases:
    """Phases of the host; `over` is what it has when learning is over, `left` what of that it still has later."""
    P, c = setup.parameters, setup.checkpoint_size
    states = 2 * setup.statistics_sequences * setup.seq_len * setup.config.hidden_size * c
    T, V = setup.seq_len, setup.config.vocab_size
    return {
        "loading": [
            Term("weights", setup.ranks * P * setup.s,
                 f"ranks · P · s = {setup.ranks} · {P:,} · {setup.s}: each rank loads them, here all on one host"),
            Term("checkpoint file, mapped", P * c, f"P · {c} = {P:,} · {c}"),
        ],
        "learning": [_teacher_states(setup)] if setup.objective.needs_teacher else [],
        **({"learning over": over} if over else {}),
        **({"weights updated": [*left, *_compensation(setup)]} if setup.compensate else {}),
        "controls pruned": [
            *left,
            Term("model", P * c, f"P · {c} = {P:,} · {c}"),
            *([Term("model whose weights it takes over", P * c, f"P · {c} = {P:,} · {c}")] * setup.second_teacher),
            *([Term("statistics H", setup.statistics * 4, f"L Σ I · n · 4 = {setup.statistics:,} · 4"), _pca(setup)]
              if setup.sliced
              else [Term("inputs and outputs of a block", states,
                    f"2 N T d · {c} = 2 · {setup.statistics_sequences} · {T} · {setup.config.hidden_size} · {c}")]),
        ],
        "perplexity": [
            *left,
            Term("model in float32", P * 4, f"P · 4 = {P:,} · 4"),
            Term("logits", 2 * T * V * 4, f"2 · T · V · 4 = 2 · {T} · {V:,} · 4"),
            *([] if setup.device == "cpu"
              else [Term("states of the test windows", 2 * setup.test_tokens * setup.config.hidden_size * 4,
                    f"2 · tokens · d · 4 = 2 · {setup.test_tokens:,} · {setup.config.hidden_size} · 4: "
                    "of one block and the next")]),
        ],
    }  # fmt: skip


def _compensation(setup: Setup) -> list[Term]:
    P, c, d = setup.parameters, setup.checkpoint_size, setup.config.hidden_size
    N, T = setup.compensate, setup.seq_len
    M = setup.decoder_weights
    # What each group of a block's linears gets, and the stream after each sublayer.
    inputs = {place.group: inputs for place, _, inputs in setup.linears if place.layer == 0}
    width = sum(inputs.values()) + len(residual_sublayers(setup.config)) * d
    return [
        Term("pruned and dense model", 2 * P * c, f"2 P · {c} = 2 · {P:,} · {c}"),
        Term("decoder weights before, and updates", 2 * M * c, f"2 M · {c} = 2 · {M:,} · {c}"),
        Term("inputs of a block of both", 4 * N * T * d * c, f"4 N T d · {c} = 4 · {N} · {T} · {d} · {c}"),
        Term("inputs of a dense block's linears", N * T * width * c,
             f"N T · {width:,} · {c} = {N} · {T} · {width:,} · {c}"),
    ]  # fmt: skip


def _masks(setup: Setup) -> list[Term]:
    masks = setup.decoder_weights
    return [] if setup.sliced else [Term("masks", masks, f"M · 1 = {masks:,} · 1, boolean")]


def _statistics(setup: Setup) -> Term:
    sizes = summed(f"{inputs} · {n}" for inputs, n in setup.moments)
    return Term("statistics H", setup.statistics * setup.r,
                f"L Σ I · n · r = {setup.layers} · {sizes} · {setup.r}: "
                "for each input of a block, n the width of what rotates it")  # fmt: skip


def _inverses(setup: Setup) -> list[Term]:
    """The importance of pruners that rebuild weights, once an objective has asked for it."""
    if setup.pruner.needs != "full" or not setup.objective.needs_importance:
        return []
    entries, r = setup.statistics, setup.r
    return [Term("inverses of H", entries * r, f"at most as many entries as H, · r = {entries:,} · {r}")]


def _weights(setup: Setup) -> list[Term]:
    P, s, M = setup.parameters, setup.s, setup.decoder_weights
    if setup.offload:
        return [Term("frozen weights", (P - M) * s, f"(P − M) s = ({P:,} − {M:,}) · {s}: all but the decoder linears'")]
    if not setup.sharded:
        return [Term("frozen weights", P * s, f"P · s = {P:,} · {s}")]
    blocks = parameter_count(module_at(setup.model, family_of(setup.config).blocks))
    share, block, rest = blocks * s // setup.ranks, blocks * s // setup.layers, (P - blocks) * s
    return [
        Term("frozen weights", rest + share,
             f"(P − P_blocks) s + P_blocks s / ranks = {P - blocks:,} · {s} + {blocks:,} · {s} / {setup.ranks}"),
        Term("gathered blocks", 2 * block,
             f"2 P_blocks s / L = 2 · {blocks:,} · {s} / {setup.layers}: this one and the next"),
    ]  # fmt: skip


def _second_teacher(setup: Setup) -> list[Term]:
    P, s = setup.parameters, setup.s
    return [Term("teacher weights", P * s, f"P · s = {P:,} · {s}")] if setup.second_teacher else []


def _offloaded(setup: Setup) -> Term:
    """For a GPU in pinned memory, of which PyTorch takes a power of two for each weight."""
    ranks, s = setup.ranks, setup.s
    if not setup.fetches:
        M = setup.decoder_weights
        return Term("decoder weights", ranks * M * s, f"ranks · M · s = {ranks} · {M:,} · {s}")
    pinned = [1 << (outputs * inputs * s - 1).bit_length() for _, outputs, inputs in setup.block]
    return Term("decoder weights", ranks * setup.layers * sum(pinned),
                f"ranks · L Σ O · I · s = {ranks} · {setup.layers} · {summed(f'{size:,}' for size in pinned)}: "
                "pinned, each rounded up to a power of two")  # fmt: skip


def _fetched_linear(setup: Setup) -> list[Term]:
    if not setup.fetches:
        return []
    formula = f"O · I · s of the largest linear = {setup.largest:,} · {setup.s}: as it came from the host"
    return [Term("a linear's own weight", setup.largest * setup.s, formula)]


def _rotations(setup: Setup) -> Term:
    K, k, r = setup.rotation_entries, setup.trainable, setup.r
    return Term("rotations", (2 * K + 2 * k) * r,
                f"(2K + 2k) r = (2 · {K:,} + 2 · {k:,}) · {r}: start, the masks'; parameters, gradients")  # fmt: skip


def _teacher_states(setup: Setup) -> Term:
    rows = min(setup.num_sequences, setup.steps * setup.batch_size)
    count = rows * setup.seq_len * setup.config.hidden_size
    return Term("teacher states", count * setup.s,
                f"rows · T · d · s = {rows} · {setup.seq_len} · {setup.config.hidden_size} · {setup.s}")  # fmt: skip


def _map(setup: Setup) -> Term:
    """What the backward pass needs: of Q = Q₀ (I − A/2)⁻¹ (I + A/2) the LU factors, two more and Q itself."""
    cost, K = MAP_COSTS[setup.orthogonal_map], setup.rotation_entries
    index = sum(8 * n**2 for _, n in setup.matrices) if cost.indices else 0
    symbols, numbers, kept = f"{cost.kept} K r", f"{cost.kept} · {K:,} · {setup.r}", f"{setup.orthogonal_map}"
    if index:
        symbols, kept = f"{symbols} + Σ 8 n²", f"{kept}, and indices of the triangle, int64"
        numbers = f"{numbers} + 8 · {summed(f'{n}²' for _, n in setup.matrices)}"
    return Term("orthogonal map", cost.kept * K * setup.r + index, f"{symbols} = {numbers}: {kept}")


def _map_backward(setup: Setup) -> Term:
    """Of the Cayley map five more: gradients of Q, of the solution, of both sides, of A."""
    held, cost, r = _map(setup), MAP_COSTS[setup.orthogonal_map], setup.r
    K, largest = setup.rotation_entries, setup.largest_space
    return Term("orthogonal map, backward", held.amount + (cost.backward * K + cost.backward_one * largest) * r,
                f"what is kept + ({cost.backward} K + {cost.backward_one} K_space) r = "
                f"{held.amount:,} + ({cost.backward} · {K:,} + {cost.backward_one} · {largest:,}) · {r}")  # fmt: skip


def _step(setup: Setup) -> Term:
    """Adam's update and denominator of all parameters at once; what `CayleySGD` moves a space's matrices with."""
    k, largest, r, copies = setup.trainable, setup.largest_space, setup.r, MAP_COSTS[setup.orthogonal_map].step
    if copies:
        return Term("optimiser step", copies * largest * r, f"{copies} K_space r = {copies} · {largest:,} · {r}")
    return Term("optimiser step", 2 * k * r, f"2 k r = 2 · {k:,} · {r}")


def _pca(setup: Setup) -> Term:
    d, K = setup.config.hidden_size, setup.rotation_entries
    return Term("principal directions", 48 * d * d + 2 * K * setup.r,
                f"6 d² · 8 + 2 K r = 6 · {d}² · 8 + 2 · {K:,} · {setup.r}: mean, its copy, eigenvectors and "
                "workspace in float64; what is found, and as one")  # fmt: skip


def _orders(setup: Setup) -> Term:
    """The importance of one linear, and a sample of the rows of all that read the same features."""
    blocks = {"residual": setup.layers}  # whose readers share an order; others have one a block
    read: dict[tuple[str, int], int] = {}
    for place, outputs, inputs in setup.block:
        space = place.spec.reads
        read[space, inputs] = read.get((space, inputs), 0) + outputs * blocks.get(space, 1)
    R, n = max(((min(rows, MOST_ROWS), inputs) for (_, inputs), rows in read.items()), key=prod)
    factors, added, of = _factors(setup)
    return Term("orders of features", 12 * setup.largest + 16 * R * n + factors,
                f"12 · O · I of the largest linear + 16 R n = 12 · {setup.largest:,} + 16 · {R:,} · {n:,}{added}: "
                "weight, importance and share in float32; rows that judge an order, twice, gathered and "
                f"sorted{of}")  # fmt: skip


def _factors(setup: Setup) -> tuple[int, str, str]:
    """Bytes of a full moment and what is derived from it, their formula and words; none if the pruner reads none."""
    if setup.pruner.needs != "full":
        return 0, "", ""
    widest = max(inputs for _, _, inputs in setup.linears)
    return 3 * setup.r * widest**2, f" + 3 · {setup.r} · {widest}²", "; moment, its factor and inverse"


def _outliers(setup: Setup) -> Term:
    block = setup.decoder_weights // setup.layers
    return Term("saliencies of a block", 8 * block, f"2 · 4 · M / L = 8 · {block:,}: of each linear, and as one")


def _logits(setup: Setup) -> Term:
    # KL: the dense log-probabilities, the pruned ones, the dense probabilities, their difference, their product.
    copies = 5 if setup.objective.kl else 3 if setup.objective.cross_entropy else 0
    rows, r = min(CHUNK, setup.tokens), setup.r
    V = setup.config.vocab_size
    return Term("logits of a chunk", rows * V * copies * r,
                f"tokens · V · {copies} r = {rows} · {V:,} · {copies * r}")  # fmt: skip


def _weight_gradients(setup: Setup) -> Term:
    return Term("gradients of a weight", 2 * setup.largest * setup.s,
                f"2 · O · I · s of the largest linear = 2 · {setup.largest:,} · {setup.s}")  # fmt: skip


def _refresh(setup: Setup) -> Term:
    """Rotated weight, its magnitude, float32 of that, saliency: 12 bytes a weight; and full moments are factored."""
    K, r = setup.rotation_entries, setup.r
    if setup.sliced:
        return Term("rotations of the moment", K * r, f"K r = {K:,} · {r}; no masks are chosen")
    factors, added, of = _factors(setup)
    return Term("mask refresh", 12 * setup.largest + K * r + factors,
                f"12 · O · I of the largest linear + K r = 12 · {setup.largest:,} + {K:,} · {r}{added}: weights, "
                f"rotations of the moment{of}")  # fmt: skip
