"""How often Python looks for garbage in processes that trace and compile."""

import gc


def collect_rarely() -> None:
    """Leave out of all collections what is in memory now, and begin them later.

    An import of torch leaves 400,000 objects. Looking through them took an eighth of the time of a
    proof, and two fifths of a forked rank, in which each look copies the pages that hold them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
