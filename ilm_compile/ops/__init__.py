"""What is known of an op: where its values may lie, and what the other rooms ask of it."""

from ilm_compile.ops import collectives as _collectives  # noqa: F401 - fill the table
from ilm_compile.ops import convolutions as _convolutions  # noqa: F401
from ilm_compile.ops import experts as _experts  # noqa: F401
from ilm_compile.ops import fused as _fused  # noqa: F401
from ilm_compile.ops import scatter as _scatter  # noqa: F401
from ilm_compile.ops.localize import localize as localize
from ilm_compile.ops.strategy import RULES as RULES
from ilm_compile.ops.strategy import Call as Call
from ilm_compile.ops.strategy import Strategy as Strategy
from ilm_compile.ops.strategy import rule as rule
from ilm_compile.ops.strategy import strategies as strategies
