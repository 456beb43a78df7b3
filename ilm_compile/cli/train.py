"""Train a model from a config file: TOML, or a Python-style file of InternEvo.

On a laptop, and with several processes under torchrun or srun:
  ilm-compile train --config examples/configs/tiny_cpu.toml --set parallel.tensor=1
  torchrun --nproc-per-node 2 -m ilm_compile.cli train --config examples/configs/tiny_cpu.toml
  srun -n 16 ilm-compile train --config 7B_sft.py --launcher slurm
A run that is started again goes on from its newest checkpoint, under any plan.
"""

import argparse

from ilm_compile.cli.turns import first_of_node_speaks
from ilm_compile.training import config_from_arguments, train
from ilm_compile.training.notices import tell_notices
from ilm_compile.training.parser import add_arguments as add_arguments


def run(options: argparse.Namespace) -> None:
    """Check, train, and say how it ended."""
    with first_of_node_speaks():
        config = config_from_arguments(options)
        tell_notices(config)
        trainer = train(config)
    if trainer.parallel.mesh.rank == 0:
        how = f"stopped ({trainer.stop_reason})" if trainer.stop_reason else "finished"
        print(
            f"{how} after step {trainer.num_steps} of {config.train.total_steps}; see "
            f"{config.run_folder}"
        )
