"""The images' environments (a YAML file each), and the tool that builds, tests and starts images: `python -m env`.

A part of the repository, not of the package: it works from a checkout. docs/images.md is its guide.
"""
