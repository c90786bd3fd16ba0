"""Decoder weights in main memory: they stay there, come when they are needed, and change no number."""

from __future__ import annotations

import pytest
import torch
from command_line import refused
from conftest import tiny_llama
from safetensors.torch import load_file
from test_plan import memory_of
from tiny_models import rotated_model, tiny

import rotpruner.basis as basis_module
import rotpruner.concentration as concentration_module
import rotpruner.mask_choice as mask_choice_module
from lightning_modules.rotation_module import RotationModule
from rotpruner.diagnostics import masked_share
from rotpruner.errors import InputError
from rotpruner.objectives import Objective
from rotpruner.orthogonal import rotate_weight
from rotpruner.surrogates import Surrogate

WAITING = dict(gradient_checkpointing=True, offload=True)
OFFLOAD = ["--model.gradient_checkpointing", "true", "--model.offload", "true"]


@pytest.fixture
def ids():
    return torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama-3", {}),
        ("opt", dict(pruner="sparsegpt", surrogate=Surrogate("sr_ste"))),
        ("smollm2", dict(objective=Objective(entropy=1.0, lost_mass=1.0), pattern="0.5", layer_sparsity="owl")),
        ("smollm2", dict(surrogate=Surrogate("gumbel"))),
    ],
    ids=["llama", "opt", "concentration and owl", "learned masks"],
)
def test_nothing_that_is_learned_changes_by_a_bit(family, settings, ids):
    found = []
    for offload in (False, True):
        rotated = rotated_model(tiny(family), gradient_checkpointing=True, offload=offload, **settings)
        rotated.calibrate(ids.split(1))
        optimizer = torch.optim.Adam(rotated.parameter_groups(), lr=1e-2)
        losses = []
        for _ in range(2):
            flipped = rotated.refresh_masks()
            terms = rotated.loss(ids, torch.arange(3))
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            losses += [torch.tensor(flipped), *terms.values()]
        gradients = [parameter.grad for group in rotated.parameter_groups() for parameter in group["params"]]
        shares = [torch.tensor(row["kept_mass"]) for row in masked_share(rotated)]
        found.append([*losses, *gradients, *rotated.rotations().values(), *shares])
    assert any(gradient.abs().sum() for gradient in found[0])
    for there, offloaded in zip(*found, strict=True):
        assert torch.equal(there, offloaded)


def test_weights_stay_where_they_are_and_come_to_where_they_are_needed(monkeypatch):
    rotated = rotated_model(tiny_llama(), pruner="magnitude", **WAITING)
    held = {tensor.data_ptr() for tensor in (*rotated.parameters(), *rotated.buffers(), *rotated.state_dict().values())}
    assert not any(linear.weight.data_ptr() in held for linear in rotated.linears)

    rotated.to("meta")
    assert {parameter.device.type for parameter in rotated.parameters()} == {"meta"}
    assert {linear.weight.device.type for linear in rotated.linears} == {"cpu"}
    came = []

    def watched(weight, reads, writes):
        came.append(weight.device.type)
        return rotate_weight(weight, reads, writes)

    monkeypatch.setattr(basis_module, "rotate_weight", watched)
    monkeypatch.setattr(mask_choice_module, "rotate_weight", watched)
    monkeypatch.setattr(concentration_module, "rotate_weight", watched)
    for linear in rotated.linears:
        linear(torch.zeros(1, linear.in_features, device="meta"))
    groups, device = [rotated.linears[:1]], rotated.base.device
    next(mask_choice_module.choose_masks(groups, {}, {}, rotated.pruner, rotated.patterns, rotated.ranks, device))
    concentration_module.concentration(
        groups, {}, {}, rotated.pruner, rotated.patterns, Objective(kl=0, lost_mass=1.0), device
    )
    assert came == ["meta"] * (len(rotated.linears) + 2)


def test_no_more_than_one_blocks_weights_are_there_at_a_time(ids):
    """Counted by PyTorch, with copies from main memory to itself in place of those to a GPU."""

    class Distant(torch.Tensor):
        def to(self, *args, **kwargs):
            return self.as_subclass(torch.Tensor).clone()

    layers, peaks = 6, []
    for distant in (False, True):
        shape = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
        rotated = rotated_model(tiny_llama(**shape, num_hidden_layers=layers), **WAITING)
        rotated.calibrate(ids[:1].split(1))
        rotated.refresh_masks()
        weights = sum(linear.weight.nbytes for linear in rotated.linears)
        if distant:
            for linear in rotated.linears:
                linear.weight = linear.weight.as_subclass(Distant)
        rotated.loss(ids[:1])["loss"].backward()
        peak, _ = memory_of(lambda model=rotated: model.loss(ids[:1])["loss"].backward())
        peaks.append(peak)
    assert 0.5 * weights / layers < peaks[1] - peaks[0] <= 1.05 * weights / layers


def test_weights_are_loaded_into_main_memory_where_lightning_makes_tensors_elsewhere(model_directory):
    module = RotationModule(model_directory, gradient_checkpointing=True, offload=True)
    with torch.device("meta"):
        module.configure_model()
    assert {linear.weight.device.type for linear in module.rotated.linears} == {"cpu"}
    assert {Q.device.type for Q in module.rotated.rotations.parameters()} == {"meta"}


def test_a_fit_with_offload_learns_the_rotations_of_one_without(fit, tmp_path):
    found = []
    for change in (OFFLOAD, OFFLOAD[:2]):
        status, run = fit(*change)
        assert status == 0
        found.append(load_file(run / "rotations" / "rotations.safetensors"))
        run.rename(tmp_path / f"run-{len(found)}")
    for space, Q in found[1].items():
        assert torch.equal(found[0][space], Q)
        assert not torch.equal(Q, torch.eye(Q.shape[-1]).expand_as(Q))


def test_a_fit_refuses_offload_without_recomputation(fit, capsys):
    changes = ["--model.offload", "true", "--model.gradient_checkpointing", "false"]
    refused(*fit(*changes), capsys, "offload", "gradient_checkpointing")


def test_the_core_refuses_offload_without_recomputation():
    with pytest.raises(InputError, match="gradient_checkpointing"):
        rotated_model(tiny_llama(), offload=True)
