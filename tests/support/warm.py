"""What ranks of a world import sooner or later, for the server that they are forked from."""

from contextlib import suppress

import pytest  # noqa: F401
import torch._dynamo
import torch._export
import torch.distributed.checkpoint
import torch.distributed.tensor  # noqa: F401

import ilm_compile.training  # noqa: F401

with suppress(ImportError):
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401
