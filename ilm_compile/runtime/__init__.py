"""Runs a lowered program: processes, weights, schedule, training loop, data and metrics."""

from ilm_compile.runtime.data import BatchIterator as BatchIterator
from ilm_compile.runtime.data import ByteTokenizer as ByteTokenizer
from ilm_compile.runtime.data import PackedText as PackedText
from ilm_compile.runtime.data import documents_from_files as documents_from_files
from ilm_compile.runtime.data import documents_from_pydoc as documents_from_pydoc
from ilm_compile.runtime.data import pack_documents as pack_documents
from ilm_compile.runtime.hooks import Hook as Hook
from ilm_compile.runtime.mesh import Mesh as Mesh
from ilm_compile.runtime.metrics import MetricsWriter as MetricsWriter
from ilm_compile.runtime.metrics import Progress as Progress
from ilm_compile.runtime.metrics import StepMetrics as StepMetrics
from ilm_compile.runtime.optimizer import Beta2Scheduler as Beta2Scheduler
from ilm_compile.runtime.optimizer import LossScaler as LossScaler
from ilm_compile.runtime.optimizer import adamw as adamw
from ilm_compile.runtime.optimizer import lr_schedule as lr_schedule
from ilm_compile.runtime.parallel import Parallel as Parallel
from ilm_compile.runtime.trainer import Trainer as Trainer
