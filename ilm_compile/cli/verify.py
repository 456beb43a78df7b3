"""Prove, before launch and in this one process, that a plan trains the same model.

Exit code 1 if it does not: ilm-compile verify internlm2_7b --tp 8 --pp 4 --dp 2
Of a config, the plan that is in it: ilm-compile verify examples/configs/internlm2_20b.toml
"""

import argparse

from ilm_compile.cli.job import add_job_arguments, read_job
from ilm_compile.errors import VerificationError
from ilm_compile.prove import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_job_arguments(parser)
    parser.add_argument(
        "--dp", type=int, metavar="N", help="data-parallel ranks (the plan's, or 1)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> None:
    """Verify and print the report. Raises `VerificationError` if it failed."""
    job = read_job(options)
    report = verify(
        job.model,
        example_inputs=job.example_inputs,
        loss_fn=job.loss_fn,
        plan=job.plan,
        dp=options.dp,
    )
    print(report.to_json() if options.json else report)
    if not report.ok:
        failed = [check.name for check in report.checks if not check.ok]
        raise VerificationError(f"{report.title}: {', '.join(failed)} failed")
