"""Pytest's set-up for all tests: what they import from (helpers/paths.py), and the end of the rank workers.

Ranks are started by `harness.distributed`; see its docstring. `from harness import distributed` is how tests use it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
from paths import put_on_path

put_on_path()
pytest_plugins = ["sessions", "shared_fixtures"]

try:
    import hypothesis
except ImportError:  # in the environments of clients, where no test needs it
    pass
else:
    # What takes 200 ms alone may take a second beside other sessions, or measured by `make coverage`.
    # What it keeps between runs lies with the environment: tests leave nothing in the checkout.
    hypothesis.configuration.set_hypothesis_home_dir(Path(sys.prefix, ".hypothesis"))
    hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.load_profile("busy")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`slow_unless`: of a large matrix, the cases that have none of the named values are slow."""
    for item in items:
        for mark in item.iter_markers("slow_unless"):
            for name, values in mark.kwargs.items():
                quick = values if isinstance(values, tuple) else (values,)
                if item.callspec.params[name] not in quick:  # type: ignore[attr-defined]
                    item.add_marker(pytest.mark.slow)


def pytest_sessionfinish() -> None:
    """Leave no worker process behind, whether the session passed, failed or was interrupted."""
    harness = sys.modules.get("harness")
    if harness is not None:
        harness.close_pool()
