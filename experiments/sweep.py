"""`python -m experiments sweep`: run every row of a table, one command a row, and keep each row's result.

A sweep file is YAML: a `title`, the `command` (prune, fit or recover), its `arguments` (for the last two also
`config`, a list of files), and a `grid` of arguments whose combinations are the rows, or the `rows` one by one, each
with the arguments that it changes. `{seed}` in an argument is the row's own `seed`, and so with its other values;
`{runs}` is the directory of run directories. With `keep: true` a table of prunes keeps its models there, as fits do.
With `reference: true` the first row of a table of prunes is the dense model on the same texts, from which gaps are
counted. `--config experiments/configs/opt-125m.yaml` runs a table of fits on another model, as a table of its own.

```yaml
title: One-shot pruners
command: prune
arguments: {model: smollm2-135m, calibration: c4, text: [wikitext2, wikipedia_test]}
grid: {pruner: [magnitude, wanda], pattern: ["2:4", 0.5]}
reference: true
```
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import yaml

from callbacks.terminal import console
from experiments.arguments import Parser, at_least
from experiments.report_runs import read_curves
from rotpruner.artifacts import write_json
from rotpruner.errors import InputError
from rotpruner.provenance import commit

#: Name, the arguments that a row changes, command line.
_Planned = tuple[str, dict[str, Any], list[str]]

#: What a sweep may run.
_COMMANDS = ("prune", "fit", "recover")


def main(arguments: list[str]) -> None:
    """Run the rows that have no result yet; a row that fails is named and the others go on."""
    parser = Parser("sweep", "Run every row of a table of experiments; finished rows are kept.", prints_json=False)
    parser.add_argument("file", type=Path, help="a sweep file, as in experiments/sweeps")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="argument of every row, as YAML"
    )
    parser.add_argument("--config", type=Path, help="instead of a fit's first file: the same table on another model")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="where results are kept")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where fits have their run directories")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="rows at a time, all on the same device; what each says goes into files beside its runs then",
    )
    options = parser.parse_args(arguments)

    sweep, table = read_sweep(options.file), options.file.stem
    if options.config is not None:
        sweep["config"] = on_another(sweep, options.config)
        sweep["title"], table = f"{sweep['title']}, on {options.config.stem}", f"{table}-{options.config.stem}"
    settings = _settings(options.set)
    columns = list(dict.fromkeys(key for row in sweep["rows"] for key in row))
    own = [] if sweep["command"] == "prune" else ["trainer.default_root_dir"]
    if fixed := settings.keys() & {*columns, *own}:
        raise InputError(f"--set {', '.join(sorted(fixed))} would be overruled by the rows of {options.file}")
    sweep["arguments"].update(settings)
    directory, planned = options.results / table, list(rows(sweep, options.runs / table))
    names = [name for name, _, _ in planned]
    if alike := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"rows of {options.file} have the same name, {', '.join(sorted(alike))}, which is made of their values: "
            "give all rows the same keys"
        )
    if not all((directory / f"{name}.json").is_file() for name in names):
        write_json({"title": sweep["title"], "columns": columns}, directory / "sweep.json")
    runner = _Runner(directory, options.runs / table, options.jobs)
    if failed := [name for name, done in zip(names, runner.all(planned), strict=True) if not done]:
        where = "above" if options.jobs == 1 else f"in {options.runs / table}/ROW.log"
        raise InputError(
            f"rows that failed: {', '.join(failed)}; what they said stands {where}, run again to retry them"
        )


class _Runner:
    """Runs rows that have no result yet, some at a time.

    Args:
        directory: of results.
        runs: of the table's run directories, and of what rows say where several run at a time.
        jobs: rows at a time.
    """

    def __init__(self, directory: Path, runs: Path, jobs: int) -> None:
        self._directory, self._runs, self._jobs = directory, runs, jobs
        self._running: set[subprocess.Popen[str]] = set()

    def all(self, planned: list[_Planned]) -> list[bool]:
        """Whether each row has a result now. What ends this process ends the rows that run, and begins no other."""
        held = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        pool = ThreadPoolExecutor(self._jobs)
        try:
            return list(pool.map(self._one, planned))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._running):
                process.terminate()
            pool.shutdown()
            signal.signal(signal.SIGTERM, held)

    def _one(self, planned: _Planned) -> bool:
        name, row, command = planned
        target = self._directory / f"{name}.json"
        if target.is_file():
            _say(f"{name}: {_done(target, command)}")
            return True
        _say(f"{name}: {shlex.join(command)}")
        begun_at = commit()  # the row may take hours, and the checkout move on
        try:
            kept = self._runs / name
            if command[0] == "prune" and str(kept) in command and kept.is_dir():
                shutil.rmtree(kept)  # what an interrupted row of `keep` has left; no finished one comes here
            status, output = self._ended(name, command)
            if status == 0:
                record = {"row": row, "command": _public(command), "commit": begun_at}
                write_json({**record, **_found(command, output)}, target)
                return True
            _say(f"{name} failed with status {status}")
        except (InputError, OSError, ValueError, KeyError) as error:
            _say(f"{name} failed: {error}")
        return False

    def _ended(self, name: str, command: list[str]) -> tuple[int, str]:
        """Exit status and standard output of a row, once it has ended."""
        with nullcontext() if self._jobs == 1 else self._log(name) as says:
            words = [sys.executable, "-m", "experiments", *command]
            environment = {**os.environ, "ROTPRUNER_JOBS": str(self._jobs)}
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=says, text=True, env=environment) as process:
                self._running.add(process)
                output, _ = process.communicate()
                self._running.discard(process)
        return process.returncode, output

    def _log(self, name: str) -> TextIO:
        path = self._runs / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep file, checked.

    Raises:
        InputError: it is missing, is not YAML, or lacks what a sweep needs.
    """
    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"sweep file '{path}' cannot be read: {error}") from None
    missing = {"title", "command"} - set(sweep if isinstance(sweep, dict) else ())
    if missing:
        raise InputError(f"sweep file '{path}' lacks {', '.join(sorted(missing))}; see experiments/sweeps")
    if ("grid" in sweep) == ("rows" in sweep):
        raise InputError(f"sweep file '{path}' must have either a grid or rows; see experiments/sweeps")
    if "grid" in sweep:
        grid = sweep.pop("grid")
        sweep["rows"] = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if sweep["command"] not in _COMMANDS:
        raise InputError(f"sweep file '{path}': command '{sweep['command']}' is not one of {', '.join(_COMMANDS)}")
    if sweep.get("keep") and sweep["command"] != "prune":
        raise InputError(f"sweep file '{path}': keep is for prune; {sweep['command']} always keeps its models")
    return {"arguments": {}, "config": [], "reference": False, "keep": False, **sweep}


def rows(sweep: dict[str, Any], runs: Path) -> Iterator[_Planned]:
    """Every row; `runs` is where those of this table have their run directories."""
    shared = sweep["arguments"]
    if sweep["reference"]:
        texts = {key: shared[key] for key in ("model", "text", "seq_len", "max_tokens") if key in shared}
        yield "dense", {}, ["evaluate", *_flags(texts), "--json"]
    for row in sweep["rows"]:
        name = "-".join(map(_name, row.values())) or "base"
        arguments = {key: _filled(key, value, {"runs": runs.parent, **row}) for key, value in {**shared, **row}.items()}
        if sweep["keep"]:
            arguments["output"] = str(runs / name)
        if sweep["command"] in ("fit", "recover"):
            configs = [item for config in sweep["config"] for item in ("-c", str(config))]
            arguments["trainer.default_root_dir"] = str(runs / name)
            yield name, row, [sweep["command"], *configs, *_flags(arguments, repeat=False)]
        else:
            yield name, row, [sweep["command"], *_flags(arguments), "--json"]


def _filled(key: str, value: Any, known: dict[str, Any]) -> Any:
    """An argument with values in the place of their names in braces."""
    if not isinstance(value, str):
        return value
    if unknown := {name for name in re.findall(r"\{([\w.]+)\}", value) if name not in known}:
        raise InputError(f"{key} {value}: no {', '.join(sorted(unknown))} in a row that has {', '.join(known)}")
    return re.sub(r"\{([\w.]+)\}", lambda name: str(known[name[1]]), value)


def on_another(sweep: dict[str, Any], config: Path) -> list[str]:
    """The config files of a sweep of fits whose first one another takes the place of."""
    if not sweep["config"]:
        raise InputError(
            f"--config {config} replaces the file of a fit, and a {sweep['command']} reads none: --set model"
        )
    if not config.is_file():
        raise InputError(f"config file '{config}' is missing; see experiments/configs")
    return [str(config), *sweep["config"][1:]]


def _name(value: Any) -> str:
    return re.sub(r"[^\w.]+", "_", re.sub(r"(?<=\w):(?=\w)", "of", str(value))).strip("_")


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair} is not of the form KEY=VALUE")
        settings[key] = yaml.safe_load(value)
    return settings


def _flags(arguments: dict[str, Any], repeat: bool = True) -> list[str]:
    """Command-line options; lists become repeated options, or one of YAML form."""
    flags: list[str] = []
    for key, value in arguments.items():
        if isinstance(value, list) and repeat:
            flags += [item for each in value for item in (f"--{key}", str(each))]
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            flags += [f"--{key}", text.split("\n...")[0].strip("\n'")]
    return flags


def _public(command: list[str]) -> str:
    """The command as another machine would give it: local files by their name alone, in lists too."""
    return shlex.join(re.sub(r"(?<![\w.])\.{0,2}/[^\s,\]]*", lambda path: Path(path[0]).name, word) for word in command)


def _done(target: Path, command: list[str]) -> str:
    """That a row has a result; and that of which command, if of another than it would be now."""
    ran = json.loads(target.read_text(encoding="utf-8"))["command"]
    if ran == _public(command):
        return "done before"
    return f"done before by another command, and kept ({ran}); remove {target} to run it again"


def _found(command: list[str], output: str) -> dict[str, Any]:
    """`result`, without a local path; of a training also the `curves` of losses and perplexity that it has logged, its
    `dtype` and `device`, and its own `commit`, since it may have been finished before."""
    if command[0] not in ("fit", "recover"):
        return {"result": {name: value for name, value in json.loads(output).items() if name != "output"}}
    run = Path(command[command.index("--trainer.default_root_dir") + 1])
    found = json.loads((run / "results.json").read_text(encoding="utf-8"))
    curves = {name: points for name, points in read_curves(run).items() if name.startswith(("ppl/", "train/"))}
    chosen = found["config"]["model"]
    return {
        "result": {row["name"]: row for row in found["rows"]},
        "curves": curves,
        "dtype": chosen.get("base_dtype", chosen.get("compute_dtype")),
        "device": found.get("device"),
        "commit": found["commit"],
    }
