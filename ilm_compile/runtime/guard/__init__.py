"""The guard of a job: what its processes do when one hangs, ends badly or loses its launcher.

Import from its modules: `activity` is told by the executor, which the others come after.
"""
