"""Run a model block by block over a calibration set: what each decoder block gets is kept, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.families import family_of, module_at
from rotpruner.precision import autocast


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    pass


def _moved(value: Any, device: torch.device) -> Any:
    """The tensors of nested dicts and tuples, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value


@contextmanager
def visiting(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have a block on a device for the time of a `with` block; None leaves it where it is."""
    home = next(block.parameters()).device
    block.to(device or home)
    try:
        yield
    finally:
        block.to(home)


class BlockReplay:
    """The inputs of one decoder block for every batch, moved forward from block to block.

    A block is called with exactly the arguments that the model gave it: attention masks, rotary position
    embeddings and whatever else its version of `transformers` passes.

    Args:
        model: plain causal language model in evaluation mode.
        batches: token ids, each (sequences, seq_len).
        dtype: of matrix products, see `rotpruner.precision.autocast`; None keeps the model's.
        device: where blocks are when they are run (see `visiting`); states wait where the model is. None: there.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._home = batches[0].device
        self._device = device or self._home
        self._autocast = autocast(self._device, dtype)
        self.blocks = module_at(model, family_of(model.config).blocks)
        # Blocks may get arguments of their own (sliding and full attention take turns in Gemma): ask for each.
        self._arguments: list[list[dict[str, Any]]] = [[] for _ in self.blocks]
        #: What the next block gets, (sequences, seq_len, d) for each batch.
        self.states: list[Tensor] = []
        for input_ids in batches:
            self._record(model, input_ids)

    @torch.no_grad()
    def _record(self, model: nn.Module, input_ids: Tensor) -> None:
        """Let the model hand its blocks their arguments, without computing the blocks."""

        def skip(layer: int, block: nn.Module) -> Any:
            own = vars(block).get("forward")

            def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
                if layer == 0:
                    self.states.append(hidden_states)
                self._arguments[layer].append(kwargs)
                if layer == len(self.blocks) - 1:
                    raise _Reached
                return hidden_states

            block.forward = forward
            return own

        held = [skip(layer, block) for layer, block in enumerate(self.blocks)]
        try:
            model(input_ids=input_ids, use_cache=False)
        except _Reached:
            pass
        finally:
            for block, own in zip(self.blocks, held, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own

    @torch.no_grad()
    def run(self, layer: int) -> list[Tensor]:
        """The outputs of a block for every batch, (sequences, seq_len, d) each."""
        with self._autocast:  # around the loop: it casts each weight once
            return [self._run_one(layer, batch) for batch in range(len(self.states))]

    def _run_one(self, layer: int, batch: int) -> Tensor:
        arguments = _moved(self._arguments[layer][batch], self._device)
        output = self.blocks[layer](self.states[batch].to(self._device), **arguments)
        return (output[0] if isinstance(output, tuple) else output).to(self._home)

    @torch.no_grad()
    def watch(self, layer: int, modules: Sequence[nn.Module], behind: bool = False) -> Iterator[list[Tensor]]:
        """For every batch, what some modules of a block get, (sequences, seq_len, …) each.

        Args:
            layer: number of the block.
            modules: in the order in which data flows through them; what comes behind the last one is not run,
            behind: unless the block's output is wanted too, as the last item.
        """
        found: list[Tensor] = []

        def hook(last: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found.append(args[0])
                if last:
                    raise _Reached

            return keep

        stops = [not behind and module is modules[-1] for module in modules]
        handles = [module.register_forward_pre_hook(hook(last)) for module, last in zip(modules, stops, strict=True)]
        try:
            for batch in range(len(self.states)):
                found.clear()
                try:
                    with self._autocast:
                        found.append(self._run_one(layer, batch))
                except _Reached:
                    pass
                yield list(found)
        finally:
            for handle in handles:
                handle.remove()

    def advance(self, layer: int) -> None:
        """Go on to the next block with what this one gives now."""
        self.states = self.run(layer)
        self._arguments[layer] = []
