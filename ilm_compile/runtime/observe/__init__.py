"""Watches a training: logger, monitor, profiler, memory and timeline, all of them hooks."""

from ilm_compile.runtime.observe.logger import Logger as Logger
from ilm_compile.runtime.observe.memory import MemoryBreakdown as MemoryBreakdown
from ilm_compile.runtime.observe.monitor import Monitor as Monitor
from ilm_compile.runtime.observe.profiler import Profiler as Profiler
from ilm_compile.runtime.observe.recorders import Recorder as Recorder
from ilm_compile.runtime.observe.recorders import WeightsAndBiases as WeightsAndBiases
from ilm_compile.runtime.observe.sinks import Command as Command
from ilm_compile.runtime.observe.sinks import Webhook as Webhook
from ilm_compile.runtime.observe.timeline import PipelineTimeline as PipelineTimeline
