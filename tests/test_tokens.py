"""Calibration tokens: exact, and cached once."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_bpe

from datamodules import texts
from datamodules import tokens as tokens_module
from datamodules.tokens import calibration_tokens
from rotpruner.errors import InputError

TEXT = "\n\n".join(f"Paragraph {i} tells of the {i * i} ways home.\nIt ends well, they say: 第{i}." for i in range(60))


TOKENIZER = byte_bpe(TEXT, 400)
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(tmp_path / "model")


def tokens_of(source: str, num_sequences: int = 8, seq_len: int = 16, seed: int = 0) -> torch.Tensor:
    sizes = {"num_sequences": num_sequences, "seq_len": seq_len, "seed": seed}
    return calibration_tokens(source, TOKENIZER, **sizes, tokenizer_name="tiny")


def all_windows(text: str, seq_len: int) -> torch.Tensor:
    ids = torch.tensor(TOKENIZER(text, add_special_tokens=False).input_ids)
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


# Tokens


@given(st.lists(st.text("ab é第1.\n", max_size=40), max_size=8), st.integers(1, 30))
def test_pieces_have_the_tokens_of_the_joined_text(parts, limit):
    joined = "".join(parts)
    cut = list(texts.pieces(parts, limit))
    assert "".join(cut) == joined
    ids = [id for piece in cut for id in TOKENIZER(piece, add_special_tokens=False).input_ids]
    assert ids == TOKENIZER(joined, add_special_tokens=False).input_ids


def test_pieces_are_bounded():
    cut = list(texts.pieces([TEXT] * 20, 1000))
    assert len(cut) > 20
    assert max(map(len, cut)) < 1100


def test_windows_are_a_seeded_choice_without_overlap(text):
    windows = all_windows(TEXT, 16)
    everything = tokens_of(text, num_sequences=len(windows))
    assert everything.dtype == torch.int64
    assert sorted(everything.tolist()) == sorted(windows.tolist())
    assert not torch.equal(everything, windows)
    chosen = tokens_of(text)
    assert torch.equal(chosen, everything[:8])
    assert not torch.equal(chosen, tokens_of(text, seed=1))


def test_documents_of_json_lines_are_one_text(tmp_path, text):
    lines = "".join(json.dumps({"text": part}) + "\n" for part in TEXT.split("\n\n"))
    (tmp_path / "text.jsonl").write_text(lines)
    assert torch.equal(tokens_of(str(tmp_path / "text.jsonl")), tokens_of(text))


def test_a_stream_is_read_no_further_than_needed(tmp_path, monkeypatch):
    root = tmp_path / "stream"
    root.mkdir()
    rows = [json.dumps({"text": f"{i} {TEXT[:300]}"}) for i in range(200)]
    (root / "train.jsonl").write_text("\n".join(rows))
    monkeypatch.setitem(texts.HUB, "c4", replace(texts.HUB["c4"], path=str(root), config=None))
    monkeypatch.setattr(texts.pieces, "__defaults__", (1000,))
    given_out = []
    read = texts.stream
    monkeypatch.setattr(tokens_module, "stream", lambda *a, **k: (given_out.append(d) or d for d in read(*a, **k)))
    tokens = tokens_of("c4", num_sequences=4)
    assert torch.equal(tokens, all_windows("".join(given_out), 16)[:4])
    assert len(given_out) < 40
    assert not torch.equal(tokens, tokens_of("c4", num_sequences=4, seed=1))


def test_too_short_a_text_is_refused(text):
    count = len(all_windows(TEXT, 100))
    with pytest.raises(InputError, match=f"holds {count} windows of 100 tokens, 900 are wanted: pass a longer"):
        tokens_of(text, num_sequences=900, seq_len=100)


# Cache


def test_the_cache_is_keyed_by_what_determines_the_tokens(text, cache):
    tokens_of(text)
    tokens_of(text)
    assert len(list((cache / "calibration").glob("*.safetensors"))) == 1
    tokens_of(text, seed=1)
    tokens_of(text, seq_len=8)
    Path(text).write_text(TEXT[50:])
    assert not torch.equal(tokens_of(text), all_windows(TEXT, 16)[:8])
    assert len(list((cache / "calibration").glob("*.safetensors"))) == 4


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_a_damaged_cache_file_is_rebuilt(text, cache, damage):
    tokens = tokens_of(text)
    (path,) = (cache / "calibration").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-8] ^= 1
    path.write_bytes({"truncate": data[:-9], "flip": data, "empty": b"", "other": b"not safetensors"}[damage])
    assert torch.equal(tokens_of(text), tokens)
    assert tokens_module._load(path, (8, 16), 400) is not None


SCRIPT = """
import os, sys
from datamodules import tokens as module
from rotpruner.loading import load_tokenizer
source, model, killed = sys.argv[1:]
build = module._windows
module._windows = lambda *args: print("built", flush=True) or build(*args)
if killed == "killed":
    os.replace = lambda *_: os._exit(9)
tokenizer = load_tokenizer(model)
print("ready", flush=True)
sys.stdin.readline()
tokens = module.calibration_tokens(
    source, tokenizer, num_sequences=8, seq_len=16, seed=0, tokenizer_name=model
)
print(tokens.sum().item())
"""


def test_processes_at_once_build_once_and_a_killed_one_leaves_nothing_broken(text, model, cache):
    def start(*how: str) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, text, model, *how]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    killed, *others = processes = [start("killed"), start("lives"), start("lives")]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    assert killed.communicate("go\n")[0] == "built\n"
    assert killed.returncode == 9
    assert not list((cache / "calibration").glob("*.safetensors"))
    for process in others:
        process.stdin.write("go\n")
        process.stdin.flush()
    out = "".join(process.communicate()[0] for process in others).split()
    assert out.count("built") == 1
    assert out.count(str(tokens_of(text).sum().item())) == 2
    assert [path.suffix for path in sorted((cache / "calibration").iterdir())] == [".safetensors", ".lock"]
