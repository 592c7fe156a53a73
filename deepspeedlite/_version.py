"""The one place that states the version; read by pyproject.toml and by `deepspeedlite.__version__`."""

__version__ = "0.1.0"
