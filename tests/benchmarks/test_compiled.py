"""Compiled steps are measured beside eager ones, once their losses agree."""

from benchmarks import compiled


def test_a_model_is_measured_in_four_ways() -> None:
    row = compiled.measure("InternLM2", hidden=64, rows=1, tokens=8, rounds=1, backend="aot_eager")
    assert min(row.plain_ms, row.torch_compile_ms, row.eager_ms, row.compiled_ms) > 0
    assert row.ratios[1] == row.compiled_ms / row.eager_ms
    assert any(f"({compiled.LAYERS} alike): compiled in" in said for said in row.compilations)
