"""What a block keeps is measured beside plain PyTorch, and is what was predicted."""

from benchmarks import saved_bytes


def test_a_block_keeps_what_was_predicted_and_less_than_plain_pytorch() -> None:
    plain, compiled, *ours = saved_bytes.measure("InternLM2", "bf16")
    assert (plain.way, compiled.way) == ("PyTorch", saved_bytes.COMPILED)
    assert [row.way for row in ours] == list(saved_bytes.PLANS)
    assert all(row.predicted == row.measured for row in ours)
    assert compiled.measured < plain.measured
    by_way = {row.way: row for row in ours}
    assert by_way["fused"].per_token <= 41.1
    assert by_way["fused, selective"].measured < by_way["fused"].measured < plain.measured
