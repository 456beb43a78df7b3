"""Sharding: placement rules per op, the search over them and the check by them."""

from ilm_compile.sharding import other_axes as _other_axes  # noqa: F401 - fill the table
from ilm_compile.sharding import rules_attention as _rules_attention  # noqa: F401
from ilm_compile.sharding import rules_convolution as _rules_convolution  # noqa: F401
from ilm_compile.sharding import rules_experts as _rules_experts  # noqa: F401
from ilm_compile.sharding import rules_fused as _rules_fused  # noqa: F401
from ilm_compile.sharding import rules_math as _rules_math  # noqa: F401
from ilm_compile.sharding import rules_model as _rules_model  # noqa: F401
from ilm_compile.sharding import rules_products as _rules_products  # noqa: F401
from ilm_compile.sharding import rules_scatter as _rules_scatter  # noqa: F401
from ilm_compile.sharding import rules_select as _rules_select  # noqa: F401
from ilm_compile.sharding import rules_views as _rules_views  # noqa: F401
from ilm_compile.sharding.check import check_placements as check_placements
from ilm_compile.sharding.solver import Solution as Solution
from ilm_compile.sharding.solver import solve as solve
from ilm_compile.sharding.strategy import RULES as RULES
from ilm_compile.sharding.strategy import Call as Call
from ilm_compile.sharding.strategy import Strategy as Strategy
from ilm_compile.sharding.strategy import rule as rule
from ilm_compile.sharding.strategy import strategies as strategies
from ilm_compile.sharding.transitions import Restrictions as Restrictions
