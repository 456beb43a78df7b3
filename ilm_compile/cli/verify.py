"""Prove, before launch and in this one process, that a plan trains the same model.

Exit code 1 if it does not: ilm-compile verify internlm2_7b --tp 8 --pp 4 --dp 2
"""

import argparse

from ilm_compile.cli.inputs import add_input_arguments, read_inputs
from ilm_compile.cli.model import add_model_argument, load_model
from ilm_compile.cli.plan import add_plan_arguments, read_plan
from ilm_compile.errors import VerificationError
from ilm_compile.prove import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_argument(parser)
    add_input_arguments(parser)
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="data-parallel ranks (1)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_plan_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Verify and print the report. Raises `VerificationError` if it failed."""
    report = verify(
        load_model(options.model),
        example_inputs=read_inputs(options),
        plan=read_plan(options),
        dp=options.dp,
    )
    print(report.to_json() if options.json else report)
    if not report.ok:
        failed = [check.name for check in report.checks if not check.ok]
        raise VerificationError(f"{report.title}: {', '.join(failed)} failed")
