"""How the core tells whoever calls it how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iteration that takes long, as a progress bar does."""

    def __call__(self, items: Sequence[T], description: str, /) -> Iterable[T]:
        """The same items, one by one."""


def unseen(items: Sequence[T], description: str, /) -> Iterable[T]:
    """A `Progress` that shows nothing."""
    return items
