"""The command `ilm-compile`, each subcommand in a file of its own, thin over the Python API."""

from ilm_compile.cli.entry import main as main
