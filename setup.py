"""Build entry point: the metadata is pyproject.toml's; here are the version and the ops that DS_BUILD_* ask for.

See docs/ops.md for the variables. Of the package the table of ops alone is imported; it needs nothing, torch neither.
"""

import os
import re
import sys
from pathlib import Path

import setuptools

# Said here for builds without isolation, which take the environment's own whatever pyproject.toml asks for.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"error: setuptools {setuptools.__version__} is too old; pip install 'setuptools>=77'")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from deepspeedlite.ops.op_builder import OpBuildError, wheel  # noqa: E402

# The release's; see wheel.version for what may follow it.
base = re.search(r'__version__ = "(.+)"', (HERE / "deepspeedlite" / "_version.py").read_text())[1]
try:
    setuptools.setup(
        version=wheel.version(base, os.environ),
        ext_modules=wheel.extensions(os.environ),
        cmdclass={"build_ext": wheel.BuildOps, "bdist_wheel": wheel.OpsWheel},
    )
except OpBuildError as error:
    sys.exit(f"error: {error}")
