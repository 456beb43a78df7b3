"""Compiler-style graph partitioning for training language models."""

from ilm_compile import models as models
from ilm_compile import passes as passes
from ilm_compile.config import Config as Config
from ilm_compile.config import ConfigError as ConfigError
from ilm_compile.config import load_config as load_config
from ilm_compile.config import make_config as make_config
from ilm_compile.errors import BatchError as BatchError
from ilm_compile.errors import IlmCompileError as IlmCompileError
from ilm_compile.errors import PlacementError as PlacementError
from ilm_compile.errors import PlanError as PlanError
from ilm_compile.errors import ProgramError as ProgramError
from ilm_compile.errors import ScheduleError as ScheduleError
from ilm_compile.errors import TraceError as TraceError
from ilm_compile.errors import VerificationError as VerificationError
from ilm_compile.internevo.known import make_known
from ilm_compile.models import MODEL_INITIALIZER as MODEL_INITIALIZER
from ilm_compile.partitioning import compile as compile
from ilm_compile.partitioning import make_plan as make_plan
from ilm_compile.partitioning import parallelize as parallelize
from ilm_compile.partitioning import partition as partition
from ilm_compile.planner import expect as expect
from ilm_compile.planner import search as search
from ilm_compile.planner import simulate_step as simulate_step
from ilm_compile.program.plan import Plan as Plan
from ilm_compile.program.program import Program as Program
from ilm_compile.program.trace import trace as trace
from ilm_compile.prove import verify as verify
from ilm_compile.runtime import Parallel as Parallel
from ilm_compile.runtime import Trainer as Trainer
from ilm_compile.training import ParallelMode as ParallelMode
from ilm_compile.training import ProcessGroups as ProcessGroups
from ilm_compile.training import StartError as StartError
from ilm_compile.training import check_start as check_start
from ilm_compile.training import config_from_arguments as config_from_arguments
from ilm_compile.training import get_default_parser as get_default_parser
from ilm_compile.training import get_train_data_loader as get_train_data_loader
from ilm_compile.training import initialize_model as initialize_model
from ilm_compile.training import initialize_optimizer as initialize_optimizer
from ilm_compile.training import initialize_trainer as initialize_trainer
from ilm_compile.training import train as train

make_known()
__version__ = "0.2.0"
