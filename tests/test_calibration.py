"""Calibration tokens and batches: exact, cached once, resumable anywhere."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules import texts
from datamodules import tokens as tokens_module
from datamodules.calibration import CalibrationBatches, CalibrationDataModule
from datamodules.tokens import calibration_tokens
from rotpruner.errors import InputError

TEXT = "\n\n".join(f"Paragraph {i} tells of the {i * i} ways home.\nIt ends well, they say: 第{i}." for i in range(60))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 entries, cut into words like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


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
    assert len(list(cache.glob("*.safetensors"))) == 1
    tokens_of(text, seed=1)
    tokens_of(text, seq_len=8)
    Path(text).write_text(TEXT[50:])
    assert not torch.equal(tokens_of(text), all_windows(TEXT, 16)[:8])
    assert len(list(cache.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_a_damaged_cache_file_is_rebuilt(text, cache, damage):
    tokens = tokens_of(text)
    (path,) = cache.glob("*.safetensors")
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
    module.os.replace = lambda *_: os._exit(9)
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
    assert not list(cache.glob("*.safetensors"))
    for process in others:
        process.stdin.write("go\n")
        process.stdin.flush()
    out = "".join(process.communicate()[0] for process in others).split()
    assert out.count("built") == 1
    assert out.count(str(tokens_of(text).sum().item())) == 2
    assert [path.suffix for path in sorted(cache.iterdir())] == [".safetensors", ".lock"]


# Batches


@st.composite
def batch_settings(draw):
    batch_size, world_size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = draw(st.integers(batch_size * world_size, 20))
    return {
        "rows": rows,
        "batch_size": batch_size,
        "world_size": world_size,
        "seed": draw(st.integers(0, 99)),
    }


def make(rows: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> CalibrationBatches:
    return CalibrationBatches(torch.arange(rows * 3).view(rows, 3), batch_size, seed, rank, world_size)


def indices(batches: CalibrationBatches) -> list[list[int]]:
    """The rows of one iteration's batches, which must be what `input_ids` holds."""
    found = list(batches)
    assert all(torch.equal(batch["input_ids"], batches.tokens[batch["index"]]) for batch in found)
    return [batch["index"].tolist() for batch in found]


@given(batch_settings())
def test_an_epoch_visits_every_sequence_once_over_the_ranks(setting):
    ranks = [make(rank=rank, **setting) for rank in range(setting["world_size"])]
    for _ in range(3):
        shares = [indices(batches) for batches in ranks]
        assert all(len(batch) == setting["batch_size"] for share in shares for batch in share)
        seen = [row for share in shares for batch in share for row in batch]
        assert len(seen) == len(set(seen))
        left_out = setting["rows"] % (setting["batch_size"] * setting["world_size"])
        assert len(seen) == setting["rows"] - left_out
        single = make(setting["rows"], setting["batch_size"] * setting["world_size"], setting["seed"])
        single.load_state_dict({**ranks[0].state_dict(), "position": ranks[0].position - len(single)})
        for whole, *parts in zip(indices(single), *shares, strict=True):
            assert sorted(whole) == sorted(row for part in parts for row in part)


@given(batch_settings(), st.integers(0, 60), st.data())
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(setting, stop, data):
    whole, first, second = make(**setting), make(**setting), make(**setting)
    wanted = [row for _ in range(80) for row in indices(whole)][: stop + 2 * len(whole)]
    seen = []
    while len(seen) < stop:  # epochs broken off anywhere
        for _, batch in zip(range(data.draw(st.integers(1, stop - len(seen)))), first, strict=False):
            seen.append(batch["index"].tolist())
    assert seen == wanted[:stop]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    iter(second)  # as Lightning's checks do
    assert indices(second) + indices(second) == wanted[stop:]


@pytest.mark.parametrize("made_before", [False, True])
def test_a_data_module_goes_on_whenever_its_checkpoint_is_read(made_before, text, model):
    """Strategies that shard read it after the batches are made, if the schedule has asked for their number."""

    def module():
        return CalibrationDataModule(text, num_sequences=6, seq_len=8, batch_size=2, model=model)

    first, second = module(), module()
    handed_out = iter(first.train_dataloader())
    for _ in range(2):
        next(handed_out)
    state = json.loads(json.dumps(first.state_dict()))
    if made_before:
        second.train_dataloader()
    second.load_state_dict(state)
    loader = second._batches if made_before else second.train_dataloader()
    assert second.sequences_learned == 4
    assert torch.equal(next(iter(loader))["index"], next(handed_out)["index"])


def test_epochs_and_seeds_differ():
    batches = make(16, 4)
    epochs = [indices(batches) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != indices(make(16, 4, seed=1))
    torch.manual_seed(7)
    assert epochs[0] == indices(make(16, 4))


def test_batches_refuse_what_cannot_be():
    with pytest.raises(InputError, match="batch_size 5 is more than 4 sequences"):
        make(4, 5)
    with pytest.raises(InputError, match="batch_size 2 on each of 3 ranks is more than 4"):
        make(4, 2, world_size=3)
    with pytest.raises(InputError, match="have sequences 4, not 5: resume"):
        make(5, 2).load_state_dict(make(4, 2).state_dict())


# The data module under a real Trainer


class Recorder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: CalibrationDataModule, ckpt_path: Path | None = None, **options) -> list[list[int]]:
    module = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=1, **quiet, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{"max_steps": 8}, {"max_epochs": 3}, {"max_steps": 8, "limit_train_batches": 2}],
    ids=["steps", "epochs", "limited"],
)
def test_a_fit_resumed_at_any_step_sees_the_same_batches(text, model, tmp_path, options):
    def data() -> CalibrationDataModule:
        return CalibrationDataModule(text, num_sequences=7, seq_len=8, batch_size=2, model=model)

    keep = {"save_top_k": -1, "dirpath": tmp_path / "steps"}
    every = ModelCheckpoint(every_n_train_steps=1, filename="{step}", **keep)
    ends = ModelCheckpoint(save_on_train_epoch_end=True, filename="end-{step}", **keep)
    whole = fit(data(), callbacks=[every, ends], **options)
    checkpoints = sorted((tmp_path / "steps").iterdir())
    assert len(checkpoints) >= 10
    for path in checkpoints:
        step = int(path.stem.split("step=")[1])
        assert fit(data(), path, enable_checkpointing=False, **options) == whole[step:], path.stem


def test_the_data_module_serves_the_cached_tokens(text, model):
    data = CalibrationDataModule(text, num_sequences=4, seq_len=8, model=model)
    data.prepare_data()
    data.setup("fit")
    assert torch.equal(data.tokens, tokens_of(text, 4, 8))
    assert len(data.train_dataloader()) == 4


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_sequences", 0, "num_sequences 0 is too small: pass 1 or more"),
        ("num_sequences", -3, "num_sequences -3"),
        ("seq_len", 0, "seq_len 0 is too small: pass 2 or more"),
        ("seq_len", 1, "seq_len 1"),
        ("seed", -1, "seed -1 is too small"),
        ("batch_size", 0, "batch_size 0 is too small"),
        ("batch_size", 200, "batch_size 200 is more than 128 sequences"),
        ("calibration", "nowhere.txt", "no text 'nowhere.txt'"),
    ],
)
def test_arguments_are_checked_before_any_work(cache, argument, value, message):
    with pytest.raises(InputError, match=message):
        CalibrationDataModule(**{argument: value})
    assert not cache.exists()


def test_statistics_may_take_fewer_sequences(text_file, model_directory):
    settings = dict(calibration=str(text_file), num_sequences=6, seq_len=16, model=str(model_directory))
    data = CalibrationDataModule(**settings, statistics_sequences=2)
    assert torch.equal(data.statistics_tokens, data.tokens[:2])
    assert torch.equal(CalibrationDataModule(**settings).statistics_tokens, data.tokens)
    for count in (0, 7):
        with pytest.raises(InputError, match=f"statistics_sequences {count} is not between 1 and num_sequences 6"):
            CalibrationDataModule(**settings, statistics_sequences=count)
