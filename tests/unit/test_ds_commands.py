"""DeepSpeed's commands, as its users type them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from programs import needs

from deepspeedlite.compat import commands


def test_ds_report_hides_the_ops(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(commands.env_report, "main", lambda argv: asked.append(argv) or 0)
    assert commands.report(["--hide_operator_status", "--json"]) == 0
    assert asked[0][0] == "--json" and "torch" in asked[0] and "ops" not in asked[0]
    assert commands.report(["--hide_errors_and_warnings"]) == 0 and asked[1] == []


@pytest.mark.slow
@needs("c++")
def test_ds_io_measures_as_it_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed's options; those of dslite_io go to it as they are."""
    where = ["--folder", str(tmp_path), "--io_size", "2M", "--block_size", "256K", "--queue_depth", "4", "--loops", "1"]
    assert commands.io([*where, "--read", "--single_submit", "--io_parallel", "2"]) == 0
    assert "256 KiB, 4 under way" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        commands.io(["bench", "--no-such-option"])
    assert "dslite_io: error: unrecognized arguments: --no-such-option" in capfd.readouterr().err


def test_ds_nvme_tune_tunes_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(commands.io_tune, "main", lambda argv: asked.append(argv) or len(asked) - 1)
    assert commands.nvme_tune(["--nvme_dir", "a", "b", "c", "--io_size", "1M"]) == 1  # b failed, c was not tried
    assert [argv[2] for argv in asked] == ["a", "b"] and asked[0][3:5] == ["--size", "1M"]
