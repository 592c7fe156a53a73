"""Every fault of helpers/planted.py, planted for real, is named by the report with its remedy, within 10 s."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from paths import ROOT
from planted import PLANTS, Plant, report


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.fault)
def test_the_report_names_it_with_its_remedy(plant: Plant) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to plant faults in namespaces")
    with tempfile.TemporaryDirectory(prefix="dsl-") as folder:  # not pytest's, which other users may not enter
        found = report(plant, Path(folder))
    if found.lacking.startswith("needs "):
        pytest.skip(found.lacking)
    assert found.rows, found.lacking
    assert found.cpu_s < 10  # of a processor: how long it takes depends on what else runs


def test_text_beyond_ascii_is_shown_somehow_in_any_locale(tmp_path: Path) -> None:
    (tmp_path / "Zürich").mkdir()
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "DSL_TEXT": "Zürich"}
    command = [sys.executable, "-m", "deepspeedlite.env_report", "--path", tmp_path / "Zürich"]
    done = subprocess.run(
        [*command, "--only", "disk", "--only", "variables"], capture_output=True, cwd=ROOT, env=env, timeout=60
    )
    assert done.returncode == 0 and b"free of" in done.stdout and b"rich" in done.stdout, done.stderr
