"""Fits on shards of C4's form take the memory of a piece of them; of several that start at once, one reads them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue

import pytest
from conftest import sample_text, tiny_llama
from lightning import Callback
from peak_memory import needs_linux, resident
from processes import PROCESSES, fit
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules import texts, tokens

MIB = 2**20
SHARDS = 4


def write_shards(root: Path, megabytes: int) -> Path:
    """Shards of `allenai/c4`'s layout, gzipped JSON lines and the card that names them; documents of 2 kB."""
    chooser = random.Random(megabytes)
    words = sample_text(40_000).split(". ")[0]
    blocks = []
    for _ in range(SHARDS):
        rows = b""
        while len(rows) < MIB:
            start = chooser.randrange(len(words) - 2000)
            rows += json.dumps({"text": words[start : start + 2000], "url": f"http://x.org/{start}"}).encode() + b"\n"
        blocks.append(gzip.compress(rows, 1))
    (root / "en").mkdir(parents=True)
    for shard, block in enumerate(blocks):
        with (root / "en" / f"c4-train.{shard:05}-of-{SHARDS:05}.json.gz").open("wb") as file:
            for _ in range(megabytes // SHARDS):  # members of a gzip file may follow each other
                file.write(block)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n---\n"
    )
    return root


def write_model(directory: Path) -> Path:
    """A tiny model with a tokenizer that is fast for its size: tokens of about twenty characters."""
    cut = " (?=[abi])"
    vocabulary = {"?": 0}
    for part in re.split(cut, sample_text(40_000)):
        vocabulary.setdefault(part, len(vocabulary))
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(cut), "removed")
    PreTrainedTokenizerFast(tokenizer_object=found).save_pretrained(directory)
    tiny_llama(vocab_size=len(vocabulary), max_position_embeddings=256).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Found:
    """What one fit saw: whether it read the text, its tokens' checksum, its peak of memory above its start, bytes."""

    built: bool
    digest: str
    peak: int


class Tokens(Callback):
    """The checksum of what a fit learns on."""

    def on_train_end(self, trainer, pl_module):
        self.digest = hashlib.sha256(trainer.datamodule.tokens.numpy().tobytes()).hexdigest()


def learn(source: str, root: str, place: Path, results: Queue[Found]) -> None:
    """One process's fit of two steps; `c4` is at `root`."""
    os.environ["ROTPRUNER_CACHE"] = str(place / "cache")
    texts.HUB["c4"] = replace(texts.HUB["c4"], path=root)
    read, reads = texts.stream, []
    tokens.stream = lambda *given, **settings: reads.append(given) or read(*given, **settings)
    settings = {
        "--model.model": place / "model",
        "--data.calibration": source,
        "--data.seq_len": 256,
        "--trainer.max_steps": 2,
        "--trainer.accelerator": "cpu",
        "--trainer.default_root_dir": place / f"run-{os.getpid()}",
        "--trainer.enable_checkpointing": "false",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_model_summary": "false",
    }
    learned = Tokens()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    fit([str(item) for pair in settings.items() for item in pair], [learned])
    results.put(Found(bool(reads), learned.digest, resident("VmHWM") - before))


def start(processes: int, *given: object) -> list[Found]:
    results = PROCESSES.Queue()
    started = [PROCESSES.Process(target=learn, args=(*given, results), daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    found = [results.get(timeout=400) for _ in started]
    for process in started:
        process.join()
    return found


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "small", "large"),
    [
        ("stream", 64, 200),  # 64: what fills the shuffle buffer and the reader's blocks
        ("directory", 16, 150),  # of which each byte is tokenised
    ],
)
def test_large_sets_of_shards_take_no_more_memory_than_small_ones(form, small, large, tmp_path):
    def run(processes: int, megabytes: int) -> list[Found]:
        root = tmp_path / f"{megabytes}"
        return start(processes, f"{root}/en" if form == "directory" else "c4", str(root), tmp_path)

    write_model(tmp_path / "model")
    for megabytes in (small, large):
        write_shards(tmp_path / f"{megabytes}", megabytes)
    (first,) = run(1, small)
    both = run(2, large)
    assert sorted(found.built for found in both) == [False, True], "one reads the shards, the other waits for it"
    assert {found.digest for found in both} != {first.digest}
    # Two fits beside each other scatter by tens of megabytes; a set that was held would add more than its size.
    for found in both:
        assert found.peak - first.peak < (large - small) * MIB / 3, (first, both)

    for shard in (tmp_path / f"{large}" / "en").iterdir():  # the same sizes and times, and nothing to read
        times = shard.stat()
        with shard.open("r+b") as file:
            file.write(bytes(MIB))
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    (again,) = run(1, large)
    assert not again.built
    assert again.digest == both[0].digest
    assert not list(tmp_path.rglob("*.spool"))
