"""The plan's formulae against what autograd keeps and what torch counts."""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from itertools import accumulate

import pytest
import torch
from conftest import tiny_llama
from tiny_models import rotated_model, tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from experiments.planning.blocks import block_activations, rotated_weights
from experiments.planning.costs import MAP_COSTS, step_flops
from experiments.planning.memory import memory_plan
from experiments.planning.sizes import Setup, total
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.optimizers import CayleySGD
from rotpruner.orthogonal import OrthogonalMatrices
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import LearnedRotations
from rotpruner.slicing import residual_pca
from rotpruner.statistics import Moment
from rotpruner.surrogates import Surrogate

SHAPES = {
    "llama": dict(hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "opt": dict(hidden_size=96, ffn_dim=160, num_attention_heads=4),
}


def model_of(family: str):
    shape = {**SHAPES[family], "num_hidden_layers": 3, "vocab_size": 320, "max_position_embeddings": 128}
    return tiny_llama(**shape) if family == "llama" else tiny("opt", **shape)


def ready(base, dtype, spaces, **settings) -> RotatedModel:
    """A model that has been calibrated and has its masks."""
    rotated = rotated_model(base.to(dtype), spaces, **settings)
    rotated.calibrate([torch.arange(64)[None]])
    rotated.refresh_masks()
    return rotated


def setup_of(rotated: RotatedModel, spaces, seq_len: int, **settings) -> Setup:
    base = rotated.base
    return Setup(base.config, rotated.pruner, spaces, dtype=base.dtype, seq_len=seq_len, device="cpu", **settings)


def kept_bytes(rotated: RotatedModel, seq_len: int) -> int:
    """Bytes of all storages that autograd keeps from the forward to the backward pass, besides the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*rotated.parameters(), *rotated.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.arange(seq_len)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rotated._enter_rotated(pruned=True)
        states = rotated._states(ids)
    assert states.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("family", "spaces", "surrogate"),
    [
        ("llama", ("residual", "value_heads"), "constant"),
        ("llama", ("residual", "value_heads"), "sr_ste"),
        ("llama", ("residual",), "straight_through"),
        ("llama", ("residual", "value_heads", "query_key"), "constant"),
        ("opt", ("residual", "value_heads"), "constant"),
    ],
)
def test_activations_and_rotated_weights_are_what_autograd_keeps(family, spaces, surrogate, dtype):
    """Two lengths tell what grows with tokens (activations) from what does not (weights, the solve)."""
    rotated = ready(model_of(family), dtype, spaces, surrogate=Surrogate(surrogate))
    short, long = kept_bytes(rotated, 64), kept_bytes(rotated, 128)
    setup = setup_of(rotated, spaces, 128, keeps_unmasked=surrogate == "sr_ste")
    per_token, _ = block_activations(setup)
    ends = setup.config.hidden_size * (4 + 2 * setup.s)  # the states of teacher and pupil are the objective's
    assert (long - short) / 64 == pytest.approx(setup.layers * per_token + ends, rel=0.04)
    cayley = next(term for term in memory_plan(setup).phases["logits"] if term.name == "orthogonal map")
    assert 2 * short - long == pytest.approx(setup.layers * rotated_weights(setup)[0] + cayley.amount, rel=0.12)


@pytest.mark.parametrize(
    ("pruner", "pattern", "orthogonal_map", "offload"),
    [
        ("magnitude", "2:4", "cayley", False),
        ("wanda", "2:4", "cayley", True),
        ("sparsegpt", "2:4", "exponential", False),
        ("wanda", "2:4", "manifold", False),
        ("magnitude", "slice:0.25", "cayley", False),
        ("wanda", "slice:0.25", "manifold", False),
    ],
)
def test_resident_terms_are_what_the_model_holds(pruner, pattern, orthogonal_map, offload):
    spaces = ("residual",) if pattern.startswith("slice") else ("residual", "value_heads")
    choices = dict(pruner=pruner, pattern=pattern, orthogonal_map=orthogonal_map)
    waiting = dict(gradient_checkpointing=offload, offload=offload)
    rotated = ready(model_of("llama"), torch.bfloat16, spaces, **choices, **waiting)
    kind = CayleySGD if orthogonal_map == "manifold" else torch.optim.Adam
    optimizer = kind(rotated.rotations.parameters())
    rotated.loss(torch.arange(64)[None], torch.tensor([3]))["loss"].backward()
    optimizer.step()
    states = 1 if orthogonal_map == "manifold" else 2
    choices = dict(pattern=rotated.pattern, orthogonal_map=orthogonal_map, optimizer_states=states)
    plan = memory_plan(setup_of(rotated, spaces, 64, num_sequences=9, steps=1, **choices, **waiting))
    parts = *plan.resident, *plan.kept_by_host, *plan.host_phases["learning"]
    terms = {term.name: term.amount for term in parts}
    held = {
        "frozen weights": list(rotated.base.parameters()),
        "decoder weights": [linear.weight for linear in rotated.linears if offload],
        "masks": [linear.mask for linear in rotated.linears if linear.mask is not None],
        "statistics H": [moment.blocks for moment in rotated.moments.values()],
        "teacher states": [states for _, states in rotated._dense_states.kept.values()],
        "rotations": [
            *rotated.rotations.parameters(),
            *rotated.rotations.buffers(),
            *rotated.masks.rotations.values(),
            *(parameter.grad for parameter in rotated.rotations.parameters()),
        ],
        "optimiser states": [
            state for of in optimizer.state.values() for state in of.values() if torch.is_tensor(state) and state.dim()
        ],
    }
    assert ("masks" in terms) == (pattern == "2:4")
    for name, tensors in held.items():
        assert terms.get(name, 0) == sum(tensor.numel() * tensor.element_size() for tensor in tensors), name


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(("start", "entropy"), [("identity", 0), ("permutation", 0), ("identity", 1)])
def test_inverse_hessians_that_importance_keeps_are_planned(pruner, start, entropy):
    spaces, objective = ("residual", "value_heads"), Objective(kl=1, entropy=entropy)
    orders = ("mlp",) if start == "permutation" else ()
    rotated = ready(model_of("llama"), torch.bfloat16, (*spaces, *orders), pruner=pruner, objective=objective)
    rotated.start_from_statistics(start)
    rotated.loss(torch.arange(64)[None])
    plan = memory_plan(setup_of(rotated, spaces, 64, pattern=rotated.pattern, objective=objective, start=start))
    planned = sum(term.amount for term in plan.resident if term.name == "inverses of H")
    derived = [kept for moment in rotated.moments.values() for kept in moment._derived.values()]
    assert planned == sum(inverse.blocks.numel() * inverse.blocks.element_size() for inverse in derived)
    assert bool(planned) == (pruner == "sparsegpt" and entropy > 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("placement", ["shared", "per_layer", "per_block"])
@pytest.mark.parametrize("pattern", ["2:4", "slice:0.25"])
def test_the_export_has_the_size_that_is_planned(pattern, placement, tied):
    spaces, model = ("residual",), tiny_llama(**{**SHAPES["llama"], "tie_word_embeddings": tied})
    chosen, pruner = parse_pattern(pattern), resolve_pruner("magnitude")
    setup = Setup(copy.deepcopy(model.config), pruner, spaces, placement=placement, pattern=chosen)
    rotations = LearnedRotations(model.config, spaces, placement=placement)()
    prune_model(model, pruner, chosen, rotations={space: Q.detach() for space, Q in rotations.items()})
    assert setup.exported_parameters == sum(tensor.numel() for tensor in model.state_dict().values())


def memory_of(call) -> tuple[int, int]:
    """(peak, what stays) of a call, bytes, by PyTorch's count of allocations."""
    gc.collect()  # or what an earlier call has left is freed, and counted, in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # noqa: F841 - until the count is taken
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held), held[-1]


@pytest.mark.parametrize("name", ["cayley", "exponential", "manifold"])
def test_what_orthogonal_maps_take_is_what_torch_allocates(name):
    cost, n = MAP_COSTS[name], 256
    copy, matrices = 4 * n * n, OrthogonalMatrices(1, 1, n, name)
    if name != "manifold":
        torch.nn.init.normal_(matrices.turn, std=0.05)
    found = []
    _, kept = memory_of(lambda: found.append(matrices()))
    assert kept == pytest.approx((cost.kept + 2 * cost.indices) * copy, rel=0.05)
    gradient = torch.randn(1, 1, n, n)
    peak, _ = memory_of(lambda: found[0].backward(gradient))
    assert 0.75 * peak <= (cost.backward + cost.backward_one) * copy <= 1.3 * peak
    optimizer = CayleySGD(matrices.parameters()) if cost.step else torch.optim.Adam(matrices.parameters())
    optimizer.step()
    peak, _ = memory_of(optimizer.step)
    assert peak == pytest.approx((cost.step or 2 * matrices.turn.numel() / n**2) * copy, rel=0.12)


def test_principal_directions_take_what_is_planned():
    d = 256
    X = torch.randn(d, d)
    config, moments = tiny_llama(hidden_size=d).config, defaultdict(lambda: Moment((X @ X.mT)[None]))
    residual_pca(config, moments)  # gathers them
    peak, _ = memory_of(lambda: residual_pca(config, moments))
    assert peak <= 48 * d * d + 2 * 4 * d * d


@pytest.mark.parametrize("placement", ["per_layer", "per_block"])
def test_basis_changes_keep_a_stream_and_two_matrices_each(placement):
    spaces = ("residual",)
    found, setups = [], []
    for each in (placement, "shared"):
        rotated = ready(model_of("llama"), torch.bfloat16, spaces, placement=each)
        short, long = kept_bytes(rotated, 64), kept_bytes(rotated, 128)
        setup = setup_of(rotated, spaces, 128, placement=each)
        cayley = next(term for term in memory_plan(setup).phases["logits"] if term.name == "orthogonal map")
        found.append(((long - short) / 64, 2 * short - long - cayley.amount))
        setups.append(setup)
    changes, d = setups[0].basis_changes, setups[0].config.hidden_size
    assert changes == {"per_layer": 1, "per_block": 2}[placement] * setups[0].layers
    term = next(term for term in memory_plan(setups[0]).phases["logits"] if term.name == "basis changes")
    measured = 128 * (found[0][0] - found[1][0]) + found[0][1] - found[1][1]
    assert term.amount <= measured <= term.amount + 1.1 * d * d * 4  # and a copy of one matrix, however many there are


@pytest.mark.parametrize("placement", ["shared", "per_block"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [Objective(), Objective(kl=0, cross_entropy=1)], ids=["kl", "cross_entropy"])
def test_operations_are_those_that_torch_counts(objective, checkpointing, placement):
    spaces = ("residual", "value_heads")
    settings = {"placement": placement, "objective": objective, "gradient_checkpointing": checkpointing}
    rotated = ready(model_of("llama"), torch.float32, spaces, **settings)
    with FlopCounterMode(display=False) as counter:
        rotated.loss(torch.arange(128)[None], torch.tensor([0]))["loss"].backward()
    setup = setup_of(rotated, spaces, 128, steps=1, **settings)
    counted = {str(operator).split(".")[1]: count for operator, count in counter.get_flop_counts()["Global"].items()}
    products = sum(counted.get(name, 0) for name in ("mm", "bmm", "addmm", "baddbmm"))
    terms = {term.name: term.amount for term in step_flops(setup)}
    expected = terms["linears"] + terms["rotated weights"] + terms["logits"] + terms["ends of the stream"]
    expected += terms.get("basis changes", 0)
    expected += terms["orthogonal map"] * 6 // (32 / 3)  # the products; torch does not count solves
    if objective.needs_teacher:
        expected += 2 * 128 * sum(outputs * inputs for _, outputs, inputs in setup.linears)
    assert products == pytest.approx(expected, rel=0.01)


def test_totals_add_up():
    rotated = ready(model_of("llama"), torch.bfloat16, ("residual",))
    plan = memory_plan(setup_of(rotated, ("residual",), 64))
    held = [*plan.resident, *plan.kept_by_host, *plan.host_phases["learning"]]
    assert plan.learning == total(held) + max(map(total, plan.phases.values()))
    assert plan.peak >= plan.host
