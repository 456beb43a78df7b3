"""AdamW, what changes its numbers over the steps, and the loss scale of float16."""

from ilm_compile.runtime.optimizer.adamw import adamw as adamw
from ilm_compile.runtime.optimizer.loss_scaler import LossScaler as LossScaler
from ilm_compile.runtime.optimizer.schedules import Beta2Scheduler as Beta2Scheduler
from ilm_compile.runtime.optimizer.schedules import lr_schedule as lr_schedule
