"""What a sweep file says: its form, and the command of every row.

It is YAML: a `title`, the `command` (prune, fit or recover), its `arguments` (for the last two also `config` and
`overlay`, lists of files before and after them), and a `grid` of arguments whose combinations are the rows, or the
`rows` one by one, each with the arguments that it changes. `{seed}` in an argument is the row's own `seed`, and so with
its other values; `{runs}` is the directory of run directories. With `keep: true` a table of prunes keeps its models
there, as fits do. With `reference: true` the first row of a table of prunes is the dense model on the same texts, from
which gaps are counted.

```yaml
title: One-shot pruners
command: prune
arguments: {model: smollm2-135m, calibration: c4, text: [wikitext2, wikipedia_test]}
grid: {pruner: [magnitude, wanda], pattern: ["2:4", 0.5]}
reference: true
```
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from rotpruner.errors import InputError

#: Name, the arguments that a row changes, command line.
Planned = tuple[str, dict[str, Any], list[str]]

#: What a sweep may run.
_COMMANDS = ("prune", "fit", "recover")

#: What the dense row of a table of prunes has in common with the others.
_REFERENCE = ("model", "text", "seq_len", "max_tokens")


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
    ("overlay", _each(str), "a list of files"),
    ("grid", _each(list, dict), "a mapping from arguments to lists of values"),
    ("rows", _each(dict), "a list of mappings from arguments to values"),
)


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep file, checked.

    Raises:
        InputError: it is missing, is not YAML, or lacks what a sweep needs.
    """
    sweep = _yaml(path, "sweep file")
    if missing := {"title", "command"} - set(sweep):
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


def rows(sweep: dict[str, Any], runs: Path, own: str | None = None) -> Iterator[Planned]:
    """Every row.

    Args:
        sweep: what `read_sweep` gives.
        runs: where the rows of this table have their run directories.
        own: what the names of the tables of another model end with, those that rows begin from, too.
    """
    shared = sweep["arguments"]
    if sweep["reference"]:
        texts = {key: shared[key] for key in _REFERENCE if key in shared}
        if varied := {key for row in sweep["rows"] for key in row if key in _REFERENCE}:
            raise InputError(
                f"reference: there is no one dense model where rows vary {', '.join(sorted(varied))}; leave it out"
            )
        yield "dense", {}, ["evaluate", *_flags(texts), "--json"]
    for row in sweep["rows"]:
        name = "-".join(map(_name, row.values())) or "base"
        known = {"runs": runs.parent, **row}
        arguments = {key: _filled(key, value, known, own) for key, value in {**shared, **row}.items()}
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


def _filled(key: str, value: Any, known: dict[str, Any], own: str | None) -> Any:
    """An argument with values in the place of their names in braces, its tables those of the same model."""
    if not isinstance(value, str):
        return value
    if own:
        value = re.sub(r"\{runs\}/[^/{}]+", rf"\g<0>-{own}", value)
    if unknown := {name for name in re.findall(r"\{([\w.]+)\}", value) if name not in known}:
        raise InputError(f"{key} {value}: no {', '.join(sorted(unknown))} in a row that has {', '.join(known)}")
    return re.sub(r"\{([\w.]+)\}", lambda name: str(known[name[1]]), value)


def on_another(sweep: dict[str, Any], config: Path) -> list[str]:
    """The config files of a sweep of fits whose first one another takes the place of."""
    if not sweep["config"]:
        raise InputError(
            f"--config {config} replaces the file of a fit, and a {sweep['command']} reads none: --set model"
        )
    return [str(config), *sweep["config"][1:]]


def model_of(sweep: dict[str, Any]) -> str:
    """The short name of the dense model that a sweep is about: that of its config, where it has one."""
    arguments: dict[str, Any] = sweep["arguments"]
    settings: dict[str, Any] = {}
    for config in sweep["config"]:
        settings |= _yaml(Path(config)).get("model", {})
    # A recovery's own model is one that has been pruned.
    named = arguments.get("model") or arguments.get("model.model") or settings.get("teacher") or settings.get("model")
    return Path(str(named or "several models")).name


def table_of(model: str) -> str:
    """What tells the tables of models apart: the name of one of the hub, a directory's with that of its parent."""
    path = Path(model)
    return "-".join(path.absolute().parts[-2:]) if path.is_dir() else path.name


def check_overlays(sweep: dict[str, Any], columns: list[str]) -> None:
    """Raise `InputError` if an overlay is missing or would overrule what a row says of itself."""
    if sweep["overlay"] and sweep["command"] == "prune":
        raise InputError(f"--overlay {sweep['overlay'][0]} is a config, and a prune reads none: leave it out")
    said = {*columns, *sweep["arguments"], "trainer.default_root_dir"}
    for overlay in sweep["overlay"]:
        for key in _keys(_yaml(Path(overlay))):
            if over := [name for name in said if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")]:
                raise InputError(f"--overlay {overlay}: its {key} would overrule {', '.join(over)} of the rows")


def _yaml(path: Path, what: str = "config") -> dict[str, Any]:
    """What stands in a file.

    Raises:
        InputError: it is missing, or no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{what} '{path}' cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{what} '{path}' is no mapping; see experiments")
    return found


def _keys(config: dict[str, Any], before: str = "") -> Iterator[str]:
    """The arguments that a config sets, in dotted form."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _name(value: Any) -> str:
    return re.sub(r"[^\w.]+", "_", re.sub(r"(?<=\w):(?=\w)", "of", str(value))).strip("_")


def _flags(arguments: dict[str, Any], repeat: bool = True) -> list[str]:
    """Command-line options; lists become repeated options, or one of YAML form."""
    flags: list[str] = []
    for key, value in arguments.items():
        if isinstance(value, list) and repeat:
            flags += [item for each in value for item in (f"--{key}", str(each))]
        else:
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
            flags += [f"--{key}", text.split("\n...")[0].strip("\n")]
    return flags
