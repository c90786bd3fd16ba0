"""OWL: layers with many outliers keep more weights (Yin et al., 2024, arXiv:2310.05175)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rotpruner.errors import InputError


def outlier_sparsities(
    saliencies: Iterable[Tensor], sparsity: float, *, threshold: float = 5.0, spread: float = 0.08
) -> list[float]:
    """A sparsity for each layer, S_ℓ = S − λ (D_ℓ − D̄) / max_k |D_k − D̄|: mean S, nowhere further from it than λ.

    D_ℓ is the layer's outlier ratio, the share of its saliencies above `threshold` times their mean
    (section 4.1). Layers are taken to be of one size, as the blocks of a decoder are.

    Args:
        saliencies: for each layer its weights' saliencies (the paper's are Wanda's), of any shape; those of
            several linears flattened into one. May be a generator: one layer is looked at at a time.
        sparsity: S, the mean.
        threshold: M, how many times the mean makes an outlier.
        spread: λ.

    Raises:
        InputError: S − λ or S + λ is not in [0, 1).
    """
    if spread < 0 or not 0 <= sparsity - spread <= sparsity + spread < 1:
        raise InputError(
            f"outlier ratios spread sparsity {sparsity:g} by {spread:g}, out of [0, 1); choose a sparsity in "
            f"[{spread:g}, {1 - spread:g}), or layer_sparsity uniform"
        )
    ratios = [int((layer > threshold * layer.mean()).count_nonzero()) / layer.numel() for layer in saliencies]
    if len(set(ratios)) <= 1:
        return [sparsity] * len(ratios)
    mean = sum(ratios) / len(ratios)
    farthest = max(abs(ratio - mean) for ratio in ratios)
    return [sparsity - spread * (ratio - mean) / farthest for ratio in ratios]
