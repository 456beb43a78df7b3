"""Evaluate a checkpoint of a run on the validation sets of its config.

  ilm-compile evaluate --config run.toml
  ilm-compile evaluate --config run.toml --checkpoint runs/job/checkpoints/step-00000100
  torchrun --nproc-per-node 2 -m ilm_compile.cli evaluate --config run.toml \\
      --set parallel.tensor=2 --json metrics.json
It prints what training logs at that step, under any plan: loss, perplexity, accuracy and the number
of targets of each set. It takes the newest sound checkpoint and writes nothing into the run.
"""

import argparse
import json
import math
from pathlib import Path

from ilm_compile.cli.turns import first_of_node_speaks
from ilm_compile.files import write_text
from ilm_compile.training import StartError
from ilm_compile.training.evaluation_run import EvaluatedRun, evaluate_run
from ilm_compile.training.launch import read_place
from ilm_compile.training.notices import tell_notices
from ilm_compile.training.parser import add_config_arguments, config_from_arguments
from ilm_compile.training.preflight import unwritable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="folder or URL of one; the newest sound one of the run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the metrics too")


def run(options: argparse.Namespace) -> None:
    """Check, load, evaluate; rank 0 tells."""
    with first_of_node_speaks():
        config = config_from_arguments(options)
        if options.json is not None:
            _check_target(options.json)
        tell_notices(config)
        evaluated = evaluate_run(config, options.checkpoint)
    if read_place().rank == 0:
        print(_table(evaluated))
        if options.json is not None:
            write_text(options.json, _json(evaluated))


def _check_target(path: Path) -> None:
    problem = f"{path} is a folder" if path.is_dir() else unwritable(path.parent)
    if problem:
        raise StartError(f"--json: expected a file that can be written, {problem}")


def _table(evaluated: EvaluatedRun) -> str:
    width = max(len(name) for name in evaluated.sets)
    lines = [f"after step {evaluated.step}, {evaluated.checkpoint}"]
    for name, values in evaluated.sets.items():
        lines.append(
            f"{name:<{width}}  loss {values['loss']:.6g}  perplexity {values['perplexity']:.6g}  "
            f"accuracy {values['accuracy']:.4f}  num_tokens {values['num_tokens']}"
        )
    return "\n".join(lines)


def _json(evaluated: EvaluatedRun) -> str:
    """JSON has no numbers that are not finite: they are null, as in metrics.jsonl."""
    sets = {
        name: {key: value if math.isfinite(value) else None for key, value in values.items()}
        for name, values in evaluated.sets.items()
    }
    found = {"checkpoint": evaluated.checkpoint, "step": evaluated.step, "sets": sets}
    return json.dumps(found, indent=2) + "\n"
