"""What a frozen base and its student share: a base that runs without dropout, and its final states, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotpruner.dense_cache import DenseCache
from rotpruner.distributed import Ranks
from rotpruner.families import family_of
from rotpruner.objectives import Head
from rotpruner.replay import visiting


def ready_to_learn(base: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    """The same model in training mode with its dropout off.

    In evaluation mode transformers skips gradient checkpointing in silence.
    """
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if gradient_checkpointing:
        # transformers 5.0 knows this by its old name only.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return base.train()


class Teacher:
    """A dense model that only teaches; frozen, and no part of the module that learns from it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: PreTrainedModel | None = model.requires_grad_(False).eval()

    @property
    def model(self) -> PreTrainedModel:
        """The model.

        Raises:
            RuntimeError: it has left.
        """
        if self._model is None:
            raise RuntimeError("the teacher has left, learning is over")
        return self._model

    def on(self, device: torch.device) -> PreTrainedModel:
        """The model, brought to a device, where it stays: Lightning does not know of it."""
        if self.model.device != device:
            self.model.to(device)  # type: ignore[arg-type]
        return self.model

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Final hidden states (batch, seq_len, d) for ids (batch, seq_len), on the device of these."""
        return self.on(input_ids.device).base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def cache(self, device: torch.device, ranks: Ranks) -> DenseCache:
        """Of what the model gives on a device, to which it is brought."""
        model = self.on(device)
        return DenseCache(model, model.state_dict(), ranks)

    def leave(self) -> None:
        """Let go of the model, once learning is over."""
        self._model = None


class DenseStates:
    """Final hidden states of a dense model, kept by the rows of a calibration tensor.

    Args:
        run: token ids (1, seq_len) → states (1, seq_len, d), without gradients.
        ranks: that run the model together.
        open_cache: where they stay for later runs, asked for once, with the device of the first ids; None is nowhere.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        ranks: Ranks,
        open_cache: Callable[[torch.device], DenseCache] | None = None,
    ) -> None:
        self._run, self._ranks, self._open_cache = run, ranks, open_cache
        self._cache: DenseCache | None = None
        #: Of each row its ids (seq_len,), which make sure of it, and its states (seq_len, d), on the CPU.
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, input_ids: Tensor, index: Tensor | None = None) -> Tensor:
        """States (batch, seq_len, d) for ids (batch, seq_len) of the rows `index` (batch,); None keeps nothing."""
        rows = [None] * len(input_ids) if index is None else index.tolist()
        if self._cache is None and self._open_cache is not None:
            self._cache = self._open_cache(input_ids.device)
        known = [row is not None and self._knows(row, ids.cpu()) for row, ids in zip(rows, input_ids, strict=True)]
        unknown = torch.tensor(known, device=input_ids.device).logical_not()
        states = []
        # Row by row, so that a row's states do not depend on the batch that it first came in; and on all ranks
        # where one needs it, because a sharded model runs on all of them or on none.
        for row, ids, run in zip(rows, input_ids, self._ranks.any(unknown).tolist(), strict=True):
            if run:
                state = self._run(ids[None])[0]
                if row is not None:
                    self.kept[row] = ids.cpu(), state.cpu()
                    if self._cache is not None:
                        self._cache.keep_states(ids, state)
            else:
                state = self.kept[row][1].to(input_ids.device)
            states.append(state)
        return torch.stack(states)

    def _knows(self, row: int, ids: Tensor) -> bool:
        """Whether the states of a row with such ids (seq_len,) are kept, or were found in the cache."""
        if row in self.kept and torch.equal(self.kept[row][0], ids):
            return True
        found = None if self._cache is None else self._cache.states(ids)
        if found is not None:
            self.kept[row] = ids, found
        return found is not None

    def forget(self) -> None:
        """Let go of what is kept; it is computed again if it is asked for."""
        self.kept.clear()


class _LanguageHead:
    def __init__(self, model: PreTrainedModel) -> None:
        self._config, self._family = model.config, family_of(model.config)
        self.module = model.get_submodule(self._family.head)

    def __call__(self, states: Tensor, /) -> Tensor:
        return self._family.after_head(self._config, self.module(states))

    def parameters(self) -> Iterable[Tensor]:
        return self.module.parameters()


def head_of(model: PreTrainedModel) -> Head:
    """Final hidden states (…, d) → logits (…, V)."""
    return _LanguageHead(model)


@contextmanager
def head_at(model: PreTrainedModel, device: torch.device | None) -> Iterator[Head]:
    """`head_of` a model, which is on a device for the time of a `with` block; None leaves it where it is."""
    head = _LanguageHead(model)
    with visiting(head.module, device):
        yield head
