"""What is minimised: its values, its gradients, and what its chunks cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rotpruner import objectives
from rotpruner.errors import InputError
from rotpruner.objectives import Objective


def drawn() -> tuple[Tensor, Tensor, torch.nn.Linear]:
    """States (3, 24, 16) of a student and a teacher, and a head; all of them learn."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 24, 16, dtype=torch.float64, generator=generator)
    head = torch.nn.Linear(16, 320, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    return student.requires_grad_(), teacher, head


def defined(student: Tensor, teacher: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The terms by their definitions, of all logits at once."""
    log_p, log_q = (head(states[:, :-1]).log_softmax(-1) for states in (teacher, student))
    log_p = log_p.detach()
    return {
        "cross_entropy": -log_q.gather(-1, ids[:, 1:, None]).mean(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "cosine": 1 - torch.cosine_similarity(student[:, :-1], teacher[:, :-1], dim=-1).mean(),
    }


@pytest.mark.parametrize("chunk", [512, 16])  # 69 tokens: one chunk, or five of which the last is shorter
def test_terms_and_their_gradients_equal_their_definitions(chunk, ids, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    student, teacher, head = drawn()
    objective = Objective(cross_entropy=0.5, kl=2.0, cosine=3.0)
    found = objective.weighted(objective(student, teacher, ids, head))
    expected = defined(student, teacher, ids, head)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    total = 0.5 * expected["cross_entropy"] + 2 * expected["kl"] + 3 * expected["cosine"]
    torch.testing.assert_close(found["loss"], total)
    learning = [student, head.weight]
    gradients = torch.autograd.grad(found["loss"], learning)
    for gradient, wanted in zip(gradients, torch.autograd.grad(total, learning), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_terms_of_16_bit_states_are_those_of_the_same_numbers_in_float64(ids):
    """Logits are rounded by the head; nothing after it is."""
    student, teacher, head = drawn()
    narrow = [each.detach().bfloat16() for each in (student, teacher)]
    head.bfloat16()
    found = Objective(cross_entropy=1.0, kl=1.0, cosine=1.0)(*narrow, ids, head)
    expected = defined(*(each.double() for each in narrow), ids, lambda states: head(states.bfloat16()).double())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=0)


def test_the_logits_of_a_chunk_are_made_once(ids, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", 16)
    student, teacher, head = drawn()
    head.requires_grad_(False)
    tokens = []
    head.register_forward_hook(lambda module, args, output: tokens.append(len(output)))
    Objective(kl=1.0)(student, teacher, ids, head)["kl"].backward()
    assert max(tokens) == 16
    assert sum(tokens) == 2 * 69, "those of the student and those of the teacher"


def test_without_gradients_none_are_computed(ids, monkeypatch):
    student, teacher, head = drawn()
    objective = Objective(cross_entropy=1.0, kl=1.0)
    expected = objective(student, teacher, ids, head)
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **settings: pytest.fail("differentiated"))
    with torch.no_grad():
        found = objective(student, teacher, ids, head)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())


@pytest.mark.parametrize("bad", [dict(kl=-1.0), dict(kl=0.0), dict(kl=float("nan"))])
def test_bad_objectives_are_refused(bad):
    with pytest.raises(InputError, match="objective"):
        Objective(**bad)
