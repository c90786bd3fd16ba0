"""What ranks deal out among themselves. What they sum and agree on: test_parallel.py, in real processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotpruner.distributed import Ranks


def of(rank: int, size: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


@given(st.integers(0, 20), st.integers(1, 6))
def test_every_item_counts_once_and_all_ranks_get_equally_many(items, size):
    shares = [list(of(rank, size).share(range(items))) for rank in range(size)]
    assert sorted(item for share in shares for item, counts in share if counts) == list(range(items))
    assert {len(share) for share in shares} == {-(-items // size)}


def test_alone_nothing_changes_and_nobody_waits():
    ranks, flags = Ranks.world(), torch.tensor([True, False])
    assert (ranks.rank, ranks.size) == (0, 1)
    assert torch.equal(ranks.any(flags), flags)
    assert torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
    assert ranks.broadcast(flags, 0) is flags
    with pytest.raises(ZeroDivisionError), ranks.waiting():
        1 / 0  # noqa: B018
