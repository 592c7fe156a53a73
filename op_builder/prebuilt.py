"""The libraries that came compiled with the package."""

from __future__ import annotations

from pathlib import Path


def installed_libraries() -> dict[str, Path]:
    """Libraries of the wheel that this package was installed from, by the op's name in the table."""
    return {path.stem: path for path in (Path(__file__).parent.parent / "lib").glob("*.so")}
