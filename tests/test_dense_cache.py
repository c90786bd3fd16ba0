"""Statistics and final states from the cache: the same to the bit, computed anew for whatever would change them."""

from __future__ import annotations

import copy
import errno

import pytest
import torch
from conftest import tiny_llama
from processes import recorded, start_ranks, together
from test_sharded import sharded
from tiny_models import rotated_model

from rotpruner.errors import InputError
from rotpruner.oneshot import prune_model
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotations import random_rotations


def calibrated(ids, keep=True, model=None, **settings):
    """A model after `calibrate`, and the number of batches that it has run for that."""
    ran = []

    def progress(batches, _):
        for batch in batches:
            ran.append(batch)
            yield batch

    rotated = rotated_model(tiny_llama() if model is None else model, **settings)
    rotated.calibrate(ids.split(1), progress, keep)
    return rotated, len(ran)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(pruner="sparsegpt"),
        dict(pattern="0.5", layer_sparsity="owl"),
        dict(pattern="slice:0.25", spaces=("residual",)),
    ],
    ids=["wanda", "sparsegpt", "owl", "slice"],
)
def test_a_second_run_finds_them_to_the_bit(settings, ids, cache):
    expected, _ = calibrated(ids, keep=False, **settings)
    assert not (cache / "statistics").exists(), "nothing is kept unasked"
    for batches in (3, 0):
        found, ran = calibrated(ids, **settings)
        assert ran == batches
        assert list(found.moments) == list(expected.moments)
        for name, moment in expected.moments.items():
            assert torch.equal(found.moments[name].blocks, moment.blocks), name
        assert found.patterns == expected.patterns


def test_whatever_changes_them_is_gathered_anew(ids, cache):
    calibrated(ids)
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    for what, settings in {
        "one weight": dict(model=changed),
        "another dtype": dict(model=tiny_llama().double()),
        "the same weights, another config": dict(model=tiny_llama(rms_norm_eps=1e-2)),
        "other blocks": dict(spaces=("residual",)),
        "whole moments": dict(pruner="sparsegpt"),
    }.items():
        assert calibrated(ids, **settings)[1] == 3, what
    assert calibrated(ids.flip(1))[1] == 3, "other tokens"
    assert calibrated(ids.view(6, 12))[1] == 6, "shorter sequences"
    assert calibrated(ids, pattern="0.7")[1] == 0, "what is pruned afterwards does not matter"
    offloaded = dict(offload=True, gradient_checkpointing=True)
    assert calibrated(ids, **offloaded)[1] == 0, "nor where the weights lie"
    assert calibrated(ids, pruner="magnitude")[1] == 0, "a pruner that needs none"


def test_what_is_damaged_is_gathered_again(ids, cache):
    expected, _ = calibrated(ids)
    (path,) = (cache / "statistics").glob("*.safetensors")
    sound = path.read_bytes()
    flipped = bytearray(sound)
    flipped[-3] ^= 1
    for content in (b"", sound[:-7], bytes(flipped)):
        path.write_bytes(content)
        found, ran = calibrated(ids)
        assert ran == 3
        assert torch.equal(
            found.moments["model.layers.1.mlp.down_proj"].blocks,
            expected.moments["model.layers.1.mlp.down_proj"].blocks,
        )
        assert path.read_bytes() == sound


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_file_only(ids, cache, monkeypatch, caplog):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        full_disk()

    monkeypatch.setattr("rotpruner.cache.save_file", full)
    rotated, _ = calibrated(ids)
    assert rotated.moments
    assert "No space left on device" in caplog.text
    assert not [path for path in (cache / "statistics").iterdir() if path.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(ids, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("rotpruner.rotated_model.gather_moments", lambda *given: pytest.fail("gathered"))
    with pytest.raises(InputError, match="ROTPRUNER_CACHE"):
        calibrated(ids)


def test_a_cache_that_can_no_longer_be_written_costs_the_states_only(ids, cache, monkeypatch, caplog):
    rotated, _ = calibrated(ids)

    def refuse(path):
        raise InputError("the cache cannot be written to")

    monkeypatch.setattr("rotpruner.dense_cache.locked", refuse)
    loss, ran = learned(rotated, ids, [0, 1, 2])
    assert loss.isfinite()
    assert ran == 3
    assert caplog.text.count("cannot be written") == 2, "the warning, and its reason, once"


def learned(rotated, ids, index) -> tuple[torch.Tensor, int]:
    """The loss of a batch, and how many sequences the dense model has run for it."""
    run, ran = rotated._dense_states._run, []
    rotated._dense_states._run = lambda ids: ran.append(ids) or run(ids)
    rotated.refresh_masks()
    loss = rotated.loss(ids, torch.tensor(index))["loss"]
    rotated._dense_states._run = run
    return loss, len(ran)


def test_states_are_computed_once_a_row(ids):
    rotated, _ = calibrated(ids, keep=False)
    first, ran = learned(rotated, ids, [5, 2, 7])
    assert ran == 3
    again, ran = learned(rotated, ids, [5, 2, 7])
    assert ran == 0
    assert torch.equal(again, first)
    kept = rotated._dense_states(ids.flip(0), torch.tensor([7, 2, 5]))
    assert torch.equal(kept.flip(0), rotated._dense_states(ids, torch.tensor([5, 2, 7])))
    assert learned(rotated, ids, [5, 3, 7])[1] == 1


def test_rows_of_another_text_are_computed_anew(ids):
    rotated, _ = calibrated(ids, keep=False)
    learned(rotated, ids, [0, 1, 2])
    loss, ran = learned(rotated, ids.flip(1), [0, 1, 2])
    assert ran == 3
    assert torch.equal(loss, learned(calibrated(ids, keep=False)[0], ids.flip(1), [0, 1, 2])[0])


def test_a_teacher_beside_the_model_does_not_leave_its_states_under_the_models_name(ids, cache):
    """They differ in their last bits: the norms of one are fused."""
    model = tiny_llama().to(torch.bfloat16)
    given = random_rotations(model.config, ["residual", "value_heads"], 0)
    pruned = copy.deepcopy(model)
    prune_model(pruned, resolve_pruner("magnitude"), parse_pattern("2:4"), rotations=given)

    def went_on():
        rotated, _ = calibrated(ids, model=copy.deepcopy(model))
        rotated.rotations.restart(given)
        rotated.take_over(copy.deepcopy(model), pruned, given, keep=True)
        return rotated

    first, ran = learned(went_on(), ids, [0, 1, 2])
    assert ran == 3
    again, ran = learned(went_on(), ids, [0, 1, 2])
    assert ran == 0
    assert torch.equal(first, again)
    assert learned(calibrated(ids, model=copy.deepcopy(model))[0], ids, [0, 1, 2])[1] == 3
    assert len(list((cache / "states").glob("*.safetensors"))) == 6


def test_final_states_come_from_the_cache_to_the_bit(ids, cache):
    for pruner in ("wanda", "magnitude"):  # which needs no statistics
        expected = learned(calibrated(ids, keep=False, pruner=pruner)[0], ids, [0, 1, 2])
        assert expected[1] == 3
        assert torch.equal(learned(calibrated(ids, pruner=pruner)[0], ids, [0, 1, 2])[0], expected[0])
        again, ran = learned(calibrated(ids, pruner=pruner)[0], ids.roll(1, 0), [7, 8, 9])
        assert ran == 0, "found by tokens, whatever their number"
        torch.testing.assert_close(again, expected[0])
    assert len(list((cache / "states").glob("*.safetensors"))) == 3


def test_final_states_are_those_of_the_weights_the_tokens_and_the_dtype(ids, cache):
    learned(calibrated(ids)[0], ids, [0, 1, 2])
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    assert learned(calibrated(ids, model=changed)[0], ids, [0, 1, 2])[1] == 3
    rotated, _ = calibrated(ids)
    assert learned(rotated, ids[:, 1:], [0, 1, 2])[1] == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert learned(calibrated(ids)[0], ids, [0, 1, 2])[1] == 3
    other = ids.clone()
    other[1, 5] += 1
    assert learned(calibrated(ids)[0], other, [0, 1, 2])[1] == 1


def test_damaged_states_are_computed_again(ids, cache):
    expected, _ = learned(calibrated(ids)[0], ids, [0, 1, 2])
    for path, content in zip(sorted((cache / "states").glob("*.safetensors")), (b"", b"\0" * 99), strict=False):
        path.write_bytes(content)
    found, ran = learned(calibrated(ids)[0], ids, [0, 1, 2])
    assert ran == 2
    assert torch.equal(found, expected)
    assert learned(calibrated(ids)[0], ids, [0, 1, 2])[1] == 0


def test_a_disk_that_fills_up_is_told_once(ids, cache, monkeypatch, caplog):
    rotated, _ = calibrated(ids)
    monkeypatch.setattr("rotpruner.cache.save_file", lambda *given, **named: full_disk())
    assert learned(rotated, ids, [0, 1, 2])[1] == 3
    assert caplog.text.count("No space left on device") == 1
    assert learned(rotated, ids, [0, 1, 2])[1] == 0, "kept in memory all the same"


@pytest.mark.parametrize("shards", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_find_what_two_ranks_have_gathered(shards, parallel_config, tmp_path, cache):
    config, keep = sharded(parallel_config, False) if shards else parallel_config, ["--model.cache_dense", "true"]
    runs = [tmp_path / name for name in ("plain", "gathered", "found")]
    for run, choice in zip(runs, ([], keep, keep), strict=True):
        assert start_ranks([*together(config, run), *choice], exact=True) == [0, 0]
    assert len(list((cache / "statistics").glob("*.safetensors"))) == 1
    for rank in (0, 1):
        expected = recorded(runs[0], rank)
        for run in runs[1:]:
            found = recorded(run, rank)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
