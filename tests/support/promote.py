"""Float64 runs of Hugging Face models, under the name the tests use."""

from ilm_compile.proof.promote import promoted_float32 as promoted_float32
from ilm_compile.proof.promote import to_float64 as to_float64
