"""`python -m experiments benchmark WHAT`: timings, each against its floor in one run."""

from __future__ import annotations

from importlib import import_module

from rotpruner.errors import InputError

#: What to time → module with a `main(arguments)`.
BENCHMARKS = {"step": "experiments.benchmark_step", "inference": "experiments.benchmark_inference"}


def main(arguments: list[str]) -> None:
    """Run one benchmark."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: python -m experiments benchmark {{{','.join(BENCHMARKS)}}} [options]\n\n{__doc__}")
        return
    if not arguments or arguments[0] not in BENCHMARKS:
        raise InputError(f"benchmark what? choose one of {', '.join(BENCHMARKS)}: benchmark step --json")
    import_module(BENCHMARKS[arguments[0]]).main(arguments[1:])
