"""Sharding: the search over the placement rules of ops, and the check by them."""

from ilm_compile.ops import Call as Call
from ilm_compile.ops import Strategy as Strategy
from ilm_compile.ops import rule as rule
from ilm_compile.ops import strategies as strategies
from ilm_compile.sharding.check import check_placements as check_placements
from ilm_compile.sharding.solver import Solution as Solution
from ilm_compile.sharding.solver import solve as solve
from ilm_compile.sharding.transitions import Restrictions as Restrictions
