"""Channel permutations: an order that keeps more, chosen by exact assignments, changes no function and is saved."""

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import exact, rotated_model, tiny

from lightning_modules.rotation_module import RotationModule
from rotpruner import permutations
from rotpruner.diagnostics import masked_share
from rotpruner.errors import InputError
from rotpruner.loading import load_model
from rotpruner.oneshot import prune_model
from rotpruner.orthogonal import is_order, permutation_matrix, rotate_features, rotate_weight
from rotpruner.patterns import NM, parse_pattern
from rotpruner.permutations import block_orders, channel_permutation
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import LearnedRotations, check_start, merge_rotations
from rotpruner.statistics import Moment


def kept(importance, pattern):
    return (importance * pattern.mask(importance)).sum().item()


def partitions(features, size):
    """All ways to part features into sets of a size."""
    if not features:
        yield []
        return
    first, *rest = features
    for others in combinations(rest, size - 1):
        left = [feature for feature in rest if feature not in others]
        for groups in partitions(left, size):
            yield [[first, *others], *groups]


@pytest.mark.parametrize("seed", range(10))
def test_near_the_best_of_all_partitions(seed):
    """Eight features have 35 partitions in groups of four; reassignment ends in their best quarter."""
    importance = torch.rand(40, 8, generator=torch.Generator().manual_seed(seed)).pow(4)
    pattern = NM(2, 4)
    found = sorted(kept(importance[:, list(chain(*groups))], pattern) for groups in partitions(list(range(8)), 4))
    order = channel_permutation(importance, pattern)
    assert kept(importance[:, order], pattern) >= found[-len(found) // 4]


@given(st.integers(0, 2**16), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (4, 4)]), st.integers(1, 5))
def test_an_order_that_loses_nothing_to_dealing_out(seed, numbers, groups):
    pattern = NM(*numbers)
    importance = torch.rand(12, groups * pattern.m, generator=torch.Generator().manual_seed(seed)).pow(3)
    order = channel_permutation(importance, pattern)
    assert sorted(order.tolist()) == list(range(importance.shape[1]))
    dealt = channel_permutation(importance, pattern, rounds=0)
    assert kept(importance[:, order], pattern) >= kept(importance[:, dealt], pattern) * (1 - 1e-5)


def test_many_groups_are_dealt_out_in_parts(monkeypatch):
    """No place is left out, none moves to another part, and most of what can be gained is."""
    importance = torch.rand(40, 4 * 29, generator=torch.Generator().manual_seed(0)).pow(4)
    pattern = NM(2, 4)
    whole, dealt = (channel_permutation(importance, pattern, rounds) for rounds in (5, 0))
    monkeypatch.setattr(permutations, "MOST_GROUPS", 10)
    order = channel_permutation(importance, pattern)
    members = [[set(each.view(-1, 4)[part::3].flatten().tolist()) for part in range(3)] for each in (dealt, order)]
    assert members[0] == members[1]
    least, found, most = (kept(importance[:, choice], pattern) for choice in (dealt, order, whole))
    assert found - least > (most - least) / 2


def test_features_that_crowd_one_group_are_parted():
    importance = torch.tensor([[9.0, 9, 9, 9, 0, 0, 0, 0]]).repeat(3, 1)
    order = channel_permutation(importance, NM(2, 4))
    assert kept(importance[:, order], NM(2, 4)) == importance.sum()


def test_blocks_keep_their_features_and_their_heads():
    """Two blocks of width 8 that serve two heads each: one order a block, by the rows of both heads."""
    torch.manual_seed(0)
    importance = torch.rand(6, 2 * 2 * 8)
    orders = block_orders([importance], 12, 2, 8, NM(2, 4))
    heads = importance.view(6, 2, 2, 8)
    for block, order in enumerate(orders):
        rows = heads[:, block].reshape(-1, 8)
        assert kept(rows[:, order], NM(2, 4)) >= kept(rows[:, channel_permutation(rows, NM(2, 4))], NM(2, 4)) * 0.999


def test_linears_count_alike_whatever_their_scale():
    one, other = torch.rand(2, 6, 16, generator=torch.Generator().manual_seed(0))
    orders = [block_orders([one, other * scale], 12, 2, 8, NM(2, 4)) for scale in (1.0, 2.0**-20)]
    assert torch.equal(*orders)
    assert not torch.equal(orders[0], block_orders([one], 6, 2, 8, NM(2, 4)))


def test_rows_are_sampled_evenly_over_all_linears(monkeypatch):
    monkeypatch.setattr(permutations, "MOST_ROWS", 5)
    seen = []
    monkeypatch.setattr(permutations, "channel_permutation", lambda rows, pattern: seen.append(rows) or torch.arange(4))
    importances = [torch.full((count, 4), 1.0) for count in (4, 3, 6)]
    rows = torch.cat([importance / importance.sum() for importance in importances])
    block_orders(iter(importances), 13, 1, 4, NM(2, 4))
    assert torch.equal(seen[0], rows[::3])


def test_blocks_over_which_groups_reach_stay_as_they_are():
    rotated = rotated_model(tiny("smollm2", head_dim=6), start="permutation")
    rotated.calibrate([torch.arange(16)[None]])
    rotated.start_from_statistics("permutation")
    found = rotated.rotations()
    torch.testing.assert_close(found["value_heads"], torch.eye(6).expand_as(found["value_heads"]))
    assert not torch.equal(found["residual"][0, 0], torch.eye(24))


def test_orders_act_as_their_matrices():
    torch.manual_seed(0)
    order, x, W = torch.randperm(8), torch.randn(3, 8), torch.randn(8, 8)
    Q = permutation_matrix(order)[None]
    assert is_order(order)
    assert not is_order(Q)
    torch.testing.assert_close(rotate_features(x, order), rotate_features(x, Q))
    torch.testing.assert_close(rotate_weight(W, order, order), rotate_weight(W, Q, Q))
    H = torch.randn(8, 8)
    for moment in (Moment((H @ H.mT)[None]), Moment(torch.rand(8, 1, 1))):
        by_order, by_matrix = moment.rotate(order), moment.rotate(Q)
        if moment.blocks.shape[-1] == 8:
            torch.testing.assert_close(by_order.diagonal(), by_matrix.diagonal())
            torch.testing.assert_close(by_order.full(), by_matrix.full())
            torch.testing.assert_close(by_order.seen_blocks(), by_matrix.seen_blocks())
        else:
            torch.testing.assert_close(by_order.diagonal(), moment.diagonal()[order])
            torch.testing.assert_close(by_order.seen_blocks(), moment.blocks[order])


@pytest.mark.parametrize(
    ("name", "space", "placement"),
    [
        ("smollm2", "residual", "shared"),
        ("smollm2", "residual", "per_block"),
        ("smollm2", "value_heads", "shared"),
        ("qwen3", "value_heads", "shared"),
        ("smollm2", "mlp", "shared"),
        ("opt", "residual", "shared"),
        ("opt", "mlp", "shared"),
    ],
)
def test_start_from_permutations_keeps_more_importance_in_every_reader_of_a_space(name, space, placement):
    turning = ["residual"] if space == "mlp" else []  # orders alone have nothing to learn
    rotated = rotated_model(tiny(name), [space, *turning], start="permutation", placement=placement)
    readers = [linear for linear in rotated.linears if linear.place.spec.reads == space]
    rotated.calibrate([torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))])

    def kept():
        rotated.refresh_masks()
        names = {linear.place.name for linear in readers}
        return [row["kept_mass"] for row in masked_share(rotated) if row["name"] in names]

    before = kept()
    rotated.start_from_statistics("permutation")
    assert sum(kept()) > sum(before) + 0.005 * len(readers)


@pytest.mark.parametrize(
    ("name", "placement"), [("smollm2", "shared"), ("smollm2", "per_block"), ("qwen3", "per_layer"), ("opt", "shared")]
)
def test_start_from_permutations_keeps_the_function(name, placement, tmp_path):
    stock = tiny(name)
    spaces = ["residual", "value_heads", "mlp"]
    rotated = rotated_model(tiny(name), spaces, start="permutation", placement=placement)
    rotations, wanda, pattern = rotated.rotations, rotated.pruner, rotated.pattern
    ids = torch.randint(stock.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    rotated.calibrate([ids])
    rotated.start_from_statistics("permutation")
    assert any((order != torch.arange(len(order))).any() for order in rotations()["mlp"])
    Rotations.of(rotations(), stock).save_pretrained(tmp_path / "rotations")
    saved = Rotations.from_pretrained(tmp_path / "rotations")
    assert saved["mlp"].dtype == torch.int64

    # Pruned one shot by the saved rotations, the model is the one that would have learned.
    pruned = tiny(name)
    prune_model(pruned, wanda, pattern, rotations=saved, moments=rotated.moments)
    rotated.refresh_masks()
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, rotated(ids).logits, atol=2e-4, rtol=1e-3)
        moved = exact(tiny(name))
        expected = exact(tiny(name))(ids).logits
        merge_rotations(moved, dict(saved))
        torch.testing.assert_close(moved(ids).logits, expected, atol=1e-6, rtol=0)


def test_linears_of_zeros_do_not_stop_the_search_for_an_order():
    rotated = rotated_model(tiny("smollm2"), start="permutation")
    for linear in rotated.linears:
        if linear.place.spec.path == "self_attn.o_proj":
            linear.weight.data.zero_()
    rotated.calibrate([torch.arange(16)[None]])
    rotated.start_from_statistics("permutation")
    assert all(Q.isfinite().all() for Q in rotated.rotations().values())


@pytest.mark.parametrize(
    ("start", "spaces", "pattern", "message"),
    [
        ("permutation", ["residual"], "0.5", "start permutation helps groups of N:M"),
        ("identity", ["residual", "mlp"], "0.5", "leave mlp out"),
        ("permutation", ["residual", "mlp"], "0.5", "leave mlp out"),
        ("pca", ["value_heads"], "2:4", "add residual"),
        ("identity", ["residual", "mlp"], "2:4", "set start to permutation"),
        ("permutation", ["mlp"], "2:4", "has rotations to learn"),
        (None, ["mlp"], "2:4", "has rotations to learn"),
    ],
)
def test_starts_that_do_nothing_are_refused(start, spaces, pattern, message):
    with pytest.raises(InputError, match=message):
        check_start(start, spaces, parse_pattern(pattern))


def test_given_rotations_need_no_start(tmp_path, model_directory):
    """Learning goes on from rotations whose features were ordered before."""
    model = load_model(str(model_directory))
    spaces = ["residual", "mlp"]
    saved = LearnedRotations(model.config, spaces, start="permutation")
    saved.order.copy_(saved.order.flip(-1))
    Rotations.of(saved(), model).save_pretrained(tmp_path / "rotations")
    module = RotationModule(str(model_directory), spaces=spaces, init_rotations=str(tmp_path / "rotations"))
    module.configure_model()
    torch.testing.assert_close(module.rotated.rotations()["mlp"], saved()["mlp"], rtol=0, atol=0)


def test_orders_of_another_model_are_refused():
    model = tiny("smollm2")
    rotations = {"mlp": torch.zeros(model.config.num_hidden_layers, model.config.intermediate_size, dtype=torch.int64)}
    with pytest.raises(InputError, match="not orthogonal"):
        merge_rotations(model, rotations)
    with pytest.raises(InputError, match="have shape"):
        merge_rotations(model, {"mlp": rotations["mlp"].float()})
