"""The HTML page of a report: one file, nothing fetched, readable on a phone, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import yaml

from experiments.report_runs import Run

#: Of a page and of a lone SVG file: ink, ground and the colours of the series, by the reader's scheme.
COLOURS = """
:root { color-scheme: light dark; --ink: #1c1f24; --ground: #fdfdfc; --soft: #f1f2f0; --grid: #d9dbd8;
  --c1: #0b62a8; --c2: #c2410c; --c3: #15803d; --c4: #8e3ab5; --c5: #b0730a; --c6: #0f7f88; --c7: #be185d; --c8: #5b6470; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ea; --ground: #15181c; --soft: #20252b; --grid: #3a414a;
  --c1: #6cb2f0; --c2: #fb8b5a; --c3: #62c987; --c4: #cf94ec; --c5: #e3b04b; --c6: #58c4cd; --c7: #f47fb2; --c8: #a9b3bf; } }
svg text { font-family: system-ui, sans-serif !important; }
"""  # noqa: E501

_LAYOUT = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; overflow-wrap: anywhere; color: var(--ink);
  background: var(--ground); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .3rem 0; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap;
  overflow-wrap: normal; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; } tr.learned td { font-weight: 600; }
th, td:first-child { white-space: normal; }
tr.first td { border-top: 2px solid var(--grid); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; background: var(--soft); border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; } figcaption { font-size: .85rem; }
pre { overflow-x: auto; padding: .7rem; background: var(--soft); border-radius: .5rem; font-size: .8rem; }
summary { cursor: pointer; padding: .4rem 0; } p.note { font-size: .85rem; }
"""


def page(runs: Sequence[Run], figures: Mapping[str, tuple[str, str]]) -> str:
    """The whole page, from runs and the figures made of them."""
    drawn = "\n".join(
        f'<figure role="img" aria-label="{escape(caption)}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
        for caption, svg in figures.values()
    )
    title = "RotPruner: " + ", ".join(run.label for run in runs)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{COLOURS}{_LAYOUT}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<h2>Results</h2>
<div class="scroll">{_table(runs)}</div>
<p class="note">dense: the model as it came; pruner: the same pruner without rotation; start: in the basis where
learning began; pca: the slice of principal directions; random_rotation: in a basis that nobody learned; rotpruner: in
the learned basis; no_update: the same before the weight update; first_fit: what the first of two fits made;
recovered: after sparse recovery, pruned: before it.
G = ln ppl − ln ppl(dense), nats per token; less is better.</p>
<h2>Figures</h2>
<div class="figures">
{drawn}
</div>
{_missing(runs)}
<h2>Settings</h2>
{"".join(map(_settings, runs))}
</body>
</html>
"""


def _table(runs: Sequence[Run]) -> str:
    texts = list(dict.fromkeys(text for run in runs for text in run.texts))
    heads = ["run", "row", "pattern", "sparsity"]
    heads += [head for text in texts for head in (f"ppl {text}", f"G {text}")] + ["parameters", "seconds"]
    lines = ["<table><thead><tr>" + "".join(f"<th>{_breakable(head)}</th>" for head in heads) + "</tr></thead><tbody>"]
    for run in runs:
        for index, row in enumerate(run.results["rows"]):
            cells = [run.label, row["name"], row["pattern"] or "", f"{row['sparsity']:.4f}"]
            for text in texts:
                gap, ppl = run.gap(row, text), row["ppl"].get(text)
                cells += ["" if ppl is None else f"{ppl:,.2f}", "" if math.isnan(gap) else f"{gap:.3f}"]
            cells += [f"{row['parameters'] / 1e6:,.1f} M", f"{row['seconds']:,.0f}"]
            classes = "first " * (index == 0) + "learned" * (row["name"] in ("rotpruner", "recovered"))
            shown = "".join(f"<td>{_breakable(cell)}</td>" for cell in cells)
            lines.append(f'<tr class="{classes}">{shown}</tr>')
    return "\n".join(lines) + "</tbody></table>"


def _breakable(text: str) -> str:
    """Escaped; names may be broken after an underscore where a column is narrow."""
    return escape(text).replace("_", "_<wbr>")


def _missing(runs: Sequence[Run]) -> str:
    """Say what a run has no data for, instead of leaving a reader to wonder."""
    notes = []
    for run in runs:
        lacks = [name for name, held in (("CSV logs", run.curves), ("layers.json", run.linears)) if not held]
        if lacks:
            notes.append(f'<p class="note">{escape(run.label)} has no {" and no ".join(lacks)}.</p>')
    return "\n".join(notes)


def _settings(run: Run) -> str:
    config = yaml.safe_dump(run.results["config"], sort_keys=False, allow_unicode=True)
    return (
        f"<details><summary>{escape(run.label)}, commit {escape(str(run.results['commit']))}</summary>"
        f"<p>The same run again:</p><pre>{escape(run.command)}</pre><pre>{escape(config)}</pre></details>"
    )


def alone(svg: str) -> str:
    """An SVG element as a file of its own, with the colours that the page would have given it."""
    style = f"<style>{COLOURS} :root {{ color: var(--ink); background: var(--ground); }}</style>"
    start = svg.index(">") + 1
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg[:start] + style + svg[start:]
