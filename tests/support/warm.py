"""What ranks of a world do sooner or later, for the server that they are forked from.

Imports, and what torch.export and our passes make at their first use.
"""

from contextlib import suppress

import pytest  # noqa: F401
import torch
import torch._dynamo
import torch._export
import torch.distributed.checkpoint
import torch.distributed.tensor

import ilm_compile
import ilm_compile.training
from tests.support.garbage import collect_rarely

torch.set_num_threads(1)
ilm_compile.partition(ilm_compile.models.internlm2_tiny(num_layers=2, max_seq_len=16), tp=2)
with suppress(ImportError):
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401
collect_rarely()
