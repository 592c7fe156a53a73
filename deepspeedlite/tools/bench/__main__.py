"""`python -m deepspeedlite.bench` is the `dslite_bench` command, and what its ranks run."""

import sys

from deepspeedlite.tools.bench.cli import main

sys.exit(main())
