"""Pruners, one a file, behind one protocol."""

from rotpruner.pruners.base import PRUNERS, Pruner, resolve_pruner

__all__ = ["PRUNERS", "Pruner", "resolve_pruner"]
