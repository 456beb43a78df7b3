"""The table of fused ops: what is in a row, without the proofs, which take their time."""

from __future__ import annotations

import pytest

from benchmarks import fuse_kernels


def test_row_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_kernels, "PLANS", ())
    monkeypatch.setattr(
        fuse_kernels,
        "PRECISIONS",
        {name: fuse_kernels.PRECISIONS[name] for name in ("float64", "bfloat16")},
    )
    row = fuse_kernels.measure("InternLM2")
    assert row["per_block"] == {"ilm.add_rms_norm": 2, "ilm.qkv_rotary": 1, "ilm.glu": 1}
    assert row["calls_after"] < row["calls_before"]
    exact, rounded = (n["fused_to_plain"]["gradient"] for n in row["numbers"])
    assert exact < 1e-10 < rounded
