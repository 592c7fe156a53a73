"""Build entry point. Metadata lives in pyproject.toml; compiled ops are added here as they arrive."""

from setuptools import setup

setup()
