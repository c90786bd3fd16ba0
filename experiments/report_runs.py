"""What a report reads of finished run directories."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rotpruner.artifacts import read_json
from rotpruner.diagnostics import HEAT_MAP, LAYERS
from rotpruner.errors import InputError
from rotpruner.perplexity import gap

#: Where a run directory has that of the first of two fits.
FIRST_FIT = "first-fit"

#: (x, y) of each point; x is a step where nothing else is said.
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        label: what tells it from the other runs of the report.
        directory: where it lives.
        results: `results.json`: rows, budget, config, commit and device.
        curves: metric → [(step, value), …] from the CSV logs, those of resumed runs joined.
        linears: the rows of `layers.json`; empty for runs that have none.
        heat_map: (name of a linear, {"own", "learned": (rows, columns)}), if there is one.
    """

    label: str
    directory: Path
    results: dict[str, Any]
    curves: dict[str, Curve]
    linears: list[dict[str, Any]]
    heat_map: tuple[str, dict[str, Tensor]] | None

    @property
    def command(self) -> str:
        """The command that makes this run again, elsewhere."""
        config = shlex.quote(str(self.directory / "config.yaml"))
        command = "recover" if "teacher" in self.results["config"].get("model", {}) else "fit"
        return f"python -m experiments {command} -c {config} --trainer.default_root_dir NEW_DIRECTORY"

    def gap(self, row: dict[str, Any], text: str) -> float:
        """G = ln ppl − ln ppl of the dense model, in nats per token; NaN where either cannot be had."""
        dense = next((other["ppl"].get(text) for other in self.results["rows"] if other["name"] == "dense"), None)
        ppl = row["ppl"].get(text)
        return math.nan if dense is None or ppl is None else gap(ppl, dense)

    @property
    def texts(self) -> list[str]:
        """Names of the test texts."""
        return list(self.results["rows"][0]["ppl"])


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read finished runs.

    Raises:
        InputError: a directory is not that of a finished run, or a file in it is damaged.
    """
    names = [directory.resolve().name for directory in directories]
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise InputError("a run is named twice; name each run directory once")
    return [
        _read(directory, name if names.count(name) == 1 else str(directory))
        for directory, name in zip(directories, names, strict=True)
    ]


def _read(directory: Path, label: str) -> Run:
    path = directory / "results.json"
    if not path.is_file():
        raise InputError(f"run '{directory}' has no results.json; give the directory of a run that has ended")
    results = _json(path)
    if not isinstance(results, dict) or not results.get("rows"):
        raise InputError(f"'{path}' holds no rows; run the fit again")
    layers = directory / LAYERS
    return Run(
        label,
        directory,
        results,
        read_curves(directory),
        _json(layers)["linears"] if layers.is_file() else [],
        _heat_map(directory / HEAT_MAP),
    )


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise InputError(f"'{path}' is damaged ({error}); run the fit again") from error


def read_curves(directory: Path) -> dict[str, Curve]:
    """Metric → points of a run's CSV logs; those of a second fit count on from the steps of the first."""
    curves, first = _logged(directory), directory / FIRST_FIT
    if not (first / "results.json").is_file():
        return curves
    done, before = _json(first / "results.json")["budget"]["steps"], _logged(first)
    return {
        name: before.get(name, []) + [(step + done, value) for step, value in curves.get(name, [])]
        for name in dict.fromkeys([*before, *curves])
    }


def _logged(directory: Path) -> dict[str, Curve]:
    """Metric → points; later logs win where a resumed run has repeated a step."""
    found: dict[str, dict[int, float]] = {}
    # Lightning counts them up; times of files do not survive every copy.
    logs = sorted((directory / "logs").glob("version_*/metrics.csv"), key=lambda path: (len(str(path)), path))
    for path in logs:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                for name, value in line.items():
                    with suppress(TypeError, ValueError):  # a line that was cut, by a full disk perhaps
                        if value and name not in ("epoch", "step"):
                            found.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def _heat_map(path: Path) -> tuple[str, dict[str, Tensor]] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()["linear"], {basis: file.get_tensor(basis) for basis in ("own", "learned")}
    except SafetensorError as error:
        raise InputError(f"'{path}' is damaged ({error}); run the fit again") from error
