"""Calibration batches: a pure function of the seed and of how many came before, resumable anywhere."""

import json
from pathlib import Path

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.calibration import CalibrationDataModule
from datamodules.tokens import calibration_tokens
from rotpruner.batches import CalibrationBatches
from rotpruner.errors import InputError


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
def test_a_data_module_goes_on_whenever_its_checkpoint_is_read(made_before, text_file, model_directory):
    """Strategies that shard read it after the batches are made, if the schedule has asked for their number."""

    def module():
        return CalibrationDataModule(str(text_file), 6, 8, 2, model=str(model_directory))

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


def test_a_data_module_that_is_asked_again_goes_on_and_begins_anew_with_a_fit(text_file, model_directory):
    module = CalibrationDataModule(str(text_file), 6, 8, 2, model=str(model_directory))
    first = indices(module.train_dataloader())
    again = indices(module.train_dataloader())
    assert again != first
    assert module.sequences_learned == 12
    module.setup()
    assert indices(module.train_dataloader()) == first


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
    saved = make(4, 2).state_dict()
    another = make(4, 2)
    another.tokens = another.tokens + 1
    with pytest.raises(InputError, match="the calibration text has changed"):
        another.load_state_dict(saved)
    another.load_state_dict({name: value for name, value in saved.items() if name != "tokens"})


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
def test_a_fit_resumed_at_any_step_sees_the_same_batches(text_file, model_directory, tmp_path, options):
    def data() -> CalibrationDataModule:
        return CalibrationDataModule(str(text_file), 7, 8, 2, model=str(model_directory))

    keep = {"save_top_k": -1, "dirpath": tmp_path / "steps"}
    every = ModelCheckpoint(every_n_train_steps=1, filename="{step}", **keep)
    ends = ModelCheckpoint(save_on_train_epoch_end=True, filename="end-{step}", **keep)
    whole = fit(data(), callbacks=[every, ends], **options)
    checkpoints = sorted((tmp_path / "steps").iterdir())
    assert len(checkpoints) >= 10
    for path in checkpoints:
        step = int(path.stem.split("step=")[1])
        assert fit(data(), path, enable_checkpointing=False, **options) == whole[step:], path.stem


def test_the_data_module_serves_the_cached_tokens(text_file, model_directory, tokenizer):
    data = CalibrationDataModule(str(text_file), num_sequences=4, seq_len=8, model=str(model_directory))
    data.prepare_data()
    data.setup("fit")
    sizes = dict(num_sequences=4, seq_len=8, seed=0, tokenizer_name=str(model_directory))
    assert torch.equal(data.tokens, calibration_tokens(str(text_file), tokenizer, **sizes))
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
def test_arguments_are_checked_before_any_work(argument, value, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=message):
        CalibrationDataModule(**{argument: value})
    assert not (tmp_path / "cache").exists()


def test_statistics_may_take_fewer_sequences(text_file, model_directory):
    settings = dict(calibration=str(text_file), num_sequences=6, seq_len=16, model=str(model_directory))
    data = CalibrationDataModule(**settings, statistics_sequences=2)
    assert torch.equal(data.statistics_tokens, data.tokens[:2])
    assert torch.equal(CalibrationDataModule(**settings).statistics_tokens, data.tokens)
    for count in (0, 7):
        with pytest.raises(InputError, match=f"statistics_sequences {count} is not between 1 and num_sequences 6"):
            CalibrationDataModule(**settings, statistics_sequences=count)
