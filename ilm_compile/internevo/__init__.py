"""The calls of InternEvo's training script, as they are written there, over ours.

    import ilm_compile.internevo as internlm

    arguments = internlm.initialize.get_default_parser().parse_args()
    internlm.initialize.initialize_distributed_env(
        config=arguments.config, launcher=arguments.launcher, seed=arguments.seed
    )
    model = internlm.train.initialize_model()
    optimizer, beta2_scheduler, lr_scheduler = internlm.train.initialize_optimizer(model)
    train_dl, dataset_types = internlm.train.get_train_data_loader(num_worker=4)
    trainer, train_dl, _, _ = internlm.initialize.initialize_trainer(
        model=model, optimizer=optimizer, train_dataloader=train_dl, lr_scheduler=lr_scheduler,
        beta2_scheduler=beta2_scheduler,
    )

The config is of the process, as there. Without it `ilm_compile`'s own functions take one each.
"""

from ilm_compile.internevo import initialize as initialize
from ilm_compile.internevo import train as train
from ilm_compile.internevo.trainer import Trainer as Trainer
from ilm_compile.models.registry import MODEL_INITIALIZER as MODEL_INITIALIZER
