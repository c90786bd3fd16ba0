"""`python -m experiments recover`: train the weights that pruning has left, under its mask, from a config file."""

from __future__ import annotations

from experiments.fit import FitCLI, run_to_the_end
from lightning_modules.recovery_module import RecoveryModule


def main(arguments: list[str]) -> None:
    """Parse, check, train; everything lands in the run directory."""
    run_to_the_end(FitCLI(arguments, RecoveryModule, "recover"))
