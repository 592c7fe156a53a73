"""`python -m deepspeedlite.env_report`."""

import sys

from deepspeedlite.env_report.report import main

sys.exit(main())
