"""`python -m experiments results`: write experiments/RESULTS.md and its plots from the stored results of sweeps."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.arguments import Parser, report
from experiments.report_page import alone
from experiments.report_plots import line_plot
from experiments.report_runs import Curve
from rotpruner.artifacts import read_json, write_text
from rotpruner.errors import InputError
from rotpruner.perplexity import gap

Row = dict[str, Any]
#: Grid values of rows, and their kind at the end.
Key = tuple[str, ...]
Group = tuple[Key, list[Row]]
Cell = Callable[[Key, list[Row]], str]

#: Rows of a training that the training's budget was spent on.
_LEARNED = ("rotpruner", "no_update", "first_fit", "recovered")

#: (pattern, dense model) → text → the mean gap that others are divided by.
Divisors = dict[tuple[str, str], dict[str, float]]

#: Text → label of a line → its points.
Lines = dict[str, dict[str, Curve]]


def main(arguments: list[str]) -> None:
    """Print `{"output", "tables", "rows", "plots"}` after writing the tables, and the plots into `results/plots`."""
    parser = Parser("results", "Write the tables and plots of stored results.")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="directory of results")
    parser.add_argument("--output", type=Path, default=Path("experiments/RESULTS.md"))
    parser.add_argument(
        "--against",
        metavar="GLOB",
        help="rows, such as 'baselines/sparsegpt-*.json', by whose mean G that of rows of their pattern is divided",
    )
    options = parser.parse_args(arguments)

    sweeps = sorted(options.results.glob("*/sweep.json"))
    if not sweeps:
        raise InputError(f"no results under '{options.results}'; make some with: python -m experiments sweep FILE")
    notes = options.results / "NOTES.md"
    text, count = [HEADER, *([notes.read_text(encoding="utf-8")] if notes.is_file() else [])], 0
    before = len(text)
    against = {} if options.against is None else _divisors(options.results, options.against)
    steps: Lines = {}
    sparsities: Lines = {}
    for path in sweeps:
        sweep = read_json(path)
        records = [(other.stem, read_json(other)) for other in sorted(path.parent.glob("*.json")) if other != path]
        if not records:  # it has only begun
            continue
        text.append(table({**sweep, "title": f"{sweep['title']} · `{path.parent.name}`"}, records, against))
        count += len(records)
        _add_steps(steps, path.parent.name, records)
        _add_sparsities(sparsities, path.parent.name, sweep["columns"], records)
    tables, plots = len(text) - before, options.results / "plots"
    shown = [
        *_plot(plots, "steps", steps, "step", options.output),
        *_plot(plots, "sparsity", sparsities, "share of weights removed", options.output),
    ]
    for name, shown_as in (("step", _step), ("inference", _inference)):
        benchmark = options.results / f"{name}.json"
        if benchmark.is_file():
            text.append(shown_as(read_json(benchmark)))
    write_text("\n".join([*text, *shown]), options.output)
    report({"output": str(options.output), "tables": tables, "rows": count, "plots": len(shown)}, options.json)


HEADER = """# Results

Written by `python -m experiments results` from the files of a directory of results. Those of sweeps hold their command,
their commit and what the command printed. Commands are as they were at that commit: configs and options may have
changed since, so check it out before you repeat a row; `-dirty` says that it had changes of its own. After each title
stands its directory, named after its sweep file. Perplexity over windows that do not overlap, in float32;
G = ln(ppl) − ln(ppl of the dense model) on the same tokens; a share is G divided by the mean G of the rows that the
command compares with (`--against`), of the same pattern on the same tokens. Rows compare only on the same tokens. Rows
with several seeds show mean ± standard deviation.
"""


def _divisors(results: Path, pattern: str) -> Divisors:
    """The mean gaps of the rows of a glob, by their pattern and their dense model.

    Raises:
        InputError: no row is there, or one has no dense model beside it.
    """
    gaps: dict[tuple[str, str], dict[str, list[float]]] = {}
    for path in sorted(results.glob(pattern)):
        if path.name in ("sweep.json", "dense.json"):
            continue
        if not (path.parent / "dense.json").is_file():
            raise InputError(f"--against {pattern}: '{path.parent}' has no dense.json, from which gaps are counted")
        result, dense = read_json(path)["result"], read_json(path.parent / "dense.json")["result"]["ppl"]
        found = gaps.setdefault((result["pattern"], _dense_of(dense)), {})
        for text, ppl in result["ppl"].items():
            if text in dense:
                found.setdefault(text, []).append(gap(ppl, dense[text]))
    if not gaps:
        raise InputError(f"--against {pattern}: no such rows under '{results}'")
    return {key: {text: mean(values) for text, values in texts.items()} for key, texts in gaps.items()}


def _dense_of(ppl: dict[str, float]) -> str:
    """What tells dense models and their test tokens apart: perplexities to two places."""
    return ", ".join(f"{text} {value:.2f}" for text, value in sorted(ppl.items()))


def table(sweep: dict[str, Any], records: list[tuple[str, dict[str, Any]]], against: Divisors | None = None) -> str:
    """One sweep as a Markdown table, rows by their grid values, seeds pooled; columns without entries are left out."""
    varied = [column for column in sweep["columns"] if "seed" not in column]
    names = [column for column in varied if any(column in record.get("row", {}) for _, record in records)]
    references, pooled = _pooled(names, records, against or {})
    groups: list[Group] = [(("dense", *[""] * len(names)), [reference]) for reference in references]
    groups += sorted(pooled.items())
    columns = [column for column in _columns(names, groups) if any(column[1](*group) for group in groups)]
    lines = [f"## {sweep['title']}\n", _line([head for head, _ in columns]), "|" + "---|" * len(columns)]
    lines += [_line([cell(*group) for _, cell in columns]) for group in groups]
    commands = "\n".join(f"{record['command']}" for _, record in records)
    details = f"<details><summary>commands</summary>\n\n```\n{commands}\n```\n\n</details>\n"
    return "\n".join([*lines, "", details])


def _columns(names: list[str], groups: list[Group]) -> list[tuple[str, Cell]]:
    """Heads, and what each column says of a group."""
    texts = list(dict.fromkeys(text for _, rows in groups for row in rows for text in row["ppl"]))

    def key_at(place: int) -> Cell:
        return lambda key, rows: key[place]

    def pooled(part: str, text: str, form: str) -> Cell:
        return lambda key, rows: _pool([row[part][text] for row in rows if text in row.get(part, {})], form)

    def first(part: str, form: str, unit: float = 1) -> Cell:
        def cell(key: Key, rows: list[Row]) -> str:
            found = (rows[0].get("budget") or {}) | rows[0]
            return form.format(found[part] / unit) if part in found else ""

        return cell

    def each(part: str) -> Cell:
        return lambda key, rows: " ".join(filter(None, dict.fromkeys(row.get(part, "") for row in rows)))

    def computed(key: Key, rows: list[Row]) -> str:
        found = list(dict.fromkeys(row.get("computed", "") for row in rows))
        return found[0] if len(found) == 1 else ", ".join(where or "?" for where in found)

    def seconds(key: Key, rows: list[Row]) -> str:
        """Pooled where they were computed alike."""
        apart: dict[str, list[float]] = {}
        for row in rows:
            if "seconds" in row:
                apart.setdefault(row.get("computed", ""), []).append(row["seconds"])
        return ", ".join(_pool(spent, "{:.0f}") for spent in apart.values())

    return [
        *((name.rpartition(".")[2], key_at(place)) for place, name in enumerate(names)),
        ("row", key_at(-1)),
        *((f"{text} ppl", pooled("ppl", text, "{:.2f}")) for text in texts),
        *((f"G {text}", pooled("gaps", text, "{:.3f}")) for text in texts),
        *((f"share {text}", pooled("shares", text, "{:.3f}")) for text in texts),
        ("trained tokens", first("training_tokens", "{:,.0f}")),
        ("trainable", first("trainable_parameters", "{:,.0f}")),
        ("parameters", first("parameters", "{:.1f} M", 1e6)),
        ("online FLOPs", first("online_flops", "{:.0f} M", 1e6)),
        ("seconds", seconds),
        ("computed in", computed),
        ("seeds", lambda key, rows: str(len(rows)) if "commit" in rows[0] else ""),
        ("commit", each("commit")),
    ]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _pooled(
    columns: list[str], records: list[tuple[str, dict[str, Any]]], against: Divisors
) -> tuple[list[Row], dict[Key, list[Row]]]:
    """The dense models, and the rows by their grid values and kind, with their `gaps` and `shares`.

    A gap is from the dense model of the row's own record, or else from the sweep's first, on texts that both have.
    """
    references: dict[str, Row] = {}
    pooled: dict[Key, list[Row]] = {}
    found = [_rows(record) for _, record in records]
    first: Row = next((kinds["dense"] for kinds in found if "dense" in kinds), {"ppl": {}})
    for (_, record), kinds in zip(records, found, strict=True):
        dense = kinds.pop("dense", first)["ppl"]
        if dense:
            references.setdefault(_dense_of(dense), {"ppl": dense, "gaps": dict.fromkeys(dense, 0)})
        for kind, result in kinds.items():
            key = (*(_shown(record["row"].get(column, "")) for column in columns), kind)
            gaps = {text: gap(ppl, dense[text]) for text, ppl in result["ppl"].items() if text in dense}
            divisors = against.get((str(result.get("pattern")), _dense_of(dense)), {})
            found_there = {
                "gaps": gaps,
                "shares": {text: gap / divisors[text] for text, gap in gaps.items() if text in divisors},
                "computed": _computed({**record, **result}),
                "budget": record.get("budget") if kind in _LEARNED else None,
                "commit": _short(record["commit"]),
            }
            pooled.setdefault(key, []).append({"online_flops": 0, **result, **found_there})
    return list(references.values()), pooled


def _computed(row: Row) -> str:
    """The dtype of what learned or calibrated, and the GPU that it ran on, if it was one."""
    _, _, gpu = (row.get("device") or "").partition(" ")
    return " ".join(filter(None, [row.get("dtype"), gpu]))


def _short(commit: str | None) -> str:
    """Seven digits of a commit, and whether there were changes on top of it."""
    return "" if commit is None else commit[:7] + "-dirty" * commit.endswith("-dirty")


def _rows(record: dict[str, Any]) -> dict[str, Row]:
    """The results of a record by their kind: a fit holds rows of its own, the dense model and the controls."""
    found = record["result"]
    kind = "dense" if record["command"].startswith("evaluate ") else ""
    return {kind: found} if "ppl" in found else dict(found)


def _add_steps(lines: Lines, sweep: str, records: list[tuple[str, dict[str, Any]]]) -> None:
    """Perplexities that fits have logged on their way."""
    for name, record in records:
        for metric, points in record.get("curves", {}).items():
            if metric.startswith("ppl/"):
                lines.setdefault(metric.removeprefix("ppl/"), {})[f"{sweep} {name}"] = [
                    tuple(point) for point in points
                ]


def _add_sparsities(lines: Lines, sweep: str, columns: list[str], records: list[tuple[str, dict[str, Any]]]) -> None:
    """Perplexities of what differs in its unstructured sparsity alone, if that has two values or more; dense at 0."""
    found: dict[str, dict[str, set[tuple[float, float]]]] = {}
    for _, record in records:
        rows = _rows(record)
        dense = rows.get("dense", {}).get("ppl", {})
        for kind, row in rows.items():
            if not re.fullmatch(r"\d*\.?\d+", str(row.get("pattern"))):  # not N:M, a slice, or one with exceptions
                continue
            others = [_shown(record["row"].get(column, "")) for column in columns if "pattern" not in column]
            label = " ".join(filter(None, [sweep, *others, kind]))
            for text, value in row["ppl"].items():
                points = found.setdefault(text, {}).setdefault(label, set())
                points.update({(row["sparsity"], value), *([(0.0, dense[text])] if text in dense else [])})
    for text, curves in found.items():
        for label, points in curves.items():
            if len({sparsity for sparsity, _ in points if sparsity}) > 1:
                lines.setdefault(text, {})[label] = sorted(points)


def _plot(plots: Path, name: str, lines: Lines, xlabel: str, output: Path) -> list[str]:
    """One file a text; the Markdown that shows them."""
    shown = []
    for text, curves in lines.items():
        path = plots / f"{name}-{text}.svg"
        write_text(alone(line_plot(f"{name}-{text}", curves, xlabel, f"perplexity on {text}")), path)
        link = os.path.relpath(path, output.parent)
        shown.append(f"![Perplexity on {text} against {xlabel}]({link})\n")
    return shown


def _step(result: Row) -> str:
    """What `benchmark step --json` printed, in a paragraph."""
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["parts"].items())
    recomputed = "with" if result["gradient_checkpointing"] else "without"
    memory = result["peak_bytes"] / result["dense_fp32_bytes"]
    model = ", ".join(filter(None, [result["model"], result.get("dtype")]))
    lines = [
        f"## A step of learning on {result['device']}, {result['threads']} threads\n",
        f"{model}, {result['batch_size']} × {result['seq_len']:,} tokens, {recomputed} gradient "
        f"checkpointing: {result['seconds']:.1f} s ({parts}).",
        f"{result['ratio']:.3f} × forward and backward of the dense model on the same tokens "
        f"({result['dense_seconds']:.1f} s), medians of {result['repeats']} in turns.",
        f"Peak memory, imports not counted: {result['peak_bytes'] / 2**30:.2f} GiB, {memory:.2f} × the dense model in "
        "float32.\n",
        f"`{result['command']}`, commit {_short(result['commit'])}\n",
    ]
    return "\n".join(lines)


def _inference(result: Row) -> str:
    """What `benchmark inference --json` printed, as a table."""
    lines = [
        f"## Inference on {result['device']}, {result['threads']} threads, {result['dtype']}\n",
        "Median and quartiles of the ratio to the first model, in turns. " + result["note"] + "\n",
        f"`{result['command']}`, commit {_short(result['commit']) or 'not known'}\n",
        "| model | parameters | prefill tokens/s | ratio | decode tokens/s | ratio |",
        "|" + "---|" * 6,
    ]
    for row in result["rows"]:
        cells = [row["model"], f"{row['parameters'] / 1e6:.1f} M"]
        for phase in (row["prefill"], row["decode"]):
            low, high = phase["ratio_spread"]
            cells += [f"{phase['tokens_per_second']:.0f}", f"{phase['ratio']:.3f} ({low:.3f}-{high:.3f})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    # A row reads the run of its own seed in another table; seeds share the template, not the name that it becomes.
    return str(value).replace("{runs}/", "").replace("{seed_everything}", "SEED")


def _pool(values: list[float], form: str) -> str:
    if not values:
        return ""
    shown = form.format(mean(values))
    known = len(values) > 1 and all(map(math.isfinite, values))
    return f"{shown} ± {form.format(stdev(values))}" if known else shown
