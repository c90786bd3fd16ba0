"""Reads an offline run of wandb back: protocol buffers in LevelDB's log format, blocks of 32 KiB.

The file begins with a header of 7 bytes; a record's fragments have headers of 7 bytes too: a checksum, the length, and
whether it is whole (1), the first (2), a middle one (3) or the last (4).
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """Every record of a `.wandb` file."""
    content = path.read_bytes()
    assert content[:4] in (b"", b":W&B")
    position, parts = 7, b""
    while position + 7 <= len(content):
        if _BLOCK - position % _BLOCK < 7:  # no header fits in: padding
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + length > len(content):
            return  # still being written
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def _name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


class OfflineRun:
    """What an offline run holds.

    Attributes:
        config: by name.
        history: for each logged step, {metric: value}; of pictures and tables, {name.path: file, …}.
        files: the run's directory of files.
        raw: the whole file.
    """

    def __init__(self, directory: Path) -> None:
        (file,) = directory.glob("*.wandb")
        # wandb's service may write the end of a run after the process has left.
        deadline = time.monotonic() + 60
        while not any(record.HasField("exit") for record in records(file)):
            assert time.monotonic() < deadline, f"{file} has no end"
            time.sleep(0.1)
        self.raw, self.files = file.read_bytes(), directory / "files"
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        for record in records(file):
            for update in (record.run.config.update, record.config.update):
                self.config |= {_name(item): json.loads(item.value_json) for item in update}
            if record.history.item:
                self.history.append({_name(item): json.loads(item.value_json) for item in record.history.item})

    def values(self, metric: str) -> list[Any]:
        """A metric's values in the order in which they were logged."""
        return [row[metric] for row in self.history if metric in row]

    def table(self, name: str) -> dict[str, Any]:
        """The last table of that name: {"columns", "data"}."""
        assert set(self.values(f"{name}._type")) == {"table-file"}
        return json.loads((self.files / self.values(f"{name}.path")[-1]).read_text())

    def picture(self, name: str) -> Path:
        """The last picture of that name."""
        assert self.values(f"{name}._type"), f"no picture {name}"
        return self.files / self.values(f"{name}.filenames")[-1][0]
