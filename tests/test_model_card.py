"""Model cards: front matter that the hub takes, the numbers with their controls, and nothing private."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml
from conftest import sample_text, tiny_llama
from huggingface_hub import ModelCard, metadata_load

import rotpruner
from experiments.__main__ import main
from rotpruner import provenance
from rotpruner.cache import cache_directory
from rotpruner.embedded import embedded_name
from rotpruner.model_card import Origin, license_of, model_card, pruner_name, public
from rotpruner.pruners import resolve_pruner

ROWS = [
    {"name": "dense", "pattern": None, "sparsity": 0.0, "seconds": 0.0, "ppl": {"words": 14.5}, "parameters": 10**6},
    {
        "name": "rotpruner",
        "pattern": "2:4",
        "sparsity": 0.5,
        "seconds": 572.4,
        "ppl": {"words": 1033.87},
        "parameters": 2,
    },
]
LEARNED = Origin(
    "owner/name",
    "2:4",
    "wanda",
    basis="learned",
    spaces=("residual", "value_heads"),
    calibration="c4",
    num_sequences=64,
    seq_len=1024,
    steps=100,
    training_tokens=102_400,
    rows=ROWS,
    evaluation="in float32",
    command="python -m experiments fit -c config.yaml",
    config={"model": {"pattern": "2:4"}},
)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_says_what_is_known():
    text = model_card(LEARNED, name="export", license={"license": "mit"}, commit="abc", versions={"torch": "2.13"})
    assert front_matter(text) == {
        "base_model": "owner/name",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["rotpruner", "pruning", "sparse", "2:4", "wanda"],
    }
    facts = ["residual, value_heads", "64 × 1,024 = 65,536 tokens", "100 steps, 102,400 tokens", "14.50", "1,033.87"]
    facts += ["0.5000", "572", "abc", "torch 2.13", 'from_pretrained("export")', "pattern: '2:4'", "fit -c config.yaml"]
    for fact in facts:
        assert fact in text, fact
    assert "Not measured in this run: pruner or pca, random_rotation." in text


def test_card_guesses_nothing():
    text = model_card(Origin("mine", "slice:0.3", basis="pca"), name="export")
    assert "license" not in front_matter(text)
    assert front_matter(text)["tags"] == ["rotpruner", "pruning", "sliced", "slice:0.3"]
    assert "see its own page" in text
    assert "Not measured." in text
    assert "commit unknown" in text


def test_embedded_model_names_its_original():
    text = model_card(Origin("smollm2-135m", "0.5", "ria"), name="export", license=license_of("smollm2-135m"))
    assert front_matter(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front_matter(text)["license"] == "apache-2.0"
    assert "dequantised" in text
    assert embedded_name(str(cache_directory() / "models" / "smollm2-135m")) == "smollm2-135m"
    assert embedded_name("/other/smollm2-135m") == "/other/smollm2-135m"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/home/ann/texts/my text.txt", "my text.txt"),
        ("~/models/tiny", "tiny"),
        ("./a.txt", "a.txt"),
        ("runs/deep/below", "below"),
        ("owner/name", "owner/name"),
        ("experiments/configs", "configs"),
        ("callbacks.finish.Finish", "callbacks.finish.Finish"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("prune --output /home/ann/x --pattern 2:4", "prune --output x --pattern 2:4"),
        ("prune --output /home/ann/x" + " --pattern 2:4" * 30, "prune --output x" + " --pattern 2:4" * 30),
        ({"a": ["/x/y", 3, None]}, {"a": ["y", 3, None]}),
    ],
    ids=str,
)
def test_paths_shrink_to_their_last_part(given, expected):
    assert public(given) == expected


def test_a_base_that_is_neither_here_nor_a_hub_name_has_no_licence():
    assert license_of("my models/llama") == {}


def test_licence_is_what_the_checkpoint_says(tmp_path):
    readme = tmp_path / "README.md"
    assert license_of(str(tmp_path)) == {}
    assert license_of("nobody/has-this-in-a-cache") == {}
    readme.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: en\n---\ntext")
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    for useless in ("no front matter", "---\nlicense: [\n---\n", "---\n- a list\n---\n"):
        readme.write_text(useless)
        assert license_of(str(tmp_path)) == {}, useless
    config = tiny_llama().config
    config.license = "mit"
    assert license_of(str(tmp_path), config) == {"license": "mit"}


def test_pruners_are_named_as_on_the_command_line():
    assert pruner_name(resolve_pruner("sparsegpt")) == "sparsegpt"
    assert pruner_name(resolve_pruner("test_api.RelativeToColumn")) == "test_api.RelativeToColumn"


@pytest.mark.parametrize("rotations", [None, "random"])
def test_prune_writes_a_card(rotations, model_directory, text_file, test_text_file, tmp_path, capsys):
    output = tmp_path / "pruned"
    arguments = f"--model {model_directory} --pruner ria --pattern 2:4 --calibration {text_file} --output {output}"
    arguments += f" --num_sequences 4 --seq_len 32 --text {test_text_file} --max_tokens 64 --json"
    arguments += f" --rotations {rotations}" if rotations else ""
    assert main(["prune", *arguments.split()]) == 0
    result = json.loads(capsys.readouterr().out)
    text = (output / "README.md").read_text()
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model is None, "no name of the hub"
    assert "| base model | `tiny` |" in text
    assert f"{result['ppl']['other_words']:,.2f}" in text
    assert "4 × 32 = 128 tokens" in text
    assert f"--calibration {text_file.name} " in text
    assert "first 64 tokens" in text
    assert ("residual, value_heads, query_key" if rotations else "nothing is rotated") in text
    assert_nothing_private(text, tmp_path)
    rotpruner.pack(output, tmp_path / "packed")
    assert (tmp_path / "packed" / "README.md").read_text() == text


def test_fit_writes_a_card_with_its_controls(model_directory, text_file, test_text_file, tmp_path, capsys):
    from command_line import fit_arguments

    run = tmp_path / "run"
    arguments = fit_arguments(model_directory, text_file, test_text_file, run)
    assert main(["fit", "-c", "experiments/configs/quickstart.yaml", *arguments]) == 0
    text = (run / "export" / "README.md").read_text()
    results = json.loads((run / "results.json").read_text())
    for row in results["rows"]:
        assert f"| {row['name']} |" in text
        assert f"{row['ppl']['other_words']:,.2f}" in text
    assert "Not measured" not in text
    steps = results["config"]["trainer"]["max_steps"]
    assert f"{steps} steps, {steps * 32 * results['config']['data']['batch_size']} tokens" in text
    assert "base_model" not in metadata_load(run / "export" / "README.md")
    recorded = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recorded["model"]["pattern"] == "2:4"
    assert recorded["data"]["calibration"] == text_file.name
    assert_nothing_private(text, tmp_path)


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        (dict(), "2:4 by wanda"),
        (dict(pattern="slice:0.5"), "slice:0.5"),
        (dict(rotate="per_layer"), "2:4 by wanda"),
    ],
)
def test_python_interface_writes_a_card(changes, title, tokenizer, tmp_path):
    settings = dict(steps=2, num_sequences=2, seq_len=32, **changes)
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = rotpruner.load(tmp_path / "dense")
    pruned = rotpruner.prune(model, tokenizer, [sample_text(200)], **settings)
    rotpruner.save(pruned, tokenizer, tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert f"# dense, {title}\n" in text
    assert ("trust_remote_code=True" in text) is ("rotate" in changes)
    assert ("changes of basis in the residual connections" in text) is ("rotate" in changes)
    assert "2 steps, 64 tokens" in text
    assert "Not measured." in text
    assert_nothing_private(text, tmp_path)
    assert rotpruner.load(tmp_path / "saved").config.hidden_size == pruned.config.hidden_size
    with pytest.raises(rotpruner.InputError, match="exists already"):
        rotpruner.save(pruned, tokenizer, tmp_path / "saved")
    rotpruner.save(model, tokenizer, tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


def assert_nothing_private(text, tmp_path):
    assert str(tmp_path) not in text
    assert str(tmp_path.parent) not in text


def test_commit_of_somebody_elses_checkout_is_none(tmp_path, monkeypatch):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        alone |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", "-C", tmp_path, *names, *arguments], check=True, capture_output=True, env=alone)

    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    git("init", "-q")
    file = tmp_path / "provenance.py"
    file.touch()
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.commit() is None
    git("add", ".")
    git("commit", "-qm", "one")
    git("tag", "-am", "named", "v1")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit())
    file.write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}-dirty", provenance.commit())


def test_commands_are_published_without_the_places_of_this_machine():
    words = ["prune", "--model", "~/models/tiny", "--text", "[wikipedia_test, /data/wiki.txt]", "--rotations", "../r"]
    words += ["-c", "experiments/configs/a.yaml", "--from", "runs/a/0"]
    shown = provenance.public_command(words)
    assert provenance.public_command(["--output", "/home/Ann Lee/x"]) == "--output x"
    assert shown == (
        "prune --model tiny --text '[wikipedia_test, wiki.txt]' --rotations r"
        " -c experiments/configs/a.yaml --from runs/a/0"
    )
