"""Patterns keep exact counts of the largest scores, and refuse what is no pattern."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.patterns import NM, Unstructured, parse_pattern

quick = settings(max_examples=60)


@st.composite
def scores(draw: st.DrawFn, width_of: int = 1) -> Tensor:
    """(O, G·width_of) non-negative; of few different values, so that there are ties, or of one only."""
    rows, groups = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    shape, generator = (rows, groups * width_of), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["distinct", "ties", "constant"]))
    if kind == "constant":
        return torch.full(shape, draw(st.sampled_from([0.0, 1.0])))
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


def assert_keeps_largest(mask: Tensor, saliency: Tensor, kept: int) -> None:
    """In every row `kept` entries stay; none that goes is larger, nor as large and of lower index."""
    assert mask.dtype == torch.bool
    assert mask.shape == saliency.shape
    for row, chosen in zip(saliency.tolist(), mask.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        assert [index for index, stays in enumerate(chosen) if stays] == sorted(order[:kept])


@given(st.data(), st.integers(1, 32))
@quick
def test_nm_keeps_the_n_largest_of_each_group(data: st.DataObject, m: int):
    n = data.draw(st.integers(1, m))
    saliency = data.draw(scores(width_of=m))
    assert_keeps_largest(NM(n, m).mask(saliency).view(-1, m), saliency.view(-1, m), n)


@given(scores(), st.floats(0, 0.999))
@quick
def test_rows_keep_their_share(saliency: Tensor, sparsity: float):
    width = saliency.shape[1]
    mask = Unstructured(sparsity, "row").mask(saliency)
    assert_keeps_largest(mask, saliency, width - round(sparsity * width))


@given(scores(), st.floats(0, 0.999))
@quick
def test_layers_keep_their_share(saliency: Tensor, sparsity: float):
    mask = Unstructured(sparsity, "layer").mask(saliency)
    flat = saliency.reshape(1, -1)
    assert_keeps_largest(mask.view(1, -1), flat, flat.shape[1] - round(sparsity * flat.shape[1]))


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_a_score_that_is_no_number_costs_its_own_weight_only(scope: str):
    scores = torch.arange(32.0).view(2, 16)
    scores[0, 3] = math.nan
    kept = parse_pattern("0.5", scope).mask(scores)
    assert kept[1].sum() >= 8
    assert not kept[0, 3]


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_negative_zero_scores_and_infinities_are_ordered_too(scope: str):
    saliency = torch.tensor([[float("inf"), 0.0, -0.0, 1.0]])
    assert Unstructured(0.5, scope).mask(saliency).tolist() == [[True, False, False, True]]
    assert NM(2, 4).mask(saliency).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("2:4", NM(2, 4)), (" 4 : 8 ", NM(4, 8)), ("0.5", Unstructured(0.5)), (0.0, Unstructured(0.0))],
)
def test_reads_patterns(text: str | float, pattern: NM | Unstructured):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern
    assert 0 <= pattern.sparsity < 1


def test_scope_reaches_the_pattern():
    assert parse_pattern("0.5", "layer") == Unstructured(0.5, "layer")
    with pytest.raises(InputError, match="unknown scope 'column'"):
        parse_pattern("0.5", "column")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["5:4", "0:4", "0:0", "1.5", "1", "-0.1", "banana", "nan", "inf", "", "2:4:8"])
def test_refuses_what_is_no_pattern_in_one_line(text: str):
    with pytest.raises(InputError) as refusal:
        parse_pattern(text)
    assert "\n" not in str(refusal.value)


@given(st.integers(1, 64), st.integers(1, 16))
@quick
def test_nm_fits_a_width_that_m_divides(width: int, m: int):
    pattern = NM(1, m)
    if width % m == 0:
        pattern.validate("layers.0.o", torch.Size([8, width]))
    else:
        with pytest.raises(InputError, match=rf"layers\.0\.o: its input width {width} is not divisible by {m}"):
            pattern.validate("layers.0.o", torch.Size([8, width]))


def test_any_width_takes_any_sparsity():
    Unstructured(0.37).validate("layers.0.o", torch.Size([3, 7]))


@pytest.mark.parametrize("text", [124, "124", "124.0"])
def test_what_yaml_made_of_two_of_four_is_told(text):
    with pytest.raises(InputError, match=r'124.* looks like an N:M that YAML read in base 60; quote it, as in "2:4"'):
        parse_pattern(text)
