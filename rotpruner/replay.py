"""Run a model block by block over a calibration set: what each decoder block gets is kept, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rotpruner.families import family_of
from rotpruner.layout import module_at
from rotpruner.precision import autocast
from rotpruner.progress import Progress, unseen
from rotpruner.statistics import Moment, watch_inputs


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    pass


def _sharing(new: Any, known: Any) -> Any:
    """Arguments of a block with the tensors of another batch where these are equal: masks and positions mostly are."""
    if isinstance(new, Tensor):
        same = isinstance(known, Tensor) and new.dtype == known.dtype and torch.equal(new, known)
        return known if same else new
    if isinstance(new, tuple) and type(known) is type(new) and len(known) == len(new):
        return tuple(map(_sharing, new, known))
    if isinstance(new, dict) and isinstance(known, dict):
        return {name: _sharing(value, known.get(name)) for name, value in new.items()}
    return new


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
def visiting(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have a module on a device for the time of a `with` block; None leaves it where it is."""
    home = next(module.parameters()).device
    module.to(device or home)
    try:
        yield
    finally:
        module.to(home)


class BlockReplay:
    """The inputs of one decoder block for every batch, moved forward from block to block.

    A block is called with exactly the arguments that the model gave it: attention masks, rotary position
    embeddings and whatever else its version of `transformers` passes.

    Args:
        model: plain causal language model in evaluation mode.
        batches: token ids, each (sequences, seq_len).
        dtype: of matrix products, see `rotpruner.precision.autocast`; None keeps the model's. A model of 16 bits keeps
            them: its states would become float32 between its own float16 and bfloat16.
        device: where blocks are when they are run (see `visiting`); states wait where the model is. None: there.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._model: Any = model
        self._batches = batches
        self._home = batches[0].device
        self._device = device or self._home
        narrow = next(model.parameters()).dtype.itemsize < 4
        self._autocast = autocast(self._device, None if narrow else dtype)
        self.blocks = module_at(model, family_of(model.config).blocks)
        # Blocks may get arguments of their own (sliding and full attention take turns in Gemma): ask for each.
        self._arguments: list[list[dict[str, Any]]] = [[] for _ in self.blocks]
        #: What the next block gets, (sequences, seq_len, d) for each batch.
        self.states: list[Tensor] = []
        for input_ids in batches:
            self._record(input_ids)

    @torch.no_grad()
    def _record(self, input_ids: Tensor) -> None:
        """Let the model hand its blocks their arguments, without computing the blocks."""

        def keep(layer: int, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            if layer == 0:
                self.states.append(hidden_states)
            known = self._arguments[layer]
            known.append(_sharing(kwargs, known[-1]) if known else kwargs)
            if layer == len(self.blocks) - 1:
                raise _Reached
            return hidden_states

        with self._instead_of_blocks(keep), suppress(_Reached):
            self._model(input_ids=input_ids, use_cache=False)

    @contextmanager
    def _instead_of_blocks(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Have the model call forward(layer, hidden_states, …) where it calls its blocks, for a `with` block."""
        own = [vars(block).get("forward") for block in self.blocks]
        for layer, block in enumerate(self.blocks):
            block.forward = partial(forward, layer)
        try:
            yield
        finally:
            for block, held in zip(self.blocks, own, strict=True):
                del block.forward
                if held is not None:
                    block.forward = held

    @torch.no_grad()
    def run(self, layer: int) -> list[Tensor]:
        """The outputs of a block for every batch, (sequences, seq_len, d) each."""
        with self._autocast:  # around the loop: it casts each weight once
            return [self._output(layer, batch).to(self._home) for batch in range(len(self.states))]

    @torch.no_grad()
    def pass_by(self, layer: int) -> None:
        """Run a block for every batch, for hooks that look on; its outputs go nowhere."""
        with self._autocast:
            for batch in range(len(self.states)):
                self._output(layer, batch)

    def _output(self, layer: int, batch: int) -> Tensor:
        """What a block gives for a batch, where it is run."""
        arguments = _moved(self._arguments[layer][batch], self._device)
        output = self.blocks[layer](self.states[batch].to(self._device), **arguments)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def watch(self, layer: int, modules: Sequence[nn.Module], with_output: bool = False) -> Iterator[list[Tensor]]:
        """For every batch, what some modules of a block get, (sequences, seq_len, …) each.

        Args:
            layer: number of the block.
            modules: in the order in which data flows through them; what follows the last one is not run.
            with_output: run the whole block, and add its output as the last item.
        """
        found: list[Tensor] = []

        def hook(last: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found.append(args[0].to(self._home))
                if last:
                    raise _Reached

            return keep

        stops = [not with_output and module is modules[-1] for module in modules]
        handles = [module.register_forward_pre_hook(hook(last)) for module, last in zip(modules, stops, strict=True)]
        try:
            for batch in range(len(self.states)):
                found.clear()
                with suppress(_Reached), self._autocast:
                    found.append(self._output(layer, batch).to(self._home))
                yield list(found)
        finally:
            for handle in handles:
                handle.remove()

    def advance(self, layer: int) -> None:
        """Go on to the next block with what this one gives now."""
        self.states = self.run(layer)
        self._arguments[layer] = []

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """After the last block: what the model makes of the states, its final ones (sequences, seq_len, d)."""

        def hand_on(batch: int, layer: int, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return self.states[batch] if layer == len(self.blocks) - 1 else hidden_states

        found = []
        for batch, input_ids in enumerate(self._batches):
            with self._instead_of_blocks(partial(hand_on, batch)), self._autocast:
                found.append(self._model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)
        return found


def final_states(
    model: nn.Module,
    batches: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
    description: str = "the model",
) -> list[Tensor]:
    """Final hidden states (sequences, seq_len, d) of a plain model for every batch, kept where the model is.

    Args:
        model, batches, dtype: as in `BlockReplay`.
        device: where one block after the other is run; None is where the model is.
        progress, description: wraps the iteration over blocks, and what it is called.
    """
    replay = BlockReplay(model, batches, dtype, device)
    for layer, block in enumerate(progress(list(replay.blocks), description)):
        with visiting(block, device):
            replay.advance(layer)
    return replay.finish()


@torch.no_grad()
def moments_by_block(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    block_widths: Mapping[str, int],
    batches: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress = unseen,
) -> dict[str, Moment]:
    """The same as `rotpruner.statistics.gather_moments`, but one block after the other is run on a device.

    Args:
        model, batches, dtype, device: as in `final_states`.
        linears, block_widths: of the decoder blocks; as in `gather_moments`.
        progress: wraps the iteration over blocks, for a progress bar.
    """
    if not linears:
        return {}
    replay, moments = BlockReplay(model, batches, dtype, device), dict[str, Moment]()
    for layer, block in enumerate(progress(list(replay.blocks), "calibration")):
        inside = set(block.modules())
        own = {name: linear for name, linear in linears.items() if linear in inside}
        with visiting(block, device), watch_inputs(own, block_widths) as sums:
            replay.advance(layer)
        moments |= {name: moment.to(batches[0].device) for name, moment in sums.means().items()}
    return moments
