"""Removing residual directions: the sliced model is the projected one, and an ordinary checkpoint."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import exact, rotated_model, tiny
from transformers import AutoModelForCausalLM

from experiments.__main__ import main
from rotpruner.errors import InputError
from rotpruner.fusion import fuse_block_norms, fuse_norms
from rotpruner.measures import parameter_count
from rotpruner.oneshot import prune_model
from rotpruner.patterns import Slice, parse_pattern
from rotpruner.pruners import resolve_pruner
from rotpruner.replay import moments_by_block
from rotpruner.rotations import merge_rotations, random_rotations
from rotpruner.slicegpt import slice_per_block
from rotpruner.slicing import principal_directions, residual_pca, residual_readers, slice_residual, sliced_width

SLICEABLE = ("llama-2", "llama-3", "smollm2", "smollm3", "mistral", "qwen2", "qwen3")
MAGNITUDE = resolve_pruner("magnitude")


def batches(count: int = 4) -> list[torch.Tensor]:
    return list(torch.randint(0, 64, (count, 1, 16), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", SLICEABLE)
@torch.no_grad()
def test_sliced_model_computes_what_the_masked_one_learned(name):
    """The narrow model equals the full-width one that runs with zeros in the removed directions."""
    model = tiny(name).double()
    pattern = Slice(0.3)
    masked = rotated_model(exact(copy.deepcopy(model)), ["residual"], pruner="magnitude", pattern="slice:0.3")
    masked.rotations.restart(random_rotations(model.config, ["residual"], 0, torch.float64))
    expected = masked(batches()[0]).logits
    prune_model(model, MAGNITUDE, pattern, rotations=masked.rotations())
    assert model.config.hidden_size == sliced_width(tiny(name).config, pattern) == 16
    assert (exact(model)(input_ids=batches()[0]).logits - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", SLICEABLE)
@torch.no_grad()
def test_export_is_an_ordinary_checkpoint(name, tmp_path):
    # So that an ε of the wide model would be seen; Qwen3's is that of the norms in its heads, too, which stay as wide.
    model = tiny(name, **({} if name == "qwen3" else {"rms_norm_eps": 1e-2}))
    before, kind = parameter_count(model), type(model)
    prune_model(model, MAGNITUDE, Slice(0.3), batches())
    model.save_pretrained(tmp_path / "sliced")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced").eval()
    assert type(again) is kind
    assert parameter_count(again) == parameter_count(model) < before * 24 / 16
    assert again.config.hidden_size == 16
    ids = batches()[0]
    assert (again(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_pca_keeps_what_a_low_rank_stream_holds():
    """If the stream lives in k directions, cutting the others changes nothing."""
    model = exact(tiny("llama-2"))
    basis = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q[:, :16]
    fuse_norms(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.copy_(basis @ basis.T @ parameter)
        if name.endswith("embed_tokens.weight"):
            parameter.copy_(parameter @ basis @ basis.T)
    ids = batches()[0]
    expected = model(input_ids=ids).logits
    per_block = copy.deepcopy(model)
    slice_per_block(per_block, 16, batches())
    assert (per_block(input_ids=ids).logits - expected).abs().max() < 1e-4
    masked = rotated_model(model, ["residual"], pruner="magnitude", pattern="slice:0.3", start="pca")
    masked.calibrate(batches())
    masked.start_from_statistics("pca")
    assert (masked(ids).logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_directions_are_those_of_all_readers_together():
    model = exact(tiny("llama-2"))
    fuse_block_norms(model)
    moments = moments_by_block(model, *residual_readers(model), batches())

    def lost(Q):
        return sum((Q.mT @ moment.full() @ Q).diagonal()[16:].sum() for moment in moments.values())

    shared = lost(residual_pca(model.config, moments)[0, 0].double())
    assert all(shared < lost(principal_directions(moment.full()).double()) for moment in moments.values())
    # One basis in front of every sublayer; the end of the stream, which none reads, has that of the last.
    own = [principal_directions(moment.full().double()) for moment in moments.values()]
    assert len(own) == 4
    torch.testing.assert_close(residual_pca(model.config, moments, 5)[:, 0], torch.stack([*own, own[-1]]))


@torch.no_grad()
def test_per_block_pca_narrows_every_stream_and_counts_its_shortcuts():
    model = tiny("llama-2").double()
    shared, per_block = copy.deepcopy(model), copy.deepcopy(model)
    prune_model(shared, MAGNITUDE, Slice(0.3), batches())
    shortcuts = 2 * 2 * 16**2
    assert slice_per_block(per_block, 16, batches()) == (parameter_count(shared) + shortcuts, 2 * shortcuts)
    streams = []
    for name, module in per_block.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda module, args, output: streams.append(output[0]))
    per_block(input_ids=torch.cat(batches(4), 1)[:, :32])
    ranks = [int(torch.linalg.matrix_rank(stream, rtol=1e-4)) for stream in streams]
    assert len(ranks) == 5
    assert all(rank <= 16 for rank in ranks)


@torch.no_grad()
def test_a_slice_takes_nothing_that_is_of_masks():
    for more in ({"update": resolve_pruner("sparsegpt")}, {"masks": {}}, {"patterns": {"a": parse_pattern("2:4")}}):
        with pytest.raises(InputError, match="leave out update, masks and patterns"):
            prune_model(tiny("llama-2"), resolve_pruner("wanda"), parse_pattern("slice:0.25"), batches(), **more)


def test_per_block_pca_runs_in_16_bits():
    model = tiny("llama-2").bfloat16()
    slice_per_block(model, 16, batches())
    logits = model(input_ids=batches()[0]).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_principal_directions_are_ordered_and_orthogonal():
    x = torch.randn(200, 8, dtype=torch.float64) * torch.arange(1, 9)
    H = x.T @ x
    Q = principal_directions(H).double()
    variances = (Q.T @ H @ Q).diagonal()
    assert (variances.diff() <= 0).all()
    assert (Q.T @ Q - torch.eye(8)).abs().max() < 1e-6
    with pytest.raises(InputError, match="not finite"):
        principal_directions(H * float("nan"))


def test_moments_are_of_the_normed_stream():
    model = exact(tiny("smollm2"))
    fuse_block_norms(model)
    moments = moments_by_block(model, *residual_readers(model), batches())
    assert len(moments) == 4
    for moment in moments.values():
        assert moment.full().shape == (24, 24)
        assert 0.9 < moment.diagonal().mean().item() < 1  # ε takes the rest


@pytest.mark.parametrize(
    ("name", "reason"), [("opt", "all-ones"), ("gemma", "root of hidden_size"), ("gemma-2", "norms stand between")]
)
def test_families_without_a_narrower_class_say_why(name, reason):
    with pytest.raises(InputError, match=reason):
        sliced_width(tiny(name).config, Slice(0.3))


@pytest.mark.parametrize("text", ["slice:0", "slice:1", "slice:1.5", "slice:x"])
def test_bad_slices_are_refused(text):
    with pytest.raises(InputError, match=r"slice:0\.3"):
        parse_pattern(text)


def test_a_slice_that_leaves_or_removes_nothing_is_refused():
    for fraction in (0.01, 0.99):
        with pytest.raises(InputError, match="another fraction"):
            sliced_width(tiny("llama-2").config, Slice(fraction))


def test_prune_exports_narrower_models_but_per_block(model_directory, text_file, test_text_file, tmp_path, capsys):
    arguments = f"prune --model {model_directory} --pattern slice:0.3 --calibration {text_file} --json "
    arguments += f"--num_sequences 4 --seq_len 32 --text {test_text_file} --max_tokens 256"
    assert main([*arguments.split(), "--output", str(tmp_path / "sliced")]) == 0
    shared = json.loads(capsys.readouterr().out)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sliced").config.hidden_size == shared["hidden_size"]
    assert main([*arguments.split(), "--placement", "per_block"]) == 0
    per_block = json.loads(capsys.readouterr().out)
    assert per_block["parameters"] > shared["parameters"]
    assert per_block["online_flops"] > shared.get("online_flops", 0) == 0
    for wrong, reason in ((["--pruner", "wanda"], "leave --pruner"), (["--placement", "per_block"], "no plain")):
        assert main([*arguments.split(), "--output", str(tmp_path / "no"), *wrong]) == 2
        assert reason in capsys.readouterr().err


def test_fit_learns_a_slice(model_directory, text_file, test_text_file, tmp_path):
    run = tmp_path / "run"
    arguments = [
        *("-c", "experiments/configs/smollm2-135m-slice.yaml"),
        *("--model.model", str(model_directory), "--model.base_dtype", "float32"),
        *("--data.calibration", str(text_file), "--data.num_sequences", "4", "--data.seq_len", "32"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--trainer.default_root_dir", str(run)),
        *("--trainer.callbacks.init_args.texts", f"[{test_text_file}]"),
        *("--trainer.callbacks.init_args.seq_len", "32", "--trainer.callbacks.init_args.max_tokens", "256"),
    ]
    assert main(["fit", *arguments]) == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "pca", "random_rotation", "rotpruner"]
    assert rows[1]["parameters"] == rows[3]["parameters"]
    export = AutoModelForCausalLM.from_pretrained(run / "export")
    assert parameter_count(export) == rows[3]["parameters"] < rows[0]["parameters"] * 1.5
    assert export.config.hidden_size < AutoModelForCausalLM.from_pretrained(model_directory).config.hidden_size


def test_fit_refuses_a_slice_of_other_spaces(model_directory):
    from lightning_modules.rotation_module import RotationModule

    with pytest.raises(InputError, match=r"set \[residual\]"):
        RotationModule(str(model_directory), pattern="slice:0.3")


def test_merge_then_slice_equals_prune_model():
    one, two = tiny("mistral"), tiny("mistral")
    drawn = random_rotations(one.config, ["residual"], 3)
    prune_model(one, MAGNITUDE, Slice(0.3), rotations=drawn)
    merge_rotations(two, drawn)
    slice_residual(two, 16)
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(first, second)
