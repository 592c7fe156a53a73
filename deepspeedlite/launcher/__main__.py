"""`python -m deepspeedlite.launcher` is the `deepspeedlite` command."""

import sys

from deepspeedlite.launcher.cli import main

sys.exit(main())
