"""What calibration tells of each linear's input: its second moment H = E[x xᵀ], gathered once.

The moment is gathered in the original basis and rotated on demand, H' = Qᵀ H Q, so that no step of
training looks at calibration activations again. It is stored by diagonal blocks (B, n, n), B·n = I,
as large as the rotation of the input's space needs: the whole matrix for the residual stream, one
block a head for values, single entries where nothing rotates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from rotpruner.distributed import Ranks
from rotpruner.errors import InputError
from rotpruner.orthogonal import is_order, rotate_features
from rotpruner.precision import at_least_float32

T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """Second moment of one input, by diagonal blocks, seen from a rotated basis.

    Attributes:
        blocks: (B, n, n) float32 or float64, in the basis in which it was gathered.
        rotation: (b, n, n) blocks of Q, an order (I,), or None for that basis itself.
        origin: this moment in that basis, if it is seen from another one.
    """

    blocks: Tensor
    rotation: Tensor | None = None
    origin: Moment | None = None

    def rotate(self, Q: Tensor | None) -> Moment:
        """The same moment seen from x Q. Nothing is computed until it is asked for."""
        assert self.rotation is None, "moments are rotated from the basis in which they were gathered"
        return Moment(self.blocks, Q, self)

    def apart(self) -> Moment:
        """The same, not rotated, for who looks once: what is derived from it, such as an inverse, is gone with it."""
        assert self.rotation is None
        return Moment(self.blocks)

    def to(self, device: torch.device | str) -> Moment:
        """The same moment on another device."""
        moved = Moment(self.blocks.to(device))
        return moved if self.rotation is None else moved.rotate(self.rotation.to(device))

    @cached_property
    def _diagonal(self) -> Tensor:
        if self.rotation is None:
            return self.blocks.diagonal(dim1=-2, dim2=-1).flatten()
        if is_order(self.rotation):
            return self.blocks.diagonal(dim1=-2, dim2=-1).flatten()[self.rotation]
        count, n = self.rotation.shape[0], self.rotation.shape[-1]
        Q = self.rotation.to(self.blocks.dtype)
        H = self._heads(n)
        Q = Q.repeat_interleave(H.shape[0] // count, dim=0)
        return ((H @ Q) * Q).sum(-2).flatten()

    def _heads(self, n: int) -> Tensor:
        """The diagonal blocks of width n, (I/n, n, n)."""
        if self.blocks.shape[-1] == n:
            return self.blocks
        heads = rearrange(self.blocks, "b (h i) (k j) -> b h i k j", i=n, j=n)
        return rearrange(heads.diagonal(dim1=1, dim2=3), "b i j h -> (b h) i j")

    def seen_blocks(self) -> Tensor:
        """The diagonal blocks in the basis of the moment, (B, n, n): as wide as they were gathered."""
        if self.rotation is None:
            return self.blocks
        if is_order(self.rotation):
            return self.blocks[self.rotation] if self.blocks.shape[-1] == 1 else self._full[None]
        Q = self.rotation.to(self.blocks.dtype)
        width, n = self.blocks.shape[-1], Q.shape[-1]
        if width != n:  # gathered whole, rotated by head
            return rotate_features(rotate_features(self.blocks[0], Q).mT, Q)[None]
        Q = Q.repeat_interleave(len(self.blocks) // len(Q), dim=0)
        return Q.mT @ self.blocks @ Q

    def diagonal(self) -> Tensor:
        """E[x_j²] of every feature, (I,)."""
        return self._diagonal

    @cached_property
    def _full(self) -> Tensor:
        assert self.blocks.shape[0] == 1, "only the diagonal blocks of this moment were gathered"
        H = self.blocks[0]
        if self.rotation is None:
            return H
        return rotate_features(rotate_features(H, self.rotation).mT, self.rotation)

    def full(self) -> Tensor:
        """E[x xᵀ], (I, I). Gathered only for pruners with `needs = "full"`."""
        return self._full

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def inverse(self, key: Hashable, compute: Callable[[Moment], Tensor]) -> Moment:
        """(H + λI)⁻¹ as a moment seen from the same basis, where rotations act on it as they do on H.

        Args:
            key: of `compute`, which inverts once what was gathered, whatever bases are asked for later.
            compute: moment → (I, I).
        """
        gathered = self.origin or self
        inverted = gathered.derive(("inverse", key), lambda moment: Moment(compute(moment)[None]))
        return inverted.rotate(self.rotation)

    def derive(self, key: Hashable, compute: Callable[[Moment], T]) -> T:
        """`compute(self)`, once for each `key`: what linears that read one input share, such as a factorisation."""
        if key not in self._derived:
            self._derived[key] = compute(self)
        return self._derived[key]


class MomentSums:
    """Sums of second moments while some linears are being watched.

    Attributes:
        counting: whether what runs now is added; if not, it only makes room for the sums of other ranks.
    """

    def __init__(self) -> None:
        self.counting = True
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, name: str, x: Tensor, n: int) -> None:
        """Add inputs (…, I) of a linear, keeping diagonal blocks of width n."""
        x = x.detach().flatten(0, -2)
        self._dtypes[name] = x.dtype
        x = x.to(at_least_float32(x.dtype))
        heads = rearrange(x, "t (b n) -> b n t", n=n)
        if not self.counting:
            self._sums.setdefault(name, heads.new_zeros(len(heads), n, n))
            self._tokens.setdefault(name, 0)
            return
        # A caller's autocast would take the products in bfloat16, and sum them up in it.
        with torch.autocast(x.device.type, enabled=False):
            product = heads.square().sum(-1, keepdim=True) if n == 1 else heads @ heads.mT
        if name in self._sums:
            self._sums[name] += product  # in place: it may be as large as the largest weights
        else:
            self._sums[name] = product
        self._tokens[name] = self._tokens.get(name, 0) + len(x)

    def means(self, ranks: Ranks | None = None) -> dict[str, Moment]:
        """The moments, averaged over all tokens that any of the ranks has seen; alike on all of them.

        Each sum becomes its mean in place, as all of them together may be as large as the model; there are none left.

        Raises:
            InputError: some are not finite.
        """
        ranks = ranks or Ranks()
        moments = {}
        for name in list(self._sums):
            total = self._sums.pop(name)
            tokens = ranks.sum(torch.tensor(self._tokens[name], device=total.device))
            mean = ranks.sum(total).div_(tokens)
            if not mean.isfinite().all():  # pruners would choose by comparisons with NaN, and nobody would see it
                raise InputError(
                    f"inputs of {name} overflow {str(self._dtypes[name]).removeprefix('torch.')}, or are NaN; "
                    "load the model in bfloat16 or float32"
                )
            moments[name] = Moment(mean)
        return moments


@contextmanager
def watch_inputs(linears: Mapping[str, nn.Module], block_widths: Mapping[str, int]) -> Iterator[MomentSums]:
    """Sum up the second moments of some linears' inputs while the `with` block runs their model.

    Args:
        linears: modules to watch, by name; one of each group that reads the same input is enough.
        block_widths: for each name, the width n of the diagonal blocks to keep; it divides the input width.
    """
    sums = MomentSums()

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: sums.add(name, args[0], block_widths[name])

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def gather_moments(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    block_widths: Mapping[str, int],
    batches: Iterable[Tensor],
    ranks: Ranks | None = None,
) -> dict[str, Moment]:
    """Second moments of the inputs of some linears, averaged over all tokens of batches (sequences, seq_len).

    The model is called as `model(input_ids=…)` on every batch, in its own basis; for the other arguments see
    `watch_inputs`. Sums are float32, float64 for a float64 model. Several ranks, each of which gives all batches,
    share the work; the result is alike on all of them.
    """
    if not linears:
        return {}
    ranks = ranks or Ranks()
    with watch_inputs(linears, block_widths) as sums:
        for input_ids, sums.counting in ranks.share(batches):
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    return sums.means(ranks)
