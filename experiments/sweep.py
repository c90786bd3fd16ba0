"""`python -m experiments sweep`: run every row of a table, one command a row, and keep each row's result.

`experiments.sweep_file` says what a table is. On another model, by `--config experiments/configs/opt-125m.yaml` for
fits and `--set model=NAME` for prunes, it is a table of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TextIO

import yaml

from callbacks.terminal import console
from experiments.arguments import Parser, at_least
from experiments.report_runs import read_curves
from experiments.sweep_file import (
    Planned,
    check_overlays,
    model_of,
    on_another,
    read_sweep,
    rows,
    table_of,
)
from rotpruner.artifacts import from_json, read_json, write_json
from rotpruner.errors import InputError
from rotpruner.model_card import CARD
from rotpruner.provenance import commit, public_command


def main(arguments: list[str]) -> None:
    """Run the rows that have no result yet; a row that fails is named and the others go on."""
    parser = Parser("sweep", "Run every row of a table of experiments; finished rows are kept.", prints_json=False)
    parser.add_argument("file", type=Path, help="a sweep file, as in experiments/sweeps")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="argument of every row, as YAML"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="instead of a fit's first file: the same table on another model, which is named after it; tables that its "
        "rows begin from are those of the same name",
    )
    parser.add_argument(
        "--overlay",
        action="append",
        default=[],
        metavar="FILE",
        help="config of every fit or recovery after its arguments, such as experiments/configs/logging/wandb.yaml",
    )
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="where results are kept")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where fits have their run directories")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="rows at a time, all on the same device; if several, each logs to a file beside its run directory",
    )
    options = parser.parse_args(arguments)
    options.results, options.runs = options.results.expanduser(), options.runs.expanduser()
    sweep, settings = read_sweep(options.file), _settings(options.set)
    if options.config is not None:
        sweep["config"] = on_another(sweep, options.config)
    sweep["overlay"] += options.overlay
    columns = list(dict.fromkeys(key for row in sweep["rows"] for key in row))
    if fixed := settings.keys() & {*columns, "output", "trainer.default_root_dir"}:
        raise InputError(f"--set {', '.join(sorted(fixed))} would be overruled by the rows of {options.file}")
    sweep["arguments"].update(settings)
    check_overlays(sweep, columns)
    another = settings.get("model") or settings.get("model.model")
    own = table_of(str(another)) if another else options.config and options.config.stem
    table = f"{options.file.stem}-{own}" if own else options.file.stem
    directory, planned = options.results / table, list(rows(sweep, options.runs / table, own))
    names = [name for name, _, _ in planned]
    if alike := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"rows of {options.file} have the same name, {', '.join(sorted(alike))}, which is made of their values: "
            "give all rows the same keys"
        )
    _describe(directory, f"{sweep['title']}, on {model_of(sweep)}", columns, planned)
    runner = _Runner(directory, options.runs / table, options.jobs)
    if failed := [name for name, done in zip(names, runner.all(planned), strict=True) if not done]:
        where = "above" if options.jobs == 1 else f"in {options.runs / table}/ROW.log"
        raise InputError(
            f"rows that failed: {', '.join(failed)}; what they said stands {where}, run again to retry them"
        )


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
                f"--set {pair}: what stands after the = is no YAML; quote it, as in 'text=[a, b]'"
            ) from None
    return settings


def _describe(directory: Path, title: str, columns: list[str], planned: list[Planned]) -> None:
    """Write what a table is called and what its rows vary, unless all of them have results.

    Rows that it has keep its title, which may say more about them than the sweep file does.

    Raises:
        InputError: rows would come to stand beside those of other commands, as if they were alike.
    """
    path, asked = directory / "sweep.json", {name: Asked.of(command) for name, _, command in planned}
    ran = {stored.stem: _asked_of(stored) for stored in directory.glob("*.json") if stored != path}
    if ran.keys() >= asked.keys():
        return
    for name, known in ran.items():
        if known is not None and (name not in asked or not known.is_as(asked[name])):
            raise InputError(
                f"'{directory}' has rows of other commands or of other files, beside which no others can stand, such "
                f"as {name} ({known.command}): choose another --results, or remove them"
            )
    if ran and path.is_file():
        known = read_json(path)
        title, columns = known["title"], list(dict.fromkeys([*known["columns"], *columns]))
    write_json({"title": title, "columns": columns}, path)


class Asked(NamedTuple):
    """What a row was asked to do.

    Attributes:
        command: as another machine would give it, local paths by their last part.
        files: SHA-256 of the local texts that it names, in its order, those in directories left out; None of rows
            that were made before this was kept.
    """

    command: str
    files: list[str] | None = None

    @classmethod
    def of(cls, words: list[str]) -> Asked:
        """What a command line asks for. Config files, which say more than a row reads, are not among the texts."""
        named = [word for option, word in pairwise(["", *words]) if option != "-c"]
        parts = [part for word in named for part in dict.fromkeys([word, *re.split(r"[\[\],]", word)])]
        files = [Path(part.strip(" '\"")).expanduser() for part in parts]
        return cls(public_command(words), [_digest(file) for file in files if file.is_file()])

    def is_as(self, other: Asked) -> bool:
        """Whether the two do the same, wherever they leave it."""
        places = re.compile(r" --(?:trainer\.default_root_dir|output) \S+")
        alike = self.files is None or other.files is None or self.files == other.files
        return alike and places.sub("", self.command) == places.sub("", other.command)


@cache
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _asked_of(result: Path) -> Asked | None:
    """What a row's result was asked for; None if there is no result."""
    if not result.is_file():
        return None
    try:
        stored = read_json(result)
        return Asked(stored["command"], stored.get("files"))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"result '{result}' is damaged; remove it to run its row again") from None


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
        self._beginning = Lock()
        self._stopped = False

    def all(self, planned: list[Planned]) -> list[bool]:
        """Whether each row has a result now. What ends this process ends the rows that run, and begins no other."""
        held = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        pool = ThreadPoolExecutor(self._jobs)
        try:
            return list(pool.map(self._one, planned))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            with self._beginning:
                self._stopped = True  # a row that is about to begin does not
                for process in self._running:
                    process.terminate()
            pool.shutdown()
            signal.signal(signal.SIGTERM, held)

    def _one(self, planned: Planned) -> bool:
        name, row, command = planned
        target = self._directory / f"{name}.json"
        asked = Asked.of(command)
        if (ran := _asked_of(target)) is not None:
            _say(f"{name}: {_done(ran, asked, target)}")
            return True
        _say(f"{name}: {shlex.join(command)}")
        begun_at = commit()  # the row may take hours, and the checkout move on
        try:
            kept = self._runs / name
            if command[0] == "prune" and str(kept) in command:
                _make_room(kept, asked)
            status, output = self._ended(name, command)
            if status == 0:
                record = {"row": row, **asked._asdict(), "commit": begun_at}
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
            with self._beginning:
                if self._stopped:
                    return 128 + signal.SIGTERM, ""
                process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=says, text=True, env=environment)
                self._running.add(process)
            with process:
                output, _ = process.communicate()
            with self._beginning:
                self._running.discard(process)
        return process.returncode, output

    def _log(self, name: str) -> TextIO:
        path = self._runs / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")


def _make_room(kept: Path, asked: Asked) -> None:
    """Note beside a model of `keep` what is asked for; remove what an interrupted row has left of the same.

    Raises:
        InputError: there is a model of something else, such as that of a table under another `--results`.
    """
    note = kept.with_name(f"{kept.name}.json")
    if kept.is_dir():
        known = _asked_of(note)
        if (kept / CARD).is_file() and (known is None or not known.is_as(asked)):
            raise InputError(
                f"'{kept}' is a model that another command has made, or an older sweep; choose another --runs, or "
                "remove it"
            )
        shutil.rmtree(kept)
    write_json(asked._asdict(), note)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _done(ran: Asked, asked: Asked, target: Path) -> str:
    """That a row has a result; and that of which command, if of another than it would be now."""
    if ran.is_as(asked):
        return "done before"
    other = "text of the same name" if ran._replace(files=None).is_as(asked) else "command"
    return f"done before by another {other}, and kept ({ran.command}); remove {target} to run it again"


def _found(command: list[str], output: str) -> dict[str, Any]:
    """`result`, without a local path; of a training also the `curves` of losses and perplexity that it has logged, its
    `budget`, `dtype` and `device`, and its own `commit`, since it may have been finished before."""
    if command[0] not in ("fit", "recover"):
        last = output.strip().rpartition("\n")[2]  # pruners of one's own may print, too
        return {"result": {name: value for name, value in from_json(last).items() if name != "output"}}
    run = Path(command[command.index("--trainer.default_root_dir") + 1])
    found = read_json(run / "results.json")
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
