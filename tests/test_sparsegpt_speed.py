"""One pass over the columns for linears that share a Hessian, against the paper's algorithm one linear at a time."""

from __future__ import annotations

import os
import time
from itertools import groupby

import pytest
import torch
from torch import Tensor

from datamodules.texts import text_of
from rotpruner.calibration import gather_model_moments
from rotpruner.layout import block_linears, module_at
from rotpruner.loading import load_model, load_tokenizer
from rotpruner.patterns import NM, Pattern, Unstructured
from rotpruner.perplexity import windows
from rotpruner.pruners.sparsegpt import SparseGPT

pytestmark = pytest.mark.slow

#: The whole model with ROTPRUNER_WHOLE_MODEL=1, a tenth of it otherwise.
LAYERS = range(30) if os.environ.get("ROTPRUNER_WHOLE_MODEL") else (0, 15, 29)


def blocked(W: Tensor, H: Tensor, pattern: Pattern, size: int = 128) -> Tensor:
    """Algorithm 1 of the paper with lazy batches of `size` columns: inverse Hessian by Cholesky, columns in a loop."""
    W, width = W.clone(), W.shape[1]
    H = H + 0.01 * H.diagonal().mean() * torch.eye(width, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, width, size):
        stop = min(start + size, width)
        block, factor = W[:, start:stop], U[start:stop, start:stop]
        errors = torch.zeros_like(block)
        keep = torch.ones_like(block, dtype=torch.bool)
        if isinstance(pattern, Unstructured):
            # The pattern counts per row; the running total is rounded, so that blocks add up.
            removed = round(pattern.sparsity * stop) - round(pattern.sparsity * start)
            order = (block / factor.diagonal()).square().argsort(dim=1)
            keep.scatter_(1, order[:, :removed], False)
        for i in range(stop - start):
            if isinstance(pattern, NM) and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                scores = (block[:, group] / factor.diagonal()[group]).square()
                keep[:, group] = torch.zeros_like(scores, dtype=torch.bool).scatter_(
                    1, scores.topk(pattern.n, dim=1).indices, True
                )
            pruned = block[:, i] * keep[:, i]
            error = (block[:, i] - pruned) / factor[i, i]
            block[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
            errors[:, i], block[:, i] = error, pruned
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@torch.no_grad()
def test_grouped_elimination_is_faster_and_equal(pattern: Pattern, capsys):
    model, pruner = load_model("smollm2-135m"), SparseGPT()
    ids = load_tokenizer("smollm2-135m")(text_of("wikipedia_calibration", "calibration")[:40_000]).input_ids
    batches = windows(torch.tensor(ids), 512, 4096).split(4)
    moments = gather_model_moments(model, pruner, (), batches)
    places = [place for place in block_linears(model.config) if place.layer in LAYERS]
    ours = theirs = 0.0
    agreeing = total = 0
    all_rows: list[Tensor] = []  # for each row: error, norm, whether its masks are the same throughout
    for group, members in groupby(places, key=lambda place: (place.layer, place.group)):
        weights = [module_at(model, place.name).weight for place in members]
        H = moments[group[1]].full()
        begin = time.perf_counter()
        grouped = pruner.prune_group(weights, moments[group[1]], pattern)
        middle = time.perf_counter()
        single = [blocked(weight, H, pattern) for weight in weights]
        ours, theirs = ours + middle - begin, theirs + time.perf_counter() - middle
        for (pruned, mask), expected in zip(grouped, single, strict=True):
            same = mask == (expected != 0)
            agreeing += int(same.sum())
            total += mask.numel()
            errors, norms = (pruned - expected).square().sum(1), expected.square().sum(1)
            all_rows.append(torch.stack([errors, norms, same.all(1).float()]).double())
    errors, norms, same_rows = torch.cat(all_rows, 1)
    relative = (errors.sum() / norms.sum()).sqrt().item()
    # In float32 a near-tie may fall the other way, and then moves the rest of its row: rows without one are equal.
    untouched = ((errors @ same_rows) / (norms @ same_rows)).sqrt().item()
    with capsys.disabled():
        print(
            f"\nSparseGPT {pattern}, {len(places)} linears, {torch.get_num_threads()} threads: {ours:.1f} s against "
            f"{theirs:.1f} s ({ours / theirs:.2f} x), masks {agreeing / total:.5f} equal, weights {relative:.1e} "
            f"apart, {untouched:.1e} in the {same_rows.mean().item():.2%} of the rows whose masks are the same"
        )
    assert agreeing / total >= 0.999
    assert same_rows.mean() > 0.95
    assert untouched < 1e-3
    assert ours < theirs
