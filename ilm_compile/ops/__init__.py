"""What is known of an op: where its values may lie, and what the other rooms ask of it."""

from ilm_compile.ops import attention as _attention  # noqa: F401 - fill the table
from ilm_compile.ops import collectives as _collectives  # noqa: F401
from ilm_compile.ops import convolutions as _convolutions  # noqa: F401
from ilm_compile.ops import experts as _experts  # noqa: F401
from ilm_compile.ops import lookups as _lookups  # noqa: F401
from ilm_compile.ops import losses as _losses  # noqa: F401
from ilm_compile.ops import ring_products as _ring_products  # noqa: F401
from ilm_compile.ops import scatter as _scatter  # noqa: F401
from ilm_compile.ops.call import Call as Call
from ilm_compile.ops.call import Strategy as Strategy
from ilm_compile.ops.precision import Precision as Precision
from ilm_compile.ops.products import product_from as product_from
from ilm_compile.ops.spec import Flops as Flops
from ilm_compile.ops.spec import OpSpec as OpSpec
from ilm_compile.ops.spec import define as define
from ilm_compile.ops.spec import rule as rule
from ilm_compile.ops.spec import spec_of as spec_of
from ilm_compile.ops.strategy import strategies as strategies
