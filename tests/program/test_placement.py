"""Placements: their text, their shapes, and cutting and joining tensors by them."""

import pytest
import torch

from ilm_compile.program.placement import I, P, Placement, R, S, join_shards, split_shards

FOLDED = S(1, folded=True), S(1, (8, 8), folded=True)
PLACEMENTS = [I, R, P, S(0), S(3), S(1, (4, 2)), S(0, (8, 4, 4)), *FOLDED]
SHARDS = [S(0), S(1), S(2), S(0, (8, 4)), S(1, (4, 8, 4)), S(2, (4, 4)), *FOLDED]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_text_and_parse_are_inverse(placement: Placement) -> None:
    assert Placement.parse(str(placement)) == placement


@pytest.mark.parametrize("text", ["I", "R", "P", "S(0)", "S(12)", "S(1, segments=(4, 2))"])
def test_parse_and_text_are_inverse(text: str) -> None:
    assert str(Placement.parse(text)) == text


@pytest.mark.parametrize("text", ["", "X", "S", "S()", "S(-1)", "S(1, (4, 2))", "I ", "P+R"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected I, R, P, S\(dim\) or S\(dim, segments="
    ) as info:
        Placement.parse(text)
    assert f"got {text!r}" in str(info.value)


def test_one_segment_is_no_segment() -> None:
    assert S(1, (6,)) == S(1)


def test_only_sharded_placements_are_shards() -> None:
    assert [p.is_shard for p in (I, R, P, S(0), S(0, (2, 2)))] == [False, False, False, True, True]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("placement", SHARDS, ids=str)
def test_split_and_join_are_inverse(placement: Placement, size: int) -> None:
    full = torch.randn(12, 16, 8)
    shards = split_shards(full, placement, size)
    assert len(shards) == size
    assert torch.equal(join_shards(shards, placement), full)


@pytest.mark.parametrize("placement", SHARDS, ids=str)
def test_shards_have_the_local_shape(placement: Placement) -> None:
    full = torch.randn(12, 16, 8)
    local = placement.local_shape(full.shape, 4)
    assert [tuple(shard.shape) for shard in split_shards(full, placement, 4)] == [local] * 4
    assert placement.global_shape(local, 4) == full.shape


def test_a_folded_shard_is_head_and_tail_and_held_says_where() -> None:
    for placement, length in ((S(0, folded=True), 12), (S(0, (4, 8), folded=True), 12), (S(0), 12)):
        for rank, shard in enumerate(split_shards(torch.arange(length), placement, 2)):
            runs = placement.held(length, 2, rank)
            assert [n for start, stop in runs for n in range(start, stop)] == shard.tolist()
    first, second = split_shards(torch.arange(8), S(0, folded=True), 2)
    assert (first.tolist(), second.tolist()) == ([0, 1, 6, 7], [2, 3, 4, 5])
    assert S(0, folded=True).held(8, 2, 0) == [(0, 2), (6, 8)]
    assert not S(0, folded=True).divides((6,), 2)


def test_a_plain_shard_is_an_equal_slice_in_rank_order() -> None:
    first, second = split_shards(torch.arange(6), S(0), 2)
    assert (first.tolist(), second.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_a_segmented_shard_holds_a_slice_of_every_part() -> None:
    first, second = split_shards(torch.arange(6), S(0, (4, 2)), 2)
    assert (first.tolist(), second.tolist()) == ([0, 1, 4], [2, 3, 5])


@pytest.mark.parametrize("placement", [I, R, P], ids=str)
def test_whole_values_have_the_global_shape_on_every_rank(placement: Placement) -> None:
    assert placement.local_shape((3, 5), 2) == (3, 5)
    assert placement.global_shape((3, 5), 2) == (3, 5)


@pytest.mark.parametrize(
    ("placement", "shape", "divides"),
    [
        (I, (3,), True),
        (P, (3,), True),
        (S(0), (6, 3), True),
        (S(1), (6, 3), False),
        (S(0, (4, 2)), (6,), True),
        (S(0, (3, 3)), (6,), False),
        (S(0), (0, 2), False),
    ],
    ids=str,
)
def test_divides_says_whether_every_part_splits_evenly(
    placement: Placement, shape: tuple[int, ...], divides: bool
) -> None:
    assert placement.divides(shape, 2) is divides


def test_a_dim_the_value_lacks_does_not_divide() -> None:
    assert not S(2, (2, 2)).divides((4, 4), 2)
    assert not S(2).divides((4, 4), 2)
