"""Compiled steps are measured beside eager ones, once their losses agree."""

from benchmarks import compiled


def test_a_model_is_measured_in_four_ways() -> None:
    step = compiled.Step("InternLM2", hidden=64, tokens=8, trains=True)
    row = compiled.measure(step, list(compiled.WAYS), rounds=1, backend="aot_eager")
    assert tuple(row.ms) == (*compiled.WAYS, compiled.PRODUCTS)
    assert row.ms[compiled.PRODUCTS] < row.ms[compiled.EAGER]
    assert min(row.ms.values()) > 0
    assert row.ratios["compiled / eager"] == row.ms[compiled.COMPILED] / row.ms[compiled.EAGER]
    assert any(f"({compiled.LAYERS} alike): compiled in" in said for said in row.compilations)
