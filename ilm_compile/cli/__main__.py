"""`python -m ilm_compile.cli`: the command `ilm-compile`, in a form that torchrun can start."""

import sys

from ilm_compile.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
