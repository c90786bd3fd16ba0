"""The report: what a run leaves for it, and the page as a person's browser shows it."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import fit_arguments
from conftest import tiny_llama
from safetensors.torch import load_file
from tiny_models import rotated_model

from callbacks import finish
from experiments.__main__ import main
from experiments.report_runs import read_curves
from rotpruner.diagnostics import (
    block_means,
    kept_mass,
    layer_table,
    masked_share,
    pooled_rms,
    relative_error,
    write_diagnostics,
)
from rotpruner.families import linear_modules
from rotpruner.oneshot import gather_model_moments, prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotations import merge_rotations, random_rotations
from rotpruner.statistics import Moment

# -- the numbers -------------------------------------------------------------------------------------


def test_kept_mass_and_error_by_hand():
    saliency, mask = torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([[True, False], [True, False]])
    assert kept_mass(saliency, mask) == pytest.approx(5 / 8)
    weight = torch.tensor([[1.0, 2.0]])
    H = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    moment = Moment(H[None])
    # Ŵ = (1, 0): E‖2 x₂‖² = 4, E‖W x‖² = 4 + 2·2·1 + 4 = 12.
    assert relative_error(weight, weight * torch.tensor([[1.0, 0.0]]), moment) == pytest.approx(math.sqrt(4 / 12))
    assert relative_error(weight, weight * torch.tensor([[0.0, 1.0]]), None) == pytest.approx(math.sqrt(1 / 5))


def test_looking_at_saliencies_leaves_no_inverses_behind(ids):
    """Of which each is as large as the moment that it was taken of."""
    rotated = rotated_model(tiny_llama(), pruner="sparsegpt")
    rotated.calibrate(ids.split(1))
    rotated.refresh_masks()
    before = {group: len(moment._derived) for group, moment in rotated.moments.items()}
    assert len(masked_share(rotated)) == 14
    rotations = {space: Q.detach() for space, Q in rotated.rotations().items()}
    layer_table(tiny_llama(), tiny_llama(), rotations, rotated.moments, rotated.pruner, rotated.patterns)
    assert {group: len(moment._derived) for group, moment in rotated.moments.items()} == before


@pytest.mark.parametrize(("n", "heads"), [(8, 1), (4, 2), (8, 2)])
def test_errors_do_not_depend_on_the_basis(n, heads):
    """The same error, seen from x Q with W Q: blocks gathered by head, whole, and whole but rotated by head."""
    generator = torch.Generator().manual_seed(n + heads)
    width = 8
    X = torch.randn(64, width, generator=generator)
    X[:, 1] += X[:, 0]
    H = X.mT @ X / len(X)
    Q = torch.linalg.qr(torch.randn(heads, width // heads, width // heads, generator=generator)).Q
    blocks = torch.stack([H[i : i + n, i : i + n] for i in range(0, width, n)])
    W, pruned = torch.randn(2, 5, width, generator=generator).unbind()
    turn = torch.block_diag(*Q)
    own = relative_error(W, pruned, Moment(blocks))
    assert relative_error(W @ turn, pruned @ turn, Moment(blocks).rotate(Q)) == pytest.approx(own, rel=1e-5)
    if n == width:
        direct = ((W - pruned) @ X.mT).norm() / (W @ X.mT).norm()
        assert own == pytest.approx(direct.item(), rel=1e-5)


def test_layer_table_reports_what_the_pruner_did():
    rotations = random_rotations(tiny_llama().config, ["residual", "value_heads"], 0)
    pruner, pattern = resolve_pruner("wanda"), parse_pattern("0.75")
    batches = list(torch.randint(0, 320, (2, 1, 32), generator=torch.Generator().manual_seed(0)))
    model, pruned = tiny_llama(), tiny_llama()
    moments = gather_model_moments(model, pruner, rotations, batches)
    prune_model(pruned, pruner, pattern, rotations=rotations, moments=moments)
    rows = layer_table(tiny_llama(), pruned, rotations, moments, pruner, [pattern] * 2)
    assert [row["layer"] for row in rows] == [0] * 7 + [1] * 7
    for row in rows:
        assert row["sparsity"] == pytest.approx(0.75, abs=1e-6)
        assert 0.25 < row["kept_mass"]["own"] < 1
        assert 0.25 < row["kept_mass"]["learned"] < 1
        assert 0.1 < row["error"] < 1
    other = layer_table(tiny_llama(), _shuffled(pruned), rotations, moments, pruner, [pattern] * 2)
    for row, worse in zip(rows, other, strict=True):
        assert worse["kept_mass"]["learned"] < row["kept_mass"]["learned"], "of the masks that are there"
    # Queries, of the merged model with statistics of its own: what the pruner has judged.
    merged, wanda = tiny_llama(), resolve_pruner("wanda")
    merge_rotations(merged, rotations)
    full = gather_model_moments(merged, resolve_pruner("sparsegpt"), (), batches)
    for row in rows[::7]:
        weight, moment = merged.get_submodule(row["name"]).weight.detach(), full[row["name"]]
        error = relative_error(weight, pruned.get_submodule(row["name"]).weight.detach(), moment)
        saliency = wanda.saliency(weight, moment)
        assert row["error"] == pytest.approx(error, rel=1e-3)
        assert row["kept_mass"]["learned"] == pytest.approx(kept_mass(saliency, pattern.mask(saliency)), rel=1e-3)
        assert abs(row["kept_mass"]["own"] - row["kept_mass"]["learned"]) > 1e-3
    # Of a narrower model, what is missing counts; a pattern of whole directions has no masks to speak of.
    narrow = tiny_llama(hidden_size=16, intermediate_size=24)
    row = layer_table(tiny_llama(), narrow, {}, {}, pruner, [])[4]
    assert row["sparsity"] == pytest.approx(0.75)
    assert row["error"] is row["kept_mass"] is None


def test_a_heat_map_shows_root_mean_squares():
    torch.testing.assert_close(pooled_rms(torch.tensor([[1.0, -3.0]])), torch.tensor([[1.0, 3.0]]) / math.sqrt(5))


def test_masks_are_scored_in_the_rotations_that_they_were_chosen_in(ids):
    """While it learns as afterwards."""
    rotated = rotated_model(tiny_llama(), start="random")
    rotated.calibrate(ids.split(1))
    rotated.refresh_masks()
    rotations = {space: Q.detach() for space, Q in rotated.rotations().items()}
    pruned = tiny_llama()
    prune_model(pruned, rotated.pruner, rotated.pattern, rotations=rotations, moments=rotated.moments)
    rows = layer_table(tiny_llama(), pruned, rotations, rotated.moments, rotated.pruner, rotated.patterns)
    for row, learning in zip(rows, masked_share(rotated), strict=True):
        assert learning["name"] == row["name"]
        assert learning["kept_mass"] == pytest.approx(row["kept_mass"]["learned"], rel=1e-4)


def _shuffled(model):
    """The same model with its zeros elsewhere."""
    shuffled = copy.deepcopy(model)
    for name, linear in linear_modules(shuffled).items():
        order = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(len(name)))
        linear.weight.data = linear.weight.data[:, order]
    return shuffled


def test_means_of_blocks_are_over_weights():
    rows = [
        {"layer": 0, "weights": 1, "of": 0},
        {"layer": 0, "weights": 3, "of": 1},
        {"layer": 1, "weights": 2, "of": 5},
    ]
    assert block_means(rows, lambda row: row["of"]) == {0: 0.75, 1: 5}


def test_later_logs_win_where_a_resumed_run_has_repeated_a_step(tmp_path):
    for version, (loss, made) in enumerate(((3.0, 200), (7.0, 100))):  # by time, not by number
        path = tmp_path / "logs" / f"version_{version}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(f"epoch,step,train/loss\n0,{version},1.0\n0,5,{loss}\n")
        os.utime(path, (made, made))
    assert read_curves(tmp_path) == {"train/loss": [(0, 1.0), (1, 1.0), (5, 3.0)]}


def test_each_block_is_scored_by_the_pattern_that_it_was_pruned_by():
    pruner, patterns = resolve_pruner("magnitude"), [parse_pattern(0.0), parse_pattern(0.75)]
    rows = layer_table(tiny_llama(), tiny_llama(), {}, {}, pruner, patterns)
    assert all(row["kept_mass"] == {"own": 1, "learned": 1} for row in rows if row["layer"] == 0)
    assert all(0.25 < row["kept_mass"]["own"] < 0.8 for row in rows if row["layer"] == 1)


def test_a_fit_with_shared_out_sparsity_is_diagnosed_by_its_shares(
    model_directory, text_file, test_text_file, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr(finish, "write_diagnostics", lambda *all: given.append(all[6]) or write_diagnostics(*all))
    arguments = fit_arguments(model_directory, text_file, test_text_file, tmp_path / "run")
    owl = ["--model.pattern", "0.5", "--model.layer_sparsity", "owl"]
    assert main(["fit", "-c", "experiments/configs/quickstart.yaml", *arguments, *owl]) == 0
    shares = [pattern.sparsity for pattern in given[0]]
    assert len(set(shares)) == 2
    for row in json.loads((tmp_path / "run" / "layers.json").read_text())["linears"]:
        assert row["sparsity"] == pytest.approx(shares[row["layer"]], abs=0.02), "rounded in each row"


# -- the page ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_directory, text_file, test_text_file):
    """Two finished fits of the quickstart on a tiny model."""
    root = tmp_path_factory.mktemp("runs")
    for name, pattern in (("two-four", "2:4"), ("three of four weights <gone>", "0.75")):
        settings = {
            "--model.model": model_directory,
            "--model.base_dtype": "float32",
            "--model.pattern": pattern,
            "--data.calibration": text_file,
            "--data.num_sequences": 4,
            "--data.seq_len": 32,
            "--trainer.accelerator": "cpu",
            "--trainer.max_steps": 6,
            "--trainer.log_every_n_steps": 1,
            "--trainer.default_root_dir": root / name,
            "--trainer.callbacks.init_args.texts": f"[{test_text_file}]",
            "--trainer.callbacks.init_args.seq_len": 32,
            "--trainer.callbacks.init_args.max_tokens": 256,
        }
        given = [str(item) for pair in settings.items() for item in pair]
        assert main(["fit", "-c", "experiments/configs/quickstart.yaml", *given]) == 0
    return sorted(root.iterdir())


@pytest.fixture
def report(runs, tmp_path, capsys):
    """(page, what `--json` printed)."""
    output = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, runs), "--output", str(output), "--json"]) == 0
    return output, json.loads(capsys.readouterr().out)


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
    found = [*filter(None, map(shutil.which, names)), *map(str, cache.glob("chromium*/chrome-linux*/*chrom*"))]
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
