"""The modules of a model that run in the basis of the moment: linears that rotate and mask their weights, shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.layout import BlockLinear, by_group, residual_sublayers
from rotpruner.modeling_rotated import Passage, in_another_basis
from rotpruner.orthogonal import rotate_bias, rotate_features, rotate_weight
from rotpruner.placements import basis_changes
from rotpruner.rotations import basis_change, residual_at, sides


class Basis:
    """The rotations in which the linears of one model run at the moment, by space, then site; empty means dense."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.rotations: Mapping[str, Sequence[Tensor]] = {}
        self.pruned = False


#: The place of a linear, W' and M, both (O, I) → W' under its mask.
Masked = Callable[[BlockLinear, Tensor, Tensor], Tensor]


class RotatedLinear(nn.Linear):
    """A frozen decoder linear that runs in the basis of the moment: y = x (masked(Q_Bᵀ W Q_A, M))ᵀ + b Q_B.

    Args:
        linear: whose weight and bias it takes over.
        place: of the linear.
        basis: of the model, of the moment.
        masked: applies the mask.
        offload: leave the weight in main memory; it comes to where the input is at every call.
    """

    mask: Tensor | None

    def __init__(
        self, linear: nn.Linear, place: BlockLinear, basis: Basis, masked: Masked, offload: bool = False
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        if offload:
            # No parameter any more: what moves, saves or synchronises a module passes it by.
            del self.weight
            weight = linear.weight.detach().cpu()
            # Pinned memory is copied faster, and the host does not wait for it.
            self.weight = weight.pin_memory() if torch.cuda.is_available() else weight
        self.place, self.basis, self.masked = place, basis, masked
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        reads, writes = sides(self.basis.config, self.basis.rotations, self.place)
        weight = rotate_weight(self.weight.to(x.device, non_blocking=True), reads, writes)
        if self.basis.pruned and self.mask is not None:
            weight = self.masked(self.place, weight, self.mask)
        return F.linear(x, weight, rotate_bias(self.bias, writes))


def grouped(linears: Iterable[RotatedLinear]) -> list[list[RotatedLinear]]:
    """Linears, those that read one input together."""
    by_place = {linear.place: linear for linear in linears}
    return [[by_place[place] for place in members] for members in by_group(by_place)]


def check_offload(offload: bool, gradient_checkpointing: bool, sharded: bool = False) -> None:
    """Raise `InputError` if weights in main memory would not help, or are to be spread over devices as well."""
    if offload and not gradient_checkpointing:
        raise InputError(
            "offload keeps decoder weights in main memory, but without recomputation the backward pass would keep all "
            "that has come to the device: set gradient_checkpointing to true"
        )
    if offload and sharded:
        raise InputError(
            "offload keeps whole decoder weights in each process's main memory, and ModelParallelStrategy would shard "
            "them over devices: leave one of them out, or use ddp"
        )


class BasisChange(Passage):
    """The shortcut of one sublayer, of the current rotations."""

    def __init__(self, basis: Basis, number: int) -> None:
        super().__init__()
        self.basis, self.number = basis, number

    def after(self, stream: Tensor, output: Tensor) -> Tensor:
        T = basis_change(self.basis.config, self.basis.rotations, self.number)
        return output if T is None else in_another_basis(stream, output, T)


def turn_residual_ends(base: PreTrainedModel, basis: Basis) -> None:
    """Hook a model, so that its stream enters the basis after the embeddings and leaves it at the final norm."""
    family = family_of(base.config)

    def enter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        Q = residual_at(base.config, basis.rotations, 0)
        return output if Q is None else rotate_features(output, Q)

    def leave(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        Q = residual_at(base.config, basis.rotations, -1)
        return args if Q is None else (rotate_features(args[0], Q.mT), *args[1:])

    for path in family.embeddings:
        base.get_submodule(path).register_forward_hook(enter)
    base.get_submodule(family.final_norm).register_forward_pre_hook(leave)


def change_bases(base: PreTrainedModel, basis: Basis, sites: int) -> None:
    """Attach a `BasisChange` to each sublayer whose residual connection lies between two of so many matrices."""
    blocks, sublayers = base.get_submodule(family_of(base.config).blocks), residual_sublayers(base.config)
    for number in basis_changes(base.config, sites):
        layer, place = divmod(number, len(sublayers))
        norm, writer = (blocks[layer].get_submodule(path) for path in sublayers[place])  # type: ignore[index]
        BasisChange(basis, number).attach(norm, writer)
