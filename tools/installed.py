"""Exit 0 when this Python has the package that a specifier such as `torch>=2.10` asks for, else 1.

pip's own copy of `packaging` reads the specifier, since a fresh environment has nothing else.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

from pip._vendor.packaging.requirements import InvalidRequirement, Requirement

try:
    requirement = Requirement(sys.argv[1])
    found = requirement.specifier.contains(version(requirement.name), prereleases=True)
except (PackageNotFoundError, InvalidRequirement):  # what is no name, such as a path, is for pip to install
    found = False
sys.exit(not found)
