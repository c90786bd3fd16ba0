"""Sparse recovery: survivors learn, zeros stay, and a run goes on where it was killed."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import exact, tiny, tiny_ids

from lightning_modules.recovery_module import RecoveryModule
from lightning_modules.schedules import with_schedule
from rotpruner.errors import InputError
from rotpruner.layout import linear_modules
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.recovery import SparseRecovery, check_keeps_zeros
from rotpruner.rotations import random_rotations


@pytest.fixture
def ids():
    return tiny_ids(4)


def recovery_of(name, placement="shared", **settings) -> SparseRecovery:
    teacher = exact(tiny(name))
    pruned = copy.deepcopy(teacher)
    spaces = ("residual",)
    rotations = random_rotations(pruned.config, spaces, 3, torch.float64, placement)
    prune_model(pruned, resolve_pruner("magnitude"), parse_pattern("2:4"), rotations=rotations)
    return SparseRecovery(pruned, teacher, compute_dtype=torch.float64, **settings)


@pytest.mark.parametrize("placement", ["shared", "per_block"])
@pytest.mark.parametrize("name", ["smollm2", "opt", "gemma"])
def test_survivors_learn_and_nothing_else_moves(name, placement, ids):
    recovery = recovery_of(name, placement)
    linears = linear_modules(recovery.pruned)
    before = copy.deepcopy(recovery.pruned.state_dict())
    masks = {name: linear.weight != 0 for name, linear in linears.items()}
    optimizer = torch.optim.Adam([p for p in recovery.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = recovery.loss(ids, torch.arange(len(ids)))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, linear in linears.items():
        assert torch.equal(linear.weight != 0, masks[name])
    learned = {f"{name}.weight" for name in linears}
    for key, value in recovery.pruned.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in learned), key


def test_the_loss_is_the_divergence_from_the_dense_model(ids):
    recovery = recovery_of("qwen2", objective=Objective(kl=1.0, cross_entropy=0.5))
    found = recovery.loss(ids, None)
    with torch.no_grad():
        dense = recovery._teacher.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        logits = recovery.pruned(input_ids=ids).logits[:, :-1]
    kl = (dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert math.isclose(found["kl"].item(), kl.item(), rel_tol=1e-9)
    assert math.isclose(found["loss"].item(), (kl + 0.5 * cross_entropy).item(), rel_tol=1e-9)


def test_the_teachers_states_come_from_the_cache_to_the_bit(ids, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path))
    losses, ran = [], []
    for cached in (False, True, True):
        recovery = recovery_of("smollm2", cache_dense=cached)
        recovery._teacher.model.base_model.register_forward_hook(lambda *_: ran.append(len(losses)))
        losses.append(recovery.loss(ids, torch.arange(len(ids)))["loss"].item())
    assert [ran.count(run) for run in range(3)] == [4, 4, 0]
    assert losses[0] == losses[1] == losses[2]


def test_what_only_learning_needs_is_let_go(ids):
    recovery = recovery_of("smollm2")
    recovery.loss(ids, torch.arange(len(ids)))["loss"].backward()
    held = [weakref.ref(recovery._teacher.model), weakref.ref(recovery._dense_states.kept[0][1])]
    held += [weakref.ref(p.grad) for p in recovery.parameters() if p.requires_grad]
    for _ in range(2):
        recovery.leave()
    gc.collect()
    assert len(held) > 2
    assert not any(reference() is not None for reference in held)


def test_gradient_checkpointing_changes_no_gradient(ids):
    gradients = []
    for checkpointing in (False, True):
        recovery = recovery_of("llama-3", "per_block", gradient_checkpointing=checkpointing)
        recovery.loss(ids)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in recovery.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients)


def test_what_cannot_recover_is_refused(model_directory):
    model = tiny("llama-2")
    with pytest.raises(InputError, match="prune it first"):
        SparseRecovery(model, tiny("llama-2"))
    with pytest.raises(InputError, match="kl and cross_entropy only"):
        SparseRecovery(model, tiny("llama-2"), Objective(cosine=1.0))
    with pytest.raises(InputError, match="as the teacher"):
        SparseRecovery(model, tiny("llama-2", vocab_size=32))
    for other in (tiny("llama-2", num_hidden_layers=3), tiny("qwen2")):  # of the same tokens
        with pytest.raises(InputError, match=r"llama of 2 blocks.* as the teacher"):
            SparseRecovery(model, other)
    with pytest.raises(InputError, match="kl and cross_entropy only"):
        RecoveryModule(str(model_directory), str(model_directory), Objective(cosine=1.0))
    with pytest.raises(InputError, match="warmup_steps -1"):
        RecoveryModule(str(model_directory), str(model_directory), warmup_steps=-1)
    with pytest.raises(InputError, match="Mixing moves the weights that pruning has removed"):
        RecoveryModule(str(model_directory), str(model_directory), optimizer=Mixing)


class Mixing(torch.optim.SGD):
    """Steps that mix the entries of a matrix, as those of Muon and Shampoo do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = weight.grad @ weight.grad.mT
        return super().step(closure)


def test_an_optimiser_that_runs_elsewhere_only_is_taken():
    check_keeps_zeros(lambda parameters: torch.optim.Adam(parameters, capturable=True))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.LBFGS(p),
    ],
)
def test_optimisers_that_keep_zeros_are_taken_and_keep_them(optimizer, ids):
    check_keeps_zeros(optimizer)
    recovery = recovery_of("llama-2")
    weights = [parameter for parameter in recovery.parameters() if parameter.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    steps = optimizer(weights)

    def loss():
        steps.zero_grad()
        value = recovery.loss(ids)["loss"]
        value.backward()
        return value

    for _ in range(2):
        steps.step(loss)
    assert all(torch.equal(weight == 0, old == 0) for weight, old in zip(weights, before, strict=True))
    assert not all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("cosine", [1, 3 / 4, 1 / 4, 0])],
)
def test_a_warm_up_comes_before_any_schedule(schedule, expected):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=0.4)
    given = with_schedule(optimizer, schedule, SimpleNamespace(estimated_stepping_batches=6), warmup_steps=3)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        given["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, *(0.4 * share for share in expected)])
    assert with_schedule(optimizer, "constant", None) is optimizer
