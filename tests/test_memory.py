"""Freed memory goes back to the system; models wait on a GPU that has room for them."""

from __future__ import annotations

import platform

import pytest
import torch
from peak_memory import needs_linux, resident
from tiny_models import tiny

from rotpruner import memory
from rotpruner.memory import home_of, release_freed
from rotpruner.objectives import Objective

MIB = 2**20
CPU = torch.device("cpu")


def freed_but_held() -> torch.Tensor:
    """100 MiB in blocks too small to be mapped one by one, freed but for the last, which pins those below it."""
    blocks = [torch.ones(25 * 1024) for _ in range(1024)]
    return blocks[-1]


def test_a_model_waits_on_a_gpu_with_room_for_its_copies_and_states(monkeypatch):
    model, gpu = tiny("llama-2"), torch.device("cuda:0")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    state = 4 * model.config.hidden_size
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    pruned, updated = 2 * weights + 4 * 1000 * state, 5 * weights + 24 * 300 * state
    for needed, given in ((weights, ()), (pruned, (1000, 0)), (updated, (1000, 300))):
        for jobs in (1, 3):
            monkeypatch.setenv("ROTPRUNER_JOBS", str(jobs))
            for free, expected in ((2 * jobs * needed + 6, gpu), (2 * jobs * needed, CPU)):
                monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free - 600, 10**12))
                assert home_of(model, gpu, *given) == expected
    assert home_of(model, torch.device("meta")) == CPU


@needs_linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_freed_blocks_leave_the_process():
    pin = freed_but_held()
    held = resident("VmRSS")
    release_freed(torch.device("meta"))
    assert resident("VmRSS") > held - 10 * MIB  # another device's memory is no business of the C library
    release_freed(CPU)
    assert resident("VmRSS") < held - 80 * MIB
    assert pin.sum() == pin.numel()


@needs_linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_an_objective_does_so_before_its_logits():
    pin = freed_but_held()
    held = resident("VmRSS")
    head = torch.nn.Linear(4, 8)
    states = torch.zeros(1, 3, 4)
    Objective(cross_entropy=1, kl=0)(states, None, torch.zeros(1, 3, dtype=torch.long), head)
    assert resident("VmRSS") < held - 80 * MIB
    assert pin.sum() == pin.numel()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory._malloc_trim.cache_clear()
    try:
        assert memory._malloc_trim() is None
        release_freed(CPU)
    finally:
        memory._malloc_trim.cache_clear()
