"""The observer: live bytes and bytes sent, against what is known of small steps."""

import torch
from torch import Tensor
from torch import distributed as dist

import ilm_compile
from benchmarks.common import make_model, random_batch
from benchmarks.observe import Observer
from ilm_compile.runtime.communicator import all_gather_single, reduce_scatter_single
from tests.support.world import World

MIB = 2**20


def test_the_peak_counts_what_lives_at_once() -> None:
    before = Observer()
    with before:
        torch.zeros(1)
    with Observer() as observer:
        for _ in range(3):
            kept = torch.zeros(MIB)
            del kept
        pair = [torch.zeros(MIB), torch.zeros(MIB)]
    assert observer.peak_bytes - before.peak_bytes == 2 * 4 * MIB - 4
    del pair


def test_the_peak_counts_what_stood_before() -> None:
    tensor = torch.zeros(MIB)
    with Observer() as observer:
        torch.zeros(1)
    assert observer.peak_bytes >= tensor.nbytes


def test_a_storage_that_was_emptied_counts_no_more() -> None:
    tensor = torch.zeros(MIB)
    with Observer() as full:
        torch.zeros(1)
    tensor.untyped_storage().resize_(0)
    with Observer() as empty:
        torch.zeros(1)
    assert full.peak_bytes - empty.peak_bytes == 4 * MIB


def test_views_count_once() -> None:
    tensor = torch.zeros(MIB)
    with Observer() as alone:
        torch.zeros(1)
    with Observer() as viewed:
        parts = tensor.view(2, -1).unbind(0)
    assert viewed.peak_bytes <= alone.peak_bytes
    del parts


def send_everything(rank: int) -> dict[str, int]:
    x = torch.zeros(8)  # 32 bytes
    with Observer() as observer:
        dist.all_reduce(x)
        all_gather_single(torch.empty(16), x)
        reduce_scatter_single(torch.empty(4), x)
        dist.all_to_all_single(torch.empty(8), x)
        dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
    return {kind: traffic.num_bytes for kind, traffic in observer.sent.items()}


def test_collectives_count_what_a_rank_sends(world2: World) -> None:
    expected = {"all_reduce": 32, "all_gather": 32, "reduce_scatter": 16, "all_to_all": 16}
    first, second = world2.run(send_everything)
    assert first == {**expected, "p2p": 32}
    assert second == expected


def observed_and_counted(rank: int) -> list[dict[str, int]]:
    """What one step sends, as the observer sees it and as the program counts it."""
    model = make_model("internlm2_tiny", {"num_layers": 2})
    example = model.example_inputs(2, 8)
    parallel = ilm_compile.parallelize(model, example_inputs=example, tp=2, num_microbatches=2)
    with Observer() as observer:
        loss = parallel.execute_schedule(random_batch(4, 8, 512))
    assert isinstance(loss, Tensor)
    seen = {kind: traffic.num_bytes for kind, traffic in observer.sent.items()}
    counted = {kind: t.num_bytes for kind, t in parallel.traffic().items() if t.num_bytes}
    # The loss, a float64; in the first step a checksum of each input and its opposite; what the
    # ranks tell each other of their rows.
    seen["all_reduce"] -= 8 + 32 + 32
    return [seen, counted]


def test_it_sees_what_the_program_counts(world2: World) -> None:
    for seen, counted in world2.run(observed_and_counted):
        assert seen == counted
