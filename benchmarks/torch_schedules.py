"""What torch.distributed.pipelining makes of a schedule that is given to it as a CSV file.

Its loader is private, so a new torch may break this file; it then fails loudly, here only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch.distributed.pipelining import schedules as torch_schedules

from ilm_compile.schedule import Schedule


def refusal(schedule: Schedule) -> str | None:
    """Return why torch refuses to load `schedule` with its sends and receives, None if it does not.

    The instance has what the loader reads, and no stages or processes behind it.
    """
    runtime = object.__new__(torch_schedules._PipelineScheduleRuntime)
    runtime.pp_group_size = schedule.num_ranks
    runtime._num_stages = schedule.num_stages
    runtime._n_microbatches = schedule.num_microbatches
    runtime._stages = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.csv"
        schedule.to_csv(path)
        try:
            runtime._load_csv(str(path), format="compute_comms")
        except (AssertionError, ValueError, RuntimeError) as error:
            return str(error).splitlines()[0]
    return None
