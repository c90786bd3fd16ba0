"""Calibration statistics from the cache: the same to the bit, and gathered anew for whatever would change them."""

from __future__ import annotations

import errno

import pytest
import torch
from conftest import tiny_llama
from processes import recorded, start_ranks, together
from test_sharded import sharded

import rotpruner.kept_statistics as kept_module
from rotpruner.errors import InputError
from rotpruner.patterns import parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotations import LearnedRotations


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path))
    return tmp_path / "statistics"


@pytest.fixture
def ids():
    return torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(1))


def calibrated(
    ids, keep=True, model=None, pruner="wanda", pattern="2:4", spaces=("residual", "value_heads"), **settings
):
    """A model after `calibrate`, and the number of batches that it has run for that."""
    ran = []

    def progress(batches):
        for batch in batches:
            ran.append(batch)
            yield batch

    base = tiny_llama() if model is None else model
    rotations = LearnedRotations(base.config, spaces)
    rotated = RotatedModel(base, rotations, resolve_pruner(pruner), parse_pattern(pattern), **settings)
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
    assert not cache.exists(), "nothing is kept unasked"
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
    (path,) = cache.glob("*.safetensors")
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


def test_a_full_disk_costs_the_file_only(ids, cache, monkeypatch, caplog):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept_module, "save_file", full)
    rotated, _ = calibrated(ids)
    assert rotated.moments
    assert "No space left on device" in caplog.text
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(ids, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("rotpruner.rotated_model.gather_moments", lambda *given: pytest.fail("gathered"))
    with pytest.raises(InputError, match="ROTPRUNER_CACHE"):
        calibrated(ids)


@pytest.mark.parametrize("shards", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_find_what_two_ranks_have_gathered(shards, parallel_config, tmp_path, cache):
    config, keep = sharded(parallel_config, False) if shards else parallel_config, ["--model.keep_statistics", "true"]
    runs = [tmp_path / name for name in ("plain", "gathered", "found")]
    for run, choice in zip(runs, ([], keep, keep), strict=True):
        assert start_ranks([*together(config, run), *choice], exact=True) == [0, 0]
    assert len(list(cache.glob("*.safetensors"))) == 1
    for rank in (0, 1):
        expected = recorded(runs[0], rank)
        for run in runs[1:]:
            found = recorded(run, rank)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
