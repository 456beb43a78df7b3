"""Training from a config: the functions of InternLM's training page, joined over the compiler.

    config = load_config("examples/configs/tiny_cpu.toml")
    parallel = initialize_model(config)
    optimizer, beta2_scheduler, lr_scheduler = initialize_optimizer(config, parallel)
    batches = get_train_data_loader(config)
    trainer = initialize_trainer(config, parallel, optimizer, lr_scheduler=lr_scheduler)

or all of it, with logger, monitor, profiler and checkpoints: `train(config)`.
"""

from ilm_compile.training.checkpoints import initialize_checkpoints as initialize_checkpoints
from ilm_compile.training.data import get_train_data_loader as get_train_data_loader
from ilm_compile.training.data import get_validation_data_loaders as get_validation_data_loaders
from ilm_compile.training.groups import ParallelMode as ParallelMode
from ilm_compile.training.groups import ProcessGroups as ProcessGroups
from ilm_compile.training.launch import launch_from_slurm as launch_from_slurm
from ilm_compile.training.model import build_model as build_model
from ilm_compile.training.model import initialize_model as initialize_model
from ilm_compile.training.optimizer import initialize_optimizer as initialize_optimizer
from ilm_compile.training.parser import config_from_arguments as config_from_arguments
from ilm_compile.training.parser import get_default_parser as get_default_parser
from ilm_compile.training.preflight import StartError as StartError
from ilm_compile.training.preflight import check_start as check_start
from ilm_compile.training.trainer import initialize_trainer as initialize_trainer
from ilm_compile.training.trainer import train as train
