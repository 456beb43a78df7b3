"""Communication links: the time to move bytes inside a node, per collective and group size.

`Link` is the model ``t = alpha + c * sqrt(B) + B / beta`` with B the bytes each rank sends (the
"bus bytes" of nccl-tests). The square root is the slow climb to full bandwidth; with it the fits
below are within 3-8 % of the measurements on average (all-to-all 13 %), without it within 7-22 %.

Sources: `A100`, `H100` and `H200` are our fits (the coefficients a3_us, b3_GBps and c3 of
nccl_alpha_beta_fit.csv) to the NCCL 2.27 and 2.29 measurements that NVIDIA publishes in
ai-dynamo/aiconfigurator (src/aiconfigurator/systems), 2 to 8 GPUs of one SXM node. Point-to-point
bandwidth is from stas00/ml-engineering (network/README.md), the H100's taken to be the H200's, and
its latency that of a two-rank all-gather. `GLOO` was measured between two processes on one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The coefficients of a link: seconds, per byte and per square root of a byte."""

    latency_s: float
    s_per_byte: float
    s_per_sqrt_byte: float = 0.0

    def transfer_s(self, num_bytes: float) -> float:
        """Return the seconds, latency aside, in which each rank sends `num_bytes`."""
        return self.s_per_byte * num_bytes + self.s_per_sqrt_byte * sqrt(num_bytes)


BySize = Mapping[int, Link]  # ranks in the group -> link
Links = Mapping[str, BySize]  # collective -> group size -> link


def link(latency_us: float, gb_per_s: float, ns_per_sqrt_byte: float = 0.0) -> Link:
    """Return the `Link` of a latency in us, a bandwidth in 1e9 bytes/s and a climb in ns."""
    return Link(
        latency_s=latency_us * 1e-6,
        s_per_byte=1e-9 / gb_per_s,
        s_per_sqrt_byte=ns_per_sqrt_byte * 1e-9,
    )


def interpolate(by_size: BySize, size: int) -> Link:
    """Return the link of `size` ranks: linear between the measured sizes, flat outside."""
    if size in by_size:
        return by_size[size]
    sizes = sorted(by_size)

    def coefficient(name: str) -> float:
        return float(np.interp(size, sizes, [getattr(by_size[n], name) for n in sizes]))

    return Link(
        latency_s=coefficient("latency_s"),
        s_per_byte=coefficient("s_per_byte"),
        s_per_sqrt_byte=coefficient("s_per_sqrt_byte"),
    )


def _fit(*figures: tuple[float, float, float]) -> BySize:
    return {size: link(*row) for size, row in zip((2, 4, 8), figures, strict=True)}


def _links(rows: Links, p2p: Link) -> Links:
    # broadcast was not measured; like the all-gather it is one pass around the ring
    return {**rows, "broadcast": rows["all_gather"], "p2p": {2: p2p}}


def faster(links: Links, factor: float) -> Links:
    """Return the links at `factor` times the bandwidth, with the same latency."""
    return {
        kind: {
            size: Link(
                latency_s=one.latency_s,
                s_per_byte=one.s_per_byte / factor,
                s_per_sqrt_byte=one.s_per_sqrt_byte / factor,
            )
            for size, one in by_size.items()
        }
        for kind, by_size in links.items()
    }


A100 = _links(
    {
        "all_reduce": _fit((9.51, 230, 13.5), (13.8, 225, 8.57), (21.3, 230, 8.64)),
        "all_gather": _fit((9.04, 176, 13.3), (10.7, 227, 13.9), (15.0, 217, 9.29)),
        "reduce_scatter": _fit((8.94, 205, 12.3), (10.5, 234, 11.7), (14.4, 221, 8.29)),
        "all_to_all": _fit((10.7, 195, 11.9), (12.0, 216, 9.13), (12.8, 224, 9.72)),
    },
    p2p=link(9.04, 274),
)
H100 = _links(
    {
        "all_reduce": _fit((5.85, 336, 6.00), (9.43, 365, 4.32), (15.4, 481, 6.54)),
        "all_gather": _fit((5.05, 284, 6.92), (7.00, 347, 6.27), (10.5, 369, 5.51)),
        "reduce_scatter": _fit((5.23, 256, 5.24), (7.00, 326, 4.41), (10.3, 342, 2.92)),
        "all_to_all": _fit((7.01, 363, 7.76), (7.47, 344, 6.23), (8.44, 340, 4.74)),
    },
    p2p=link(5.05, 396),
)
H200 = _links(
    {
        "all_reduce": _fit((5.97, 335, 5.36), (9.61, 362, 3.80), (15.9, 506, 6.93)),
        "all_gather": _fit((5.01, 284, 6.53), (7.16, 346, 5.64), (11.5, 366, 4.87)),
        "reduce_scatter": _fit((5.12, 259, 5.01), (6.99, 327, 4.00), (11.1, 347, 3.00)),
        "all_to_all": _fit((7.10, 364, 6.79), (7.35, 365, 5.63), (8.32, 339, 4.67)),
    },
    p2p=link(5.01, 396),
)
GLOO = _links(
    {
        kind: {2: link(200, 1.9)}
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    },
    p2p=link(50, 4.4),
)
