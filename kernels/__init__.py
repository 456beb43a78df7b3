"""Fused ops of ilm_compile: a schema and a torch reference for each. They know nothing of graphs.

Importing this package registers the ops under `torch.ops.ilm`.
"""

from ilm_compile.kernels.attention import attention as attention
from ilm_compile.kernels.attention import document_starts as document_starts
