"""Monitors: real CSV files, TensorBoard event files read back, and offline W&B runs."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from deepspeedlite.config import load_config
from deepspeedlite.metrics.monitor.csv_files import MAX_OPEN_FILES, CsvWriter, file_stem
from deepspeedlite.monitor import Monitor
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError

LOSS, LR = "Train/Samples/train_loss", "Train/Samples/lr"


def section(folder: Path, job_name: str = "job", enabled: bool = True) -> SimpleNamespace:
    return SimpleNamespace(enabled=enabled, output_path=str(folder), job_name=job_name)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package} (pip install {package})")


# --- CSV


def test_csv_one_file_per_tag(tmp_path: Path) -> None:
    with Monitor(csv_monitor=section(tmp_path)) as monitor:
        assert monitor.enabled
        monitor.write_events([(LOSS, 1.5, 8), (LR, 1e-3, 8)])
        monitor.write_events([(LOSS, torch.tensor(0.1, dtype=torch.float64), 16)])
    assert sorted(file.name for file in (tmp_path / "job").iterdir()) == [
        "Train_Samples_lr.csv",
        "Train_Samples_train_loss.csv",
    ]
    assert rows(tmp_path / "job/Train_Samples_train_loss.csv") == [["step", "train_loss"], ["8", "1.5"], ["16", "0.1"]]
    assert rows(tmp_path / "job/Train_Samples_lr.csv") == [["step", "lr"], ["8", "0.001"]]


def test_csv_resume_appends_without_second_header(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        with Monitor(csv_monitor=section(tmp_path)) as monitor:
            monitor.write_events([(LR, step / 10, step)])
    assert rows(tmp_path / "job/Train_Samples_lr.csv") == [["step", "lr"], ["1", "0.1"], ["2", "0.2"], ["3", "0.3"]]


@pytest.mark.parametrize(("left", "kept"), [("step,lr\n1,0.5\n2,0.", [["1", "0.5"]]), ("step,l", [])])
def test_csv_removes_a_row_cut_short_by_a_crash(tmp_path: Path, left: str, kept: list[list[str]]) -> None:
    path = tmp_path / "job/Train_Samples_lr.csv"
    path.parent.mkdir()
    path.write_text(left)
    with Monitor(csv_monitor=section(tmp_path)) as monitor:
        monitor.write_events([(LR, 0.25, 2)])
    assert rows(path) == [["step", "lr"], *kept, ["2", "0.25"]]


@pytest.mark.slow
def test_csv_survives_sigkill(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from types import SimpleNamespace\n"
        "from deepspeedlite.monitor import Monitor\n"
        f"m = Monitor(csv_monitor=SimpleNamespace(enabled=True, output_path={str(tmp_path)!r}, job_name='job'))\n"
        f"for step in range(5): m.write_events([({LOSS!r}, step, step)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(ROOT)
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = rows(tmp_path / "job/Train_Samples_train_loss.csv")
    assert written == [["step", "train_loss"], *([str(step), f"{step}.0"] for step in range(5))]


@settings(max_examples=60, deadline=None)
@given(tags=st.lists(st.text(max_size=150), unique=True, min_size=1, max_size=5))
def test_csv_any_tags_stay_apart_and_inside_the_folder(
    tmp_path_factory: pytest.TempPathFactory, tags: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    writer = CsvWriter(section(folder))
    tags = [tag.encode("utf-8", "replace").decode() for tag in tags]  # a lone surrogate is no tag
    writer.write([(tag, float(number), 1) for number, tag in enumerate(dict.fromkeys(tags))])
    writer.close()
    files = list((folder / "job").iterdir())
    assert len(files) == len(set(tags))
    assert sorted(float(rows(file)[-1][1]) for file in files) == [float(n) for n in range(len(set(tags)))]
    assert [path.name for path in folder.iterdir()] == ["job"]


def test_csv_file_names() -> None:
    assert file_stem(LOSS) == "Train_Samples_train_loss"
    assert file_stem("../../etc/passwd") == ".._.._etc_passwd"
    assert file_stem("a b:c") == "a_b_c"
    assert len(file_stem("x" * 500)) < 120


def test_csv_tags_that_share_a_name(tmp_path: Path) -> None:
    with Monitor(csv_monitor=section(tmp_path)) as monitor:
        monitor.write_events([("a/b", 1, 1), ("a_b", 2, 1), ("a/b", 3, 2)])
    assert rows(tmp_path / "job/a_b.csv") == [["step", "b"], ["1", "1.0"], ["2", "3.0"]]
    assert len(list((tmp_path / "job").iterdir())) == 2


def test_csv_more_tags_than_open_files(tmp_path: Path) -> None:
    writer = CsvWriter(section(tmp_path))
    tags = [f"tag{number}" for number in range(MAX_OPEN_FILES + 10)]
    for step in (1, 2):
        writer.write([(tag, 0.0, step) for tag in tags])
        assert len(writer._files) <= MAX_OPEN_FILES
    writer.close()
    assert all(len(rows(tmp_path / f"job/{tag}.csv")) == 3 for tag in tags)


# --- Comet


class Experiment:
    """What `comet_ml.start` returns, as far as a monitor calls it."""

    def __init__(self, **options: object) -> None:
        self.options, self.name, self.logged, self.ended = options, "", [], False

    def set_name(self, name: str) -> None:
        self.name = name

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        self.logged.append((name, value, step))

    def end(self) -> None:
        self.ended = True


def test_comet_gets_a_point_of_each_metric_every_so_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Experiment] = []
    start = lambda **options: started.append(Experiment(**options)) or started[-1]  # noqa: E731
    monkeypatch.setitem(sys.modules, "comet_ml", SimpleNamespace(start=start))
    given = {"project": "digits", "workspace": "lab", "api_key": "k", "online": False, "mode": "create"}
    config = load_config({"comet": {"enabled": True, "samples_log_interval": 20, "experiment_name": "first", **given}})
    with Monitor(comet=config.comet) as monitor:
        for step in (8, 16, 24, 32, 40, 48):
            monitor.write_events([(LOSS, step / 8, step), (LR, 1e-3, step)])
    (experiment,) = started
    assert experiment.options == {**given, "experiment_key": None} and experiment.name == "first" and experiment.ended
    assert [step for name, _, step in experiment.logged if name == LOSS] == [8, 32]
    assert [value for name, value, _ in experiment.logged if name == LOSS] == [1.0, 4.0]
    assert len(experiment.logged) == 4


def test_comet_that_cannot_start_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**options: object) -> None:
        raise ValueError("Comet.ml requires an API key")

    config = load_config({"comet": {"enabled": True}})
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ConfigError, match="pip install comet_ml"):
        Monitor(comet=config.comet)
    monkeypatch.setitem(sys.modules, "comet_ml", SimpleNamespace(start=start))
    with pytest.raises(ConfigError, match=r"requires an API key.*COMET_API_KEY"):
        Monitor(comet=config.comet)
    Monitor(rank=1, comet=config.comet).close()


# --- the monitor itself


def test_values_of_every_kind(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.tensor([[2.5]], dtype=torch.bfloat16))
    values = [1, True, math.nan, torch.tensor(math.inf), weight, torch.tensor(7), torch.tensor([0.5]).numpy()[0]]
    with Monitor(csv_monitor=section(tmp_path)) as monitor:
        monitor.write_events([("v", value, step) for step, value in enumerate(values)])
    read = [float(row[1]) for row in rows(tmp_path / "job/v.csv")[1:]]
    assert math.isnan(read.pop(2))
    assert read == [1.0, 1.0, math.inf, 2.5, 7.0, 0.5]


@pytest.mark.parametrize("value", [torch.ones(2), "high", None])
def test_a_value_that_is_no_number_is_named(tmp_path: Path, value: object) -> None:
    with Monitor(csv_monitor=section(tmp_path)) as monitor, pytest.raises(UnsupportedError, match="'Train/x'"):
        monitor.write_events([("Train/x", value, 1)])  # type: ignore[list-item]


def test_other_ranks_and_disabled_sections_touch_nothing(tmp_path: Path) -> None:
    on, off = section(tmp_path / "on"), section(tmp_path / "off", enabled=False)
    wandb = SimpleNamespace(enabled=True, group=None, team=None, project="p")
    for monitor in (
        Monitor(tensorboard=on, wandb=wandb, csv_monitor=on, rank=1),
        Monitor(tensorboard=off, wandb=None, csv_monitor=off),
        Monitor(),
    ):
        assert not monitor.enabled
        monitor.write_events([("Train/x", 1.0, 1)])
        monitor.flush()
        monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_close_disables_and_may_be_repeated(tmp_path: Path) -> None:
    monitor = Monitor(csv_monitor=section(tmp_path))
    monitor.close()
    monitor.close()
    monitor.write_events([("x", 1.0, 1)])
    assert not monitor.enabled
    assert list((tmp_path / "job").iterdir()) == []


def test_a_failing_disk_does_not_end_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "job").mkdir()
    (tmp_path / "job/x.csv").symlink_to("/dev/full")
    monitor = Monitor(csv_monitor=section(tmp_path))
    monitor.write_events([("x", 1.0, 1)])
    assert not monitor.enabled
    assert "CsvWriter stops: " in capsys.readouterr().err
    monitor.write_events([("x", 1.0, 2)])
    monitor.close()


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"csv_monitor\.output_path"):
        Monitor(csv_monitor=section(tmp_path / "file"))


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an absent package looks like to import
    config = {
        "tensorboard": section(tmp_path),
        "wandb": SimpleNamespace(enabled=True, group=None, team=None, project="p"),
    }
    with pytest.raises(ConfigError) as raised:
        Monitor(csv_monitor=section(tmp_path), **{package: config[package]})
    assert f"{package}.enabled is true" in str(raised.value)
    assert f"pip install {package}" in str(raised.value)
    Monitor(**{package: config[package]}, rank=1)


# --- TensorBoard and W&B


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(tensorboard=section(tmp_path))
    monitor.write_events([(LOSS, torch.tensor(1.5), 8), (LR, 0.25, 8)])
    monitor.write_events([(LOSS, math.nan, 16)])
    before_close = EventAccumulator(str(tmp_path / "job"))
    before_close.Reload()
    assert [event.step for event in before_close.Scalars(LOSS)] == [8, 16], "events must reach the file at once"
    monitor.flush()
    monitor.close()
    with Monitor(tensorboard=section(tmp_path)) as resumed:
        resumed.write_events([(LOSS, 0.5, 24)])
    read = EventAccumulator(str(tmp_path / "job"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == sorted([LOSS, LR])
    assert [(event.step, event.value) for event in read.Scalars(LR)] == [(8, 0.25)]
    losses = {event.step: event.value for event in read.Scalars(LOSS)}
    assert (losses[8], losses[24]) == (1.5, 0.5)
    assert math.isnan(losses[16])


WANDB_PROGRAM = """
import sys, wandb
from types import SimpleNamespace
from deepspeedlite.monitor import Monitor
opened_by_script = sys.argv[1] == "script"
if opened_by_script:
    wandb.init(project="mine")
monitor = Monitor(wandb=SimpleNamespace(enabled=True, group="g", team=None, project="p"))
run = wandb.run
monitor.write_events([("Train/Samples/lr", 0.25, 8), ("Train/Samples/train_loss", 1.5, 8)])
monitor.write_events([("Train/Samples/train_loss", 0.5, 16)])
print("RUN", run.project, run.group or "-", run.step)
monitor.write_events([("Train/Samples/train_loss", 0.125, 24)])
print("AFTER 16", run.summary["Train/Samples/lr"], run.summary["Train/Samples/train_loss"])
monitor.close()
print("OPEN", wandb.run is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("opener", ["monitor", "script"])
def test_wandb_offline(tmp_path: Path, opener: str) -> None:
    need("wandb")
    root = str(ROOT)
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", WANDB_PROGRAM, opener],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    mine = opener == "script"
    assert f"RUN {'mine -' if mine else 'p g'} 16\n" in done.stdout
    assert "AFTER 16 0.25 0.5\n" in done.stdout
    assert f"OPEN {mine}\n" in done.stdout
    assert list(tmp_path.rglob("*.wandb")), "no offline run was written"
