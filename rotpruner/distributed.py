"""Several processes, one model: what they split, sum and agree on.

Everything that ranks do together goes through a `Ranks`, which is alone unless it is given a process group; code
that runs on one rank only can thus use the same functions without waiting for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")

#: How long the first rank may work while the others wait.
_PATIENCE = timedelta(days=7)


class Ranks:
    """The processes of a group; this process alone without one.

    Args:
        group: all of whose ranks make the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @classmethod
    def world(cls) -> Ranks:
        """All processes, where `torch.distributed` has been initialised."""
        return cls(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)

    def share(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This rank's items, dealt out in turn, and whether each counts.

        All ranks get equally many, because a sharded model runs on all of them or on none: a rank without an item
        of its own in the last round gets another's, which does not count.
        """
        items = iter(items)
        while dealt := tuple(islice(items, self.size)):
            counts = self.rank < len(dealt)
            yield dealt[self.rank if counts else 0], counts

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; alike on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flags: Tensor) -> Tensor:
        """Where any rank's boolean flags are set."""
        return self.sum(flags.int()) > 0

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of rank `source`, which must be contiguous, in place of what the others hold."""
        if self.size > 1:
            # Not every backend knows booleans.
            dist.broadcast(tensor.view(torch.uint8), group=self.group, group_src=source)
        return tensor

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """At the end of the `with` block wait for the slowest rank, up to a week.

        Collectives give up after half an hour (gloo) or ten minutes (NCCL); this one is for work that the first
        rank does while the others have none. A rank that fails or dies ends the waiting of the others.

        Raises:
            SystemExit: another rank failed, which says why itself.
        """
        if self.size == 1:
            yield
            return
        assert self.group is not None
        ranks = dist.get_process_group_ranks(self.group)
        patient = dist.new_group(ranks, backend="gloo", timeout=_PATIENCE)
        failed = torch.zeros(1)
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # the others may be gone, and this rank's own failure is what counts
                dist.all_reduce(failed.fill_(1), group=patient)
            raise
        dist.all_reduce(failed, group=patient)
        dist.destroy_process_group(patient)
        if failed:  # one status for the job: launchers kill the rest, which may be about to speak, where another fails
            raise SystemExit(0 if self.rank else 1)


def whole(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor with all its shards, gathered from all ranks if it is sharded; on a device, if one is given."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.to(device or found.device)


#: What gloo, NCCL and torch's store say where a process that they talk to is gone.
_LOST = (
    "gloo/transport",
    "ncclRemoteError",
    "Connection closed by peer",
    "Connection reset by peer",
    "got 0 bytes",
)


def lost_rank(error: BaseException) -> bool:
    """Whether a collective has failed because another process ended, or does not answer."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
