"""Names and paths → text, on real files; hub data sets stand in as local directories of the same form."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from datamodules import texts
from datamodules.texts import check_text, stream, text_identity, text_name, text_of
from rotpruner.embedded import text_path
from rotpruner.errors import InputError

DOCUMENTS = ["First document.\nTwo lines.", "Zweites: größer.", "", "第三。"]


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: rows}), path)
    return path


def documents(source: str, **settings) -> list[str]:
    return "".join(stream(source, **settings)).split("\n\n")


@pytest.fixture
def c4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of allenai/c4: gzipped JSON lines, configurations in the card."""
    root = tmp_path / "hub" / "c4"
    for split, count in ("train", 2), ("validation", 1):
        for shard in range(count):
            rows = [
                {"text": f"{split} {shard} {i}", "timestamp": "2019-04-25T12:57:54Z", "url": "http://x.org"}
                for i in range(20)
            ]
            write_lines(root / "en" / f"c4-{split}.{shard:05}-of-{count:05}.json.gz", rows)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n"
    )
    monkeypatch.setitem(texts.HUB, "c4", replace(texts.HUB["c4"], path=str(root)))
    return root


@pytest.fixture
def wikitext2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of Salesforce/wikitext: parquet of single lines, a folder a configuration."""
    root = tmp_path / "hub" / "wikitext"
    name = "wikitext-2-raw-v1"
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n"
    for split in "test", "train", "validation":
        write_parquet(root / name / f"{split}-00000-of-00001.parquet", ["", f" = {split} = \n", "", " A b .\n"])
        card += f"  - split: {split}\n    path: {name}/{split}-*\n"
    (root / "README.md").write_text(card + "---\n")
    monkeypatch.setitem(texts.HUB, "wikitext2", replace(texts.HUB["wikitext2"], path=str(root)))
    return root


def test_the_embedded_text_is_its_file():
    assert text_of("wikipedia_test", "test") == text_path("wikipedia_test").read_text(encoding="utf-8")
    assert text_name("wikipedia_test") == "wikipedia_test"


def test_a_txt_stays_exactly_as_it_is(tmp_path):
    path = tmp_path / "notes.v2.txt"
    path.write_bytes("\ufeff a\r\nb\n\n\n".encode())
    assert text_of(str(path), "test") == "\ufeff a\r\nb\n\n\n"
    assert text_name(str(path)) == "notes.v2"


def test_a_text_at_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("words")
    check_text("~/mine.txt")
    assert text_of("~/mine.txt", "test") == "words"
    assert text_name("~/mine.txt") == "mine"
    assert text_identity("~/mine.txt") == text_identity(str(tmp_path / "mine.txt"))


def test_a_txt_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_PIECE", 3)
    path = tmp_path / "long.txt"
    path.write_bytes("größer\r\n第三。\n\n".encode() * 2)
    parts = list(stream(str(path), split="calibration"))
    assert max(map(len, parts)) == 3
    assert "".join(parts) == "größer\r\n第三。\n\n" * 2
    path.write_bytes(b"of words\0")
    with pytest.raises(InputError, match="binary"):
        text_of(str(path), "test")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet"])
def test_documents_are_joined_with_blank_lines(tmp_path, suffix):
    path = tmp_path / f"c4_en{suffix}"
    if suffix == ".parquet":
        write_parquet(path, DOCUMENTS)
    else:
        write_lines(path, [{"url": "x", "text": document} for document in DOCUMENTS])
    assert "".join(stream(str(path), split="calibration", seed=7)) == "\n\n".join(DOCUMENTS)
    assert text_of(str(path), "test") == "\n\n".join(DOCUMENTS)
    assert text_name(str(path)) == "c4_en"


def test_a_directory_is_its_text_files_by_name(tmp_path):
    write_parquet(tmp_path / "b.parquet", ["b1", "b2"])
    write_lines(tmp_path / "c.jsonl", [{"text": "c"}])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("not a text")
    (tmp_path / ".hidden.txt").write_text("neither")
    assert text_of(str(tmp_path), "test") == "a\n\nb1\n\nb2\n\nc"
    assert text_name(f"{tmp_path}/") == tmp_path.name


def test_c4_is_shuffled_by_the_seed_for_calibration_only(c4):
    rows = documents("c4", split="calibration", seed=1)
    assert rows == documents("c4", split="calibration", seed=1)
    assert rows != documents("c4", split="calibration", seed=2)
    assert sorted(rows) == sorted(f"train {shard} {i}" for shard in range(2) for i in range(20))
    assert documents("c4", split="test", seed=1) == [f"validation 0 {i}" for i in range(20)]


def test_c4_is_tested_on_its_first_documents(c4, monkeypatch):
    monkeypatch.setitem(texts.HUB, "c4", replace(texts.HUB["c4"], test_documents=3))
    assert text_of("c4", "test") == "validation 0 0\n\nvalidation 0 1\n\nvalidation 0 2"


def test_wikitext2_keeps_its_order_and_empty_lines(wikitext2):
    assert text_of("wikitext2", "test") == "\n\n = test = \n\n\n\n\n A b .\n"
    assert "".join(stream("wikitext2", split="calibration", seed=3)) == "\n\n = train = \n\n\n\n\n A b .\n"


def test_names_of_hub_data_sets():
    assert text_name("c4") == "c4"
    assert text_name("roneneldan/TinyStories") == "TinyStories"
    assert text_name("Salesforce/wikitext:wikitext-103-raw-v1") == "wikitext_wikitext-103-raw-v1"


def test_identity_changes_with_the_text(tmp_path, c4):
    path = tmp_path / "a.txt"
    path.write_text("a")
    before = text_identity(str(path))
    path.write_text("ab")
    assert text_identity(str(path)) != before
    assert text_identity("c4") != text_identity("wikitext2")
    json.dumps([before, text_identity("wikipedia_test"), text_identity("c4")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"PK\0\0", "binary"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "a"}\n', "line 3 of .* no string in the field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .* is not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1 of .* no string"),
        ("a.jsonl", b'{"text": null}\n', "line 1 of .* no string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot read"),
        ("a.parquet", b"no parquet", "not an intact parquet"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        text_of(str(path), "test")
    assert "\n" not in str(caught.value)


def test_parquet_without_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="no column 'text'"):
        text_of(str(write_parquet(tmp_path / "a.parquet", ["x"], column="body")), "test")


@pytest.mark.parametrize("name", ["missing.txt", "/no/such/file", "", "wikipedia", "here/missing.raw", "a text " * 50])
def test_unknown_names_are_refused_before_anything_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for call in texts.check_text, text_name, lambda source: stream(source, split="test"):
        with pytest.raises(InputError, match=f"no text '{name}'.*wikipedia_test, c4"):
            call(name)


def test_a_directory_without_texts_is_refused(tmp_path):
    with pytest.raises(InputError, match="no text in the directory"):
        texts.check_text(str(tmp_path))


def test_a_data_set_that_cannot_be_reached_gives_one_line(monkeypatch, c4):
    missing = replace(texts.HUB["c4"], config="fr")
    monkeypatch.setitem(texts.HUB, "c4", missing)
    with pytest.raises(InputError, match=r"'c4' cannot be read .*pass a local file") as caught:
        text_of("c4", "test")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(texts.HUB, "c4", replace(missing, path=str(c4 / "nowhere")))
    with pytest.raises(InputError, match="'c4' cannot be read"):
        text_of("c4", "test")


def test_a_data_set_without_the_split_is_refused(monkeypatch, c4):
    monkeypatch.setitem(texts.HUB, "c4", replace(texts.HUB["c4"], test_splits=("test",)))
    with pytest.raises(InputError, match="no split test"):
        text_of("c4", "test")
