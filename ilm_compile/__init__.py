"""Compiler-style graph partitioning for training language models."""

from ilm_compile import models as models
from ilm_compile import passes as passes
from ilm_compile.compile import make_plan as make_plan
from ilm_compile.compile import parallelize as parallelize
from ilm_compile.compile import partition as partition
from ilm_compile.errors import BatchError as BatchError
from ilm_compile.errors import IlmCompileError as IlmCompileError
from ilm_compile.errors import PlacementError as PlacementError
from ilm_compile.errors import PlanError as PlanError
from ilm_compile.errors import ProgramError as ProgramError
from ilm_compile.errors import ScheduleError as ScheduleError
from ilm_compile.errors import TraceError as TraceError
from ilm_compile.errors import VerificationError as VerificationError
from ilm_compile.program.plan import Plan as Plan
from ilm_compile.program.program import Program as Program
from ilm_compile.prove import verify as verify
from ilm_compile.runtime import Parallel as Parallel
from ilm_compile.runtime import Trainer as Trainer

__version__ = "0.1.0"
