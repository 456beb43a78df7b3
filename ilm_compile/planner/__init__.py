"""Which plan: the candidates for a model and a machine, ranked by predicted time, and why."""

from ilm_compile.planner.candidate import Candidate as Candidate
from ilm_compile.planner.expected import Expected as Expected
from ilm_compile.planner.expected import expect as expect
from ilm_compile.planner.search import Search as Search
from ilm_compile.planner.search import search as search
from ilm_compile.planner.simulated import SimulatedStep as SimulatedStep
from ilm_compile.planner.simulated import simulate_step as simulate_step
from ilm_compile.planner.space import Question as Question
from ilm_compile.planner.space import Rejected as Rejected
