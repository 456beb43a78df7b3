"""The compute orders of torch.distributed.pipelining's own schedules.

Uses private names of torch, so a new torch may break this file; it then fails loudly, here only.
"""

import csv
from types import SimpleNamespace

from torch.distributed.pipelining import schedules as torch_schedules


def looped_order(class_name: str, *, pp: int, num_microbatches: int, num_chunks: int) -> list[str]:
    """The computes of every rank, one string per rank, by the class's own table."""
    schedule_class = getattr(torch_schedules, class_name)
    rounds = max(1, num_microbatches // pp)
    table = SimpleNamespace(
        pp_group_size=pp,
        num_stages=pp * num_chunks,
        n_local_stages=num_chunks,
        _stages=[None] * num_chunks,
        _n_microbatches=num_microbatches,
        microbatches_per_round=num_microbatches // rounds,
    )
    return [
        " ".join(
            str(action)
            for action in schedule_class._calculate_single_rank_operations(table, rank)
            if action is not None
        )
        for rank in range(pp)
    ]


def single_order(class_name: str, *, pp: int, num_microbatches: int) -> list[str]:
    """The computes of every rank, recorded from the class's hand-written loop."""
    return [_record(class_name, rank, pp, num_microbatches) for rank in range(pp)]


def _record(class_name: str, rank: int, pp: int, num_microbatches: int) -> str:
    schedule_class = getattr(torch_schedules, class_name)
    computes: list[str] = []

    def nothing(*args, **kwargs):
        return []

    stage = SimpleNamespace(
        stage_index=rank,
        forward_one_chunk=lambda index, *_, **__: computes.append(f"{rank}F{index}"),
        backward_one_chunk=lambda index, **_: computes.append(f"{rank}B{index}"),
        get_fwd_recv_ops=nothing,
        get_fwd_send_ops=nothing,
        get_bwd_recv_ops=nothing,
        get_bwd_send_ops=nothing,
        perform_reduce_grad=nothing,
    )
    microbatches = [()] * num_microbatches
    schedule = SimpleNamespace(
        _n_microbatches=num_microbatches,
        _num_stages=pp,
        _stage=stage,
        scale_grads=False,
        _check_inputs=lambda *_: (microbatches, microbatches),
        _initialize_stage=nothing,
        _maybe_compute_loss=nothing,
        _maybe_get_loss=nothing,
        _update_losses=nothing,
    )
    schedule_class._step_microbatches(schedule)
    return " ".join(computes)


def read_csv(path) -> list[list[str]]:
    """The actions of a file as torch reads them, back in torch's text form."""
    with open(path, newline="") as file:
        return [
            [str(torch_schedules._Action.from_str(cell)) for cell in row]
            for row in csv.reader(file)
        ]


def validate(path, *, pp: int, num_stages: int, num_microbatches: int) -> dict[int, int]:
    """Run torch's check of a compute-only file; returns the rank of each stage."""
    with open(path, newline="") as file:
        rows = dict(enumerate(csv.reader(file)))
    actions = {
        rank: [torch_schedules._Action.from_str(cell) for cell in row] for rank, row in rows.items()
    }
    return torch_schedules._validate_schedule(actions, pp, num_stages, num_microbatches)
