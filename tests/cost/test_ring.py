"""The seconds of attention in a ring: work, merging, and what messages the work does not hide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ilm_compile.cost import HARDWARE, collective_time
from ilm_compile.cost.ring import EXACT_BYTES, KERNELS, MERGES, PASSES, pieces_time, ring_time

H100 = HARDWARE["h100"]
SHAPES = ((1, 32, 4096, 128), (1, 8, 4096, 128), (1, 8, 4096, 64))  # what a rank holds
BYTES = 2 * 8 * 4096 * (128 + 64)  # of its keys and values
RESULT = 32 * 4096 * 64


def seconds(compute, *, size=4, is_masked=False, backward=False, hardware=H100):
    options = {"size": size, "hardware": hardware, "backward": backward}
    return ring_time(compute, SHAPES, itemsize=2, is_masked=is_masked, **options)


def added(size=4):
    moved = MERGES * size * RESULT * EXACT_BYTES / H100.usable_bandwidth
    return moved + size * KERNELS * H100.kernel_overhead_s


def hop(stride=1):
    return collective_time("p2p", BYTES, 2, H100, stride=stride)


def test_long_work_hides_the_messages():
    assert seconds(1.0) == pytest.approx(1.0 + added(), rel=1e-12)


def test_the_last_gradients_go_home_when_nothing_is_left_to_do():
    assert seconds(1.0, backward=True) == pytest.approx(1.0 + added() + hop(), rel=1e-12)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_messages_that_take_longer_than_a_step_are_waited_for(backward):
    slow = replace(H100, kernel_overhead_s=0.0, memory_bandwidth=1e30)
    sent = 3 * (1 + backward) * hop() + backward * hop()
    assert seconds(0.0, backward=backward, hardware=slow) == pytest.approx(sent, rel=1e-12)


def test_a_ring_over_nodes_is_as_slow_as_its_slowest_link():
    fast = replace(H100, kernel_overhead_s=0.0, memory_bandwidth=1e30)
    assert hop(8) > 2 * hop()
    assert seconds(0.0, size=16, hardware=fast) == pytest.approx(15 * hop(8), rel=1e-12)


def test_a_mask_has_the_scores_pass_through_memory():
    scores = 32 * 4096 * 4096 * 4
    more = PASSES * scores * EXACT_BYTES / H100.usable_bandwidth
    assert seconds(1.0, is_masked=True) - seconds(1.0) == pytest.approx(more, rel=1e-9)


def products(seconds, *, count=1, sums=False, hardware=H100):
    return pieces_time(seconds, BYTES, count=count, size=4, hardware=hardware, sums=sums)


def test_products_hide_the_pieces_that_travel_beside_them():
    kernels = (3 * 2 + 4) * H100.kernel_overhead_s  # of three more pieces, and one to put each
    placed = 4 * 2 * BYTES / H100.usable_bandwidth
    assert products(1.0, count=2) == pytest.approx(1.0 + kernels + placed, rel=1e-12)


def test_pieces_that_take_longer_than_their_products_are_waited_for():
    fast = replace(H100, kernel_overhead_s=0.0, memory_bandwidth=1e30)
    work = hop() / 10
    assert products(4 * work, hardware=fast) == pytest.approx(3 * hop() + work, rel=1e-12)


def test_a_sum_that_travels_is_read_once_more():
    more = 4 * BYTES / H100.usable_bandwidth
    assert products(1.0, sums=True) - products(1.0) == pytest.approx(more, rel=1e-6)
