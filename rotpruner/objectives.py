"""What the pruned model is trained for, as a weighted sum of terms.

Shapes: N = tokens, d = width of the residual stream, V = vocabulary. Logits are made from final hidden states chunk by
chunk, and differentiated before the next chunk's are made: no (N, V) tensor is ever held, and none is made twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.memory import release_freed
from rotpruner.piecewise import Named, sum_of_pieces
from rotpruner.precision import at_least_float32


class Head(Protocol):
    """Final hidden states (…, d) → logits (…, V), as `nn.Linear` does."""

    def __call__(self, states: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterable[Tensor]: ...


#: Tokens whose logits are held at once: 100 MB of float32 at a vocabulary of 49k.
CHUNK = 512


@dataclass(frozen=True)
class Objective:
    """Weights of the terms; a term of weight zero is not computed.

    Attributes:
        cross_entropy: of the next token, in nats per token.
        kl: KL(dense ‖ pruned) of the next-token distributions, in nats per token.
        cosine: 1 − the cosine similarity of the final states of the dense and the pruned model, mean over tokens.
        entropy: of importance, in nats per row or column, see `rotpruner.concentration`; this and the next one need no
            run of the model.
        lost_mass: the share of importance, in [0, 1], that the masks remove.
    """

    cross_entropy: float = 0.0
    kl: float = 1.0
    cosine: float = 0.0
    entropy: float = 0.0
    lost_mass: float = 0.0

    def __post_init__(self) -> None:
        weights = asdict(self)
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise InputError(f"objective weight {name}={value:g} is not a finite number >= 0")
        if not any(weights.values()):
            raise InputError(f"every objective weight is 0; give at least one of {', '.join(weights)}")

    @property
    def runs_model(self) -> bool:
        """Whether a term looks at the pruned model's outputs."""
        return self.cross_entropy > 0 or self.needs_teacher

    @property
    def needs_importance(self) -> bool:
        """Whether a term looks at the importance of weights."""
        return self.entropy > 0 or self.lost_mass > 0

    @property
    def needs_teacher(self) -> bool:
        return self.kl > 0 or self.cosine > 0

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        input_ids: Tensor,
        head: Head,
        dense_head: Head | None = None,
    ) -> dict[str, Tensor]:
        """The terms that look at outputs.

        Args:
            student, teacher: final hidden states of the pruned and the dense model in the original
                basis, (batch, seq_len, D); the teacher may be None if `needs_teacher` is false.
            input_ids: (batch, seq_len); the last position has no target.
            head: hidden states (…, d) → logits (…, V).
            dense_head: the same for the teacher's states, where that is another one.

        Returns:
            `{term: value, …}`, float32 scalars, means over tokens.
        """
        terms: dict[str, Tensor] = {}
        states = student[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten()
        dense = None if teacher is None else teacher[:, :-1].flatten(0, 1)
        if self.cross_entropy:
            terms["cross_entropy"] = _mean(_cross_entropy, states, targets, head)
        if self.kl:
            assert dense is not None
            terms["kl"] = _mean(partial(_kl, dense_head=dense_head or head), states, dense, head)
        if self.cosine:
            assert dense is not None
            terms["cosine"] = 1 - F.cosine_similarity(_widened(states), _widened(dense), dim=-1).mean()
        return terms

    def weighted(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`{"loss": their weighted sum, term: value, …}`."""
        loss = torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}


def _mean(term: Callable[[Tensor, Tensor, Head], Tensor], states: Tensor, other: Tensor, head: Head) -> Tensor:
    def sum_of(number: int, part: Tensor, chunks: Named) -> Tensor:
        return term(chunks["states"][number], part, head)[None]

    sums = [partial(sum_of, number, part) for number, part in enumerate(other.split(CHUNK))]
    learning = [weight for weight in head.parameters() if weight.requires_grad]
    release_freed(states.device)  # of the blocks; logits are the largest tensors of a step
    return sum_of_pieces(sums, {"states": states.split(CHUNK)}, learning)[0] / len(states)


def _widened(x: Tensor) -> Tensor:
    return x.to(at_least_float32(x.dtype))


def _cross_entropy(states: Tensor, targets: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(_widened(head(states)), targets, reduction="sum")


def _kl(states: Tensor, dense: Tensor, head: Head, dense_head: Head) -> Tensor:
    with torch.no_grad():
        expected = _widened(dense_head(dense)).log_softmax(-1)
    return F.kl_div(_widened(head(states)).log_softmax(-1), expected, reduction="sum", log_target=True)
