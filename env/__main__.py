"""`python -m env`."""

import sys

try:
    from env.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"python -m env: {sys.executable} has no {error.name}: make venv-dev, then . .venv/bin/activate")

sys.exit(main())
