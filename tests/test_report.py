"""The report: what a run leaves for it, and the page as a person's browser shows it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from command_line import fit_arguments
from safetensors.torch import load_file

from experiments.__main__ import main
from experiments.report_plots import figures
from experiments.report_runs import read_curves, read_runs
from rotpruner.objectives import Objective


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_directory, text_file, test_text_file, session_cache):
    """Two finished fits of the quickstart on a tiny model."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ROTPRUNER_CACHE", str(session_cache))
        for name, pattern in (("two-four", "2:4"), ("three of four weights <gone>", "0.75")):
            given = fit_arguments(model_directory, text_file, test_text_file, root / name)
            given += ["--model.pattern", pattern, "--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1"]
            assert main(["fit", "-c", "experiments/configs/quickstart.yaml", *given]) == 0
    return sorted(root.iterdir())


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """(page, what `--json` printed)."""
    output = tmp_path_factory.mktemp("out") / "report.html"
    with redirect_stdout(StringIO()) as printed:
        assert main(["report", *map(str, runs), "--output", str(output), "--json"]) == 0
    return output, json.loads(printed.getvalue())


def test_a_run_leaves_what_the_report_needs(runs):
    for run in runs:
        linears = json.loads((run / "layers.json").read_text())["linears"]
        assert len(linears) == 14
        maps = load_file(run / "heatmap.safetensors")
        assert {basis: tuple(cells.shape) for basis, cells in maps.items()} == {"own": (32, 32), "learned": (32, 32)}
        assert not torch.allclose(maps["own"], maps["learned"])


def test_the_page_is_self_contained_and_the_plots_stand_beside_it(report, runs):
    page, printed = report
    text = page.read_text()
    assert printed["output"] == str(page)
    assert printed["runs"] == ["three of four weights <gone>", "two-four"]
    names = {Path(path).stem for path in printed["plots"]}
    expected = {"train-loss", "gap-other_words", "layers-sparsity", "layers-error", "layers-kept-mass", "heatmap-2"}
    assert expected <= names
    assert all(Path(path).read_text().startswith("<?xml") for path in printed["plots"])
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "three of four weights &lt;gone&gt;" in text
    assert "<gone>" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "figures share ids"
    rows = json.loads((runs[1] / "results.json").read_text())["rows"]
    gap = math.log(rows[3]["ppl"]["other_words"] / rows[0]["ppl"]["other_words"])
    assert f"<td>{gap:.3f}</td>" in text
    assert "pattern: &#x27;2:4&#x27;" in text


def test_a_caption_says_what_a_curve_is(runs):
    [run] = read_runs([runs[1]])
    terms = [f"train/{field.name}" for field in fields(Objective)]
    logged = ["train/loss", *terms, "ppl/wikitext2", "masks/flipped"]
    shown = {name for name in run.curves if name.startswith(("train/", "ppl/", "masks/"))}
    assert {"train/loss", "masks/flipped"} <= shown <= set(logged)
    drawn = figures([replace(run, curves={name: [(0, 2.0), (1, 1.0)] for name in logged})])
    captions = [drawn[name.replace("/", "-")][0] for name in logged]
    assert len(set(captions)) == len(logged)
    assert not set(captions) & set(logged)


def test_the_command_on_the_page_makes_the_run_again(report, runs, tmp_path):
    command = re.search(r"experiments (fit -c \S*two-four/config\.yaml --\S+) NEW_DIRECTORY", report[0].read_text())
    assert command is not None
    assert main([*command[1].split(), str(tmp_path / "again")]) == 0
    again, first = (json.loads((run / "results.json").read_text()) for run in (tmp_path / "again", runs[1]))
    assert [row["ppl"] for row in again["rows"]] == [row["ppl"] for row in first["rows"]]


def test_runs_without_logs_and_layers_are_reported_all_the_same(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(runs[0] / "results.json", bare)
    assert main(["report", str(bare), "--output", str(tmp_path / "bare.html")]) == 0
    assert "bare has no CSV logs and no layers.json" in (tmp_path / "bare.html").read_text()


def _refused(arguments: list[str], capsys) -> str:
    assert main(["report", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_reported_is_refused_in_one_line(runs, tmp_path, capsys):
    output = ["--output", str(tmp_path / "report.html")]
    assert "no results.json" in _refused([str(tmp_path), *output], capsys)
    assert "twice" in _refused([str(runs[0]), str(runs[0]), *output], capsys)
    assert ".html" in _refused([str(runs[0]), "--output", str(tmp_path)], capsys)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "results.json").write_text('{"rows": [')
    assert "damaged" in _refused([str(damaged), *output], capsys)
    assert not (tmp_path / "report.html").exists()


def _browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    found = [*filter(None, map(shutil.which, names)), *map(str, cache.glob("chromium*/chrome-linux*/chrome"))]
    if not found:
        pytest.skip("no Chromium on this machine")
    return found[0]


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_a_browser_shows_the_page(report, width, height, scheme, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    complaints, requests = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report[0].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert page.locator("tbody tr").count() == 8
        boxes = [figure.bounding_box() for figure in page.locator("figure svg").all()]
        assert len(boxes) == len(report[1]["plots"])
        assert all(box["width"] > 280 and box["height"] > 150 for box in boxes)
        sizes = page.evaluate("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
        assert min(sizes) > 7, "letters too small to read"
        cut = page.evaluate("""[...document.querySelectorAll('figure svg')].flatMap(svg => {
            const all = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < all.left - 1 || box.right > all.right + 1;
            }).map(text => text.textContent);
        })""")
        assert cut == []
        ink, ground = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ink, ground)]
        dark, bright = brightness if scheme == "light" else reversed(brightness)
        assert dark < 100
        assert bright > 200
        page.locator("summary").first.click()
        assert "max_steps: 6" in page.locator("details").first.inner_text()
        shot = page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert len(shot) > 20_000
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_a_config_of_the_report_is_readable_yaml(report):
    """What the page shows of the settings can be given to `fit` again."""
    import html

    shown = re.findall(r"<pre>(.*?)</pre>", report[0].read_text(), flags=re.DOTALL)
    config = yaml.safe_load(html.unescape(shown[1]))
    assert config["model"]["pattern"] == "0.75"


def test_without_matplotlib_the_reader_is_told_what_to_install(runs, monkeypatch, capsys):
    for module in ("experiments.report", "experiments.report_plots"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "-e '.[report]'" in _refused([str(runs[0])], capsys)


def test_later_logs_win_where_a_resumed_run_has_repeated_a_step(tmp_path):
    for version, loss in ((10, 3.0), (9, 7.0)):  # by number, whatever a copy has made of their times
        path = tmp_path / "logs" / f"version_{version}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(f"epoch,step,train/loss\n0,{version},1.0\n0,5,{loss}\n")
    with path.open("a") as cut:
        cut.write("0,9,-\n0\n")
    assert read_curves(tmp_path) == {"train/loss": [(5, 3.0), (9, 1.0), (10, 1.0)]}
