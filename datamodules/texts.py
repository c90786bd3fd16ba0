"""Names and paths → text: embedded names, local files and directories, data sets of the Hugging Face hub.

| source | what it is |
|---|---|
| `wikipedia_calibration`, `wikipedia_test` | the embedded texts |
| `notes.txt` | one document, exactly as it is (so is a file of any ending not named here) |
| `c4.jsonl`, `.json`, `.jsonl.gz`, `.json.gz` | one JSON object a line, its field `text` a document |
| `shard.parquet` | each row's column `text` a document |
| a directory | every such file in it, by name |
| `c4`, `wikitext2` | the field's standard sets, from the hub |
| `owner/name`, `owner/name:config` | any hub data set with a column `text` |

A path always gives the same text. Embedded texts and local files have one split; hub data sets have two.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rotpruner.embedded import TEXTS, WIKIPEDIA, text_path
from rotpruner.errors import InputError, explained

Split = Literal["calibration", "test"]

_JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SUFFIXES = (".txt", ".parquet", *_JSON_LINES)
_HUB_NAME = re.compile(r"(?P<path>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]+))?")
_SHUFFLE_BUFFER = 10_000  # documents
_PIECE = 1_000_000  # characters
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_BLANK_LINE = re.compile(r"(?<=\S)\n\n")


@dataclass(frozen=True)
class HubText:
    """A data set of the hub (or a local directory of the same layout), and how it is read."""

    path: str
    config: str | None = None
    revision: str | None = None
    splits: tuple[str, ...] = ("train",)  # for calibration; the first that exists is taken
    test_splits: tuple[str, ...] = ("test", "validation")
    test_documents: int | None = None  # the first so many; None: all
    whole: bool = False  # small and in order: calibrate on all of it; otherwise on the start of a shuffle


HUB = {
    # 1,100 validation documents as in SparseGPT's evaluation; all of them would be 0.8 GB.
    "c4": HubText(
        "allenai/c4",
        "en",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        test_splits=("validation",),
        test_documents=1100,
    ),
    "wikitext2": HubText(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        test_splits=("test",),
        whole=True,  # its rows are single lines
    ),
}


def stream(source: str, *, split: Split, seed: int = 0) -> Iterator[str]:
    """The text of `source` in consecutive parts, never all in memory: a `.txt` exactly as it is, documents joined
    with blank lines.

    `seed` orders the calibration split of a streamed hub data set, and nothing else. A name or path that
    leads nowhere raises InputError here; what is wrong inside of a file, when it is read.
    """
    if hub := hub_text(source):
        return _joined([document] for document in _hub_documents(source, hub, split, seed))
    paths = [text_path(source)] if source in TEXTS else _files(_local(source))
    return _joined(document for path in paths for document in _file_documents(path))


def _joined(documents: Iterable[Iterable[str]]) -> Iterator[str]:
    """The parts of all documents, with blank lines between one document and the next."""
    for number, document in enumerate(documents):
        if number:
            yield "\n\n"
        yield from document


def text_of(source: str, split: Split) -> str:
    """The whole text as `stream` gives it. Empty text is refused."""
    text = "".join(stream(source, split=split))
    if not text.strip():
        raise InputError(f"text {source!r} is empty: pass one with words in it")
    return text


def pieces(parts: Iterable[str], limit: int = _PIECE) -> Iterator[str]:
    """A text that comes in any parts, cut into pieces of a little over `limit` characters to tokenise.

    The pieces' tokens, one after another, are those of the whole text for byte-level tokenisers (GPT-2,
    SmolLM2, Llama 3, Qwen): they split a text in front of a space between two letters, which is where it is
    cut here. Sentencepiece ones may add a word mark at each cut. Text without such a place is cut before a
    blank line, or else not at all; there Llama 3 and Qwen may differ by a token, which can hold punctuation and line
    ends.
    """
    held = ""
    for part in parts:
        held += part
        start = 0
        while (end := start + limit) < len(held):
            cut = _BETWEEN_WORDS.search(held, end, end + 10_000) or _BLANK_LINE.search(held, end)
            if cut is None:
                break
            yield held[start : cut.start()]
            start = cut.start()
        held = held[start:]
    if held:
        yield held


def text_name(source: str) -> str:
    """What a result calls the text: the known name, the file's stem, the hub data set's own name."""
    if source in TEXTS or source in HUB:
        return source
    if hub := hub_text(source):
        return "_".join(filter(None, (hub.path.split("/")[1], hub.config)))
    path = _local(source).absolute()
    suffix = _suffix(path)
    return path.name.removesuffix(suffix) if suffix else path.stem


def check_text(source: str) -> None:
    """Raises InputError if `source` is neither a known name nor a hub name nor there. Nothing is read."""
    if source not in TEXTS and not hub_text(source):
        _files(_local(source))


def text_identity(source: str) -> list[Any]:
    """What tells a calibration text from any other one, without reading it, as plain JSON."""
    if source in TEXTS:
        return [source, WIKIPEDIA.sha256]
    if hub := hub_text(source):
        return [hub.path, hub.config, hub.revision, list(hub.splits), hub.test_documents, hub.whole]
    files = [path.resolve() for path in _files(_local(source))]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def hub_text(source: str) -> HubText | None:
    """The hub data set that `source` names; None for an embedded text or a path that exists."""
    if source in HUB:
        return HUB[source]
    if source in TEXTS or (source and os.path.exists(_local(source))):
        return None
    name = _HUB_NAME.fullmatch(source)
    if name and not _suffix(Path(source)) and not os.path.isdir(Path(source).parent):
        return HubText(name["path"], name["config"])
    known = ", ".join((*TEXTS, *HUB))
    raise InputError(f"no text {source!r}: pass a file that exists, owner/name on the hub, or one of {known}")


def _local(source: str) -> Path:
    """A file or directory; no shell replaces a `~` within a list of an option, or in a config."""
    return Path(os.path.expanduser(source))


def _suffix(path: Path) -> str:
    return max((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), key=len, default="")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.glob("[!.]*") if file.is_file() and _suffix(file))
    if not files:
        raise InputError(f"no text in the directory {str(path)!r}: put {', '.join(_SUFFIXES)} files there")
    return files


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {str(path)!r} ({error}): pass an intact, readable file") from error


def _file_documents(path: Path) -> Iterator[Iterable[str]]:
    suffix = _suffix(path)
    if suffix not in _JSON_LINES and suffix != ".parquet":
        yield _plain_text(path)
        return
    with _readable(path):
        for document in _json_lines(path) if suffix in _JSON_LINES else _parquet_rows(path):
            yield [document]


def _plain_text(path: Path) -> Iterator[str]:
    refusal = InputError(f"{str(path)!r} is binary or not UTF-8: pass a text file in UTF-8")
    with _readable(path), path.open(encoding="utf-8", newline="") as file:
        try:
            while part := file.read(_PIECE):
                if "\0" in part:
                    raise refusal
                yield part
        except UnicodeDecodeError:
            raise refusal from None


def _json_lines(path: Path) -> Iterator[str]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"line {number} of {str(path)!r}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{where} is not JSON: write one JSON object a line") from error
                yield _text_field(row, where)


def _parquet_rows(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise InputError(f"{str(path)!r} has no column 'text': rename the documents' column to 'text'")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for row in batch.to_pylist():
                    number += 1
                    yield _text_field(row, f"row {number} of {str(path)!r}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{str(path)!r} is not an intact parquet file: write it again") from error


def _hub_documents(source: str, hub: HubText, split: Split, seed: int) -> Iterator[str]:
    wanted = hub.splits if split == "calibration" else hub.test_splits
    with explained(f"data set {source!r} cannot be read", "check its name and the network, or pass a local file"):
        import datasets

        splits = datasets.load_dataset(hub.path, hub.config, revision=hub.revision, streaming=True)
        name = next((name for name in wanted if name in splits), None)
        if name is None:
            raise InputError(f"data set {source!r} has no split {' or '.join(wanted)}: pass a local file")
        rows = splits[name]
        if split == "calibration" and not hub.whole:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for number, row in enumerate(islice(rows, hub.test_documents if split == "test" else None), 1):
            yield _text_field(row, f"row {number} of {source!r}")


def _text_field(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where} has no string in the field 'text': rename the documents' field to 'text'")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, tokenisers cannot read it
        raise InputError(f"{where} holds half a surrogate pair: mend or drop that document") from error
    return text
