"""Bytes and time of collectives: the formulas by hand, published measurements, and limits."""

from itertools import pairwise
from math import log2

import pytest

from ilm_compile.cost import HARDWARE, Hardware, collective_bytes, collective_time
from ilm_compile.errors import PlanError

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p")
MIB = 2**20


@pytest.fixture(params=HARDWARE.values(), ids=HARDWARE.keys())
def hardware(request: pytest.FixtureRequest) -> Hardware:
    return request.param


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("all_reduce", 4, 1200),
        ("all_gather", 4, 600),
        ("reduce_scatter", 4, 600),
        ("all_to_all", 4, 150),
        ("broadcast", 4, 800),
        ("p2p", 2, 800),
    ],
)
def test_bytes_each_rank_sends(kind: str, size: int, expected: float) -> None:
    assert collective_bytes(kind, 800, size) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_needs_no_communication(kind: str, hardware: Hardware) -> None:
    assert collective_bytes(kind, MIB, 1) == 0
    assert collective_time(kind, MIB, 1, hardware) == 0


def test_gloo_all_reduce_by_hand() -> None:
    expected = 200e-6 + 19e6 / 1.9e9
    assert collective_time("all_reduce", 19e6, 2, HARDWARE["cpu"]) == pytest.approx(expected)


def test_gloo_point_to_point_by_hand() -> None:
    assert collective_time("p2p", 44e6, 2, HARDWARE["cpu"]) == pytest.approx(50e-6 + 0.01)


def test_nvlink_all_reduce_by_hand() -> None:
    sent = 2 * 7 / 8 * 1e9
    expected = 15.4e-6 + 6.54e-9 * sent**0.5 + sent / 481e9
    assert collective_time("all_reduce", 1e9, 8, HARDWARE["h100"]) == pytest.approx(expected)


def test_sizes_between_measurements_are_interpolated() -> None:
    four, six, eight = (
        collective_time("all_gather", 0.001, size, HARDWARE["h100"]) for size in (4, 6, 8)
    )
    assert six == pytest.approx((four + eight) / 2)  # of so few bytes only the latency is left


def test_larger_groups_than_measured_are_clamped() -> None:
    two, eight = (collective_time("all_reduce", 0.001, n, HARDWARE["cpu"]) for n in (2, 8))
    assert eight == pytest.approx(two)


# Largest measured bus bandwidth in 1e9 bytes/s: ai-dynamo/aiconfigurator, 512 MiB on 8 GPUs.
@pytest.mark.parametrize(
    ("name", "kind", "measured"),
    [
        ("a100-80g", "all_reduce", 222),
        ("a100-80g", "all_gather", 205),
        ("a100-80g", "reduce_scatter", 213),
        ("h100", "all_reduce", 445),
        ("h100", "all_gather", 335),
        ("h100", "reduce_scatter", 336),
        ("h200", "all_reduce", 460),
        ("h200", "all_gather", 337),
        ("h200", "reduce_scatter", 337),
    ],
)
def test_bus_bandwidth_is_near_the_measured_one(name: str, kind: str, measured: float) -> None:
    seconds = collective_time(kind, 512 * MIB, 8, HARDWARE[name])
    bandwidth = collective_bytes(kind, 512 * MIB, 8) / seconds / 1e9
    assert bandwidth == pytest.approx(measured, rel=0.06)


def test_across_nodes_by_hand() -> None:
    # 4 nodes, 2 steps of a tree: each device reduces its eighth of the tensor over its own NIC,
    # 40e9 bytes/s usable
    expected = 15.9e-6 + 2 * 14e-6 + 2 * 3 / 4 * (8e9 / 8) / 40e9
    assert collective_time("all_reduce", 8e9, 32, HARDWARE["h200"]) == pytest.approx(expected)


def test_measured_all_reduce_of_32_gpus_is_near() -> None:
    # stas00/ml-engineering, network/README.md: 365e9 bytes/s
    seconds = collective_time("all_reduce", 4096 * MIB, 32, HARDWARE["h200"])
    assert collective_bytes("all_reduce", 4096 * MIB, 32) / seconds == pytest.approx(
        365e9, rel=0.15
    )


@pytest.mark.parametrize("nodes", [2, 16])
def test_all_to_all_across_nodes_sends_what_leaves_the_node(nodes: int) -> None:
    # each rank holds 1 GB and sends the part that is for other nodes over its own NIC
    expected = 8.44e-6 + log2(nodes) * 14e-6 + 1e9 * (nodes - 1) / nodes / 40e9
    seconds = collective_time("all_to_all", 8 * nodes * 1e9, 8 * nodes, HARDWARE["h100"])
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stride_of_a_node_leaves_only_the_network(kind: str) -> None:
    h100 = HARDWARE["h100"]
    expected = 14e-6 + collective_bytes(kind, 1e9, 2) / 40e9
    assert collective_time(kind, 1e9, 2, h100, stride=8) == pytest.approx(expected)
    assert collective_time(kind, 1e9, 2, h100, stride=4) < expected


@pytest.mark.parametrize("kind", KINDS)
def test_time_grows_with_bytes(kind: str, hardware: Hardware) -> None:
    times = [collective_time(kind, 4**n, 2, hardware) for n in range(4, 18)]
    assert all(less < more for less, more in pairwise(times))


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_leaving_the_node_is_slower(kind: str, hardware: Hardware) -> None:
    inside, across = (collective_time(kind, 512 * MIB, n, hardware) for n in (8, 16))
    assert across > inside


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_all_reduce_costs_more_than_its_halves_do_each(kind: str, hardware: Hardware) -> None:
    half = collective_time(kind, 64 * MIB, 4, hardware)
    assert half < collective_time("all_reduce", 64 * MIB, 4, hardware)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown collective 'scatter'; known are all_reduce, all_"):
        collective_time("scatter", 1, 2, HARDWARE["cpu"])


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("all_reduce", 0, "size=0 ranks; expected at least 1"),
        ("p2p", 4, "size=4 ranks; expected 1 or 2"),
    ],
)
def test_wrong_size_is_refused(kind: str, size: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        collective_bytes(kind, 1, size)
