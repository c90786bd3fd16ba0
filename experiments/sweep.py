"""`python -m experiments sweep`: run every row of a table, one command a row, and keep each row's result.

A sweep file is YAML: a `title`, the `command` (prune, fit or recover), its `arguments` (for the last two also
`config`, a list of files), and a `grid` of arguments whose combinations are the rows, or the `rows` one by one, each
with the arguments that it changes. `{seed}` in an argument is the row's own `seed`, and so with its other values;
`{runs}` is the directory of run directories. With `keep: true` a table of prunes keeps its models there, as fits do.
With `reference: true` the first row of a table of prunes is the dense model on the same texts, from which gaps are
counted. On another model, by `--config experiments/configs/opt-125m.yaml` for fits and `--set model=NAME` for prunes,
it is a table of its own.

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
from collections.abc import Callable, Iterator
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
from rotpruner.provenance import commit, public_command

#: Name, the arguments that a row changes, command line.
_Planned = tuple[str, dict[str, Any], list[str]]


def _each(kind: type, container: type = list) -> Callable[[Any], bool]:
    """Whether a value is a list, or a mapping, of such values."""

    def holds(value: Any) -> bool:
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, container) and all(isinstance(item, kind) for item in items)

    return holds


#: Part of a sweep file, whether a value has the form that it needs, and that form in words.
_FORMS = (
    ("arguments", _each(object, dict), "a mapping from arguments to values"),
    ("config", _each(str), "a list of files"),
    ("grid", _each(list, dict), "a mapping from arguments to lists of values"),
    ("rows", _each(dict), "a list of mappings from arguments to values"),
)

#: What a sweep may run.
_COMMANDS = ("prune", "fit", "recover")

#: What the dense row of a table of prunes has in common with the others.
_REFERENCE = ("model", "text", "seq_len", "max_tokens")


def main(arguments: list[str]) -> None:
    """Run the rows that have no result yet; a row that fails is named and the others go on."""
    parser = Parser("sweep", "Run every row of a table of experiments; finished rows are kept.", prints_json=False)
    parser.add_argument("file", type=Path, help="a sweep file, as in experiments/sweeps")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="argument of every row, as YAML"
    )
    parser.add_argument("--config", type=Path, help="instead of a fit's first file: the same table on another model")
    parser.add_argument(
        "--overlay",
        action="append",
        default=[],
        metavar="FILE",
        help="config of every fit or recovery behind its arguments, such as experiments/configs/logging/wandb.yaml",
    )
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="where results are kept")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where fits have their run directories")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="rows at a time, all on the same device; what each says goes into files beside its runs then",
    )
    options = parser.parse_args(arguments)

    sweep, settings = read_sweep(options.file), _settings(options.set)
    if options.config is not None:
        sweep["config"] = on_another(sweep, options.config)
    if options.overlay and sweep["command"] == "prune":
        raise InputError(f"--overlay {options.overlay[0]} is a config, and a prune reads none: leave it out")
    sweep["overlay"] = options.overlay
    columns = list(dict.fromkeys(key for row in sweep["rows"] for key in row))
    if fixed := settings.keys() & {*columns, "output", "trainer.default_root_dir"}:
        raise InputError(f"--set {', '.join(sorted(fixed))} would be overruled by the rows of {options.file}")
    sweep["arguments"].update(settings)
    another = options.config is not None or settings.keys() & {"model", "model.model"}
    table = f"{options.file.stem}-{_model(sweep)}" if another else options.file.stem
    directory, planned = options.results / table, list(rows(sweep, options.runs / table))
    names = [name for name, _, _ in planned]
    if alike := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"rows of {options.file} have the same name, {', '.join(sorted(alike))}, which is made of their values: "
            "give all rows the same keys"
        )
    _describe(directory, f"{sweep['title']}, on {_model(sweep)}", columns, planned)
    runner = _Runner(directory, options.runs / table, options.jobs)
    if failed := [name for name, done in zip(names, runner.all(planned), strict=True) if not done]:
        where = "above" if options.jobs == 1 else f"in {options.runs / table}/ROW.log"
        raise InputError(
            f"rows that failed: {', '.join(failed)}; what they said stands {where}, run again to retry them"
        )


def _describe(directory: Path, title: str, columns: list[str], planned: list[_Planned]) -> None:
    """Write what a table is called and what its rows vary, unless all of them have results.

    Rows that it has keep its title, which may say more about them than the sweep file does.

    Raises:
        InputError: rows would come to stand beside those of other commands, as if they were alike.
    """
    ran = {name: _command_of(directory / f"{name}.json") for name, _, _ in planned}
    if all(ran.values()):
        return
    if others := [name for name, _, command in planned if ran[name] not in (None, public_command(command))]:
        raise InputError(
            f"'{directory}' has rows of other commands, {', '.join(others)}, beside which no others can stand: "
            "choose another --results, or remove them"
        )
    path = directory / "sweep.json"
    if any(ran.values()) and path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        title, columns = known["title"], list(dict.fromkeys([*known["columns"], *columns]))
    write_json({"title": title, "columns": columns}, path)


def _command_of(result: Path) -> str | None:
    """Which command has made a row's result; None if there is no result."""
    if not result.is_file():
        return None
    try:
        return json.loads(result.read_text(encoding="utf-8"))["command"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"result '{result}' is damaged; remove it to run its row again") from None


def _model(sweep: dict[str, Any]) -> str:
    """The short name of the model that a sweep is about: that of its config, where it has one."""
    arguments = sweep["arguments"]
    named = arguments.get("model") or arguments.get("model.model")
    return Path(str(named)).name if named else Path(sweep["config"][0]).stem if sweep["config"] else "several models"


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
        if (ran := _command_of(target)) is not None:
            _say(f"{name}: {_done(ran, command, target)}")
            return True
        _say(f"{name}: {shlex.join(command)}")
        begun_at = commit()  # the row may take hours, and the checkout move on
        try:
            kept = self._runs / name
            if command[0] == "prune" and str(kept) in command and kept.is_dir():
                shutil.rmtree(kept)  # what an interrupted row of `keep` has left; no finished one comes here
            status, output = self._ended(name, command)
            if status == 0:
                record = {"row": row, "command": public_command(command), "commit": begun_at}
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
    sweep = {"arguments": {}, "config": [], "overlay": [], "reference": False, "keep": False, **sweep}
    for key, form, words in _FORMS:
        if key in sweep and not form(sweep[key]):
            raise InputError(f"sweep file '{path}': {key} must be {words}; see experiments/sweeps")
    if "grid" in sweep:
        grid = sweep.pop("grid")
        sweep["rows"] = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if sweep["command"] not in _COMMANDS:
        raise InputError(f"sweep file '{path}': command '{sweep['command']}' is not one of {', '.join(_COMMANDS)}")
    if sweep["command"] != "prune":
        if sweep["keep"]:
            raise InputError(f"sweep file '{path}': keep is for prune; {sweep['command']} always keeps its models")
        if sweep["reference"]:
            raise InputError(f"sweep file '{path}': reference is for prune; {sweep['command']} has a dense row itself")
    return sweep


def rows(sweep: dict[str, Any], runs: Path) -> Iterator[_Planned]:
    """Every row; `runs` is where those of this table have their run directories."""
    shared = sweep["arguments"]
    if sweep["reference"]:
        texts = {key: shared[key] for key in _REFERENCE if key in shared}
        if varied := {key for row in sweep["rows"] for key in row if key in _REFERENCE}:
            raise InputError(f"reference: there is no one dense model where rows vary {', '.join(sorted(varied))}")
        yield "dense", {}, ["evaluate", *_flags(texts), "--json"]
    for row in sweep["rows"]:
        name = "-".join(map(_name, row.values())) or "base"
        arguments = {key: _filled(key, value, {"runs": runs.parent, **row}) for key, value in {**shared, **row}.items()}
        if sweep["keep"]:
            arguments["output"] = str(runs / name)
        if sweep["command"] in ("fit", "recover"):
            configs = [item for config in sweep["config"] for item in ("-c", str(config))]
            arguments["trainer.default_root_dir"] = str(runs / name)
            overlays = [item for config in sweep["overlay"] for item in ("-c", str(config))]
            yield name, row, [sweep["command"], *configs, *_flags(arguments, repeat=False), *overlays]
        elif "text" not in arguments:
            raise InputError(f"row {name} has no text, on which a table compares its rows: --set 'text=[wikitext2]'")
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
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(
                f"--set {pair}: what stands behind the = is no YAML; quote it, as in 'text=[a, b]'"
            ) from None
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


def _done(ran: str, command: list[str], target: Path) -> str:
    """That a row has a result; and that of which command, if of another than it would be now."""
    if ran == public_command(command):
        return "done before"
    return f"done before by another command, and kept ({ran}); remove {target} to run it again"


def _found(command: list[str], output: str) -> dict[str, Any]:
    """`result`, without a local path; of a training also the `curves` of losses and perplexity that it has logged, its
    `budget`, `dtype` and `device`, and its own `commit`, since it may have been finished before."""
    if command[0] not in ("fit", "recover"):
        return {"result": {name: value for name, value in json.loads(output).items() if name != "output"}}
    run = Path(command[command.index("--trainer.default_root_dir") + 1])
    found = json.loads((run / "results.json").read_text(encoding="utf-8"))
    curves = {name: points for name, points in read_curves(run).items() if name.startswith(("ppl/", "train/"))}
    chosen = found["config"]["model"]
    return {
        "result": {row["name"]: row for row in found["rows"]},
        "curves": curves,
        "budget": found.get("budget"),
        "dtype": chosen.get("base_dtype", chosen.get("compute_dtype")),
        "device": found.get("device"),
        "commit": found["commit"],
    }
