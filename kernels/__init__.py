"""Fused ops of ilm_compile: a schema and a torch reference for each. They know nothing of graphs.

Importing this package registers the ops under `torch.ops.ilm`.
"""

from ilm_compile.kernels.add_rms_norm import add_rms_norm as add_rms_norm
from ilm_compile.kernels.attention import attention as attention
from ilm_compile.kernels.attention_backends import set_attention_backend as set_attention_backend
from ilm_compile.kernels.attention_order import set_flash_attention as set_flash_attention
from ilm_compile.kernels.documents import document_starts as document_starts
from ilm_compile.kernels.glu import glu as glu
from ilm_compile.kernels.grouped_product import grouped_product as grouped_product
from ilm_compile.kernels.layer_norm import MAX_CENTERED as MAX_CENTERED
from ilm_compile.kernels.layer_norm import add_layer_norm as add_layer_norm
from ilm_compile.kernels.layer_norm import layer_norm as layer_norm
from ilm_compile.kernels.qkv_rotary import qkv_rotary as qkv_rotary
from ilm_compile.kernels.rms_norm import MAX_HIDDEN as MAX_HIDDEN
from ilm_compile.kernels.rms_norm import rms_norm as rms_norm
from ilm_compile.kernels.rotary import rotary as rotary
from ilm_compile.kernels.vocab_loss import (
    vocab_cross_entropy_backward as vocab_cross_entropy_backward,
)
from ilm_compile.kernels.vocab_loss import vocab_statistics as vocab_statistics
