"""The examples: the GPT and its text, CIFAR-10's reader and download, and both trainings through the launcher.

Downloads run against a real HTTP server on 127.0.0.1 that can cut connections, lie about content, or know no ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import resource
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch
from paths import ROOT

EXAMPLES = ROOT / "examples"


def load(folder: str, name: str) -> ModuleType:
    """examples/FOLDER/NAME.py, as a script in that folder would import it, without leaving its names behind."""
    path = EXAMPLES / folder / f"{name}.py"
    unique = f"examples_{folder}_{name}"
    if unique in sys.modules:
        return sys.modules[unique]
    siblings = {p.stem for p in path.parent.glob("*.py")}
    shadowed = {n: sys.modules.pop(n) for n in siblings if n in sys.modules}
    spec = importlib.util.spec_from_file_location(unique, path)
    module = sys.modules[unique] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        for sibling in siblings:
            sys.modules.pop(sibling, None)
        sys.modules.update(shadowed)
    return module


# --- the GPT and its text


def test_benchmark_gpt_has_34_million_parameters():
    model = load("gpt", "model")
    with torch.device("meta"):
        assert model.GPT(model.GPTConfig.benchmark()).numel() == 33_641_472


def test_gpt_ties_its_head_when_asked():
    model = load("gpt", "model")
    tied, untied = (model.GPT(model.GPTConfig(layers=1, tied_head=tied)) for tied in (True, False))
    assert tied.head.weight is tied.tokens.weight
    assert untied.numel() - tied.numel() == 256 * 128


def test_gpt_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width 100 is not a multiple of heads 3"):
        load("gpt", "model").GPTConfig(width=100, heads=3)


def test_gpt_sees_no_token_after_the_current_one():
    model = load("gpt", "model")
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(layers=2, width=32, heads=2, context=16)).double()
    tokens = torch.randint(0, 256, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 256
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.slow
def test_gpt_starts_out_knowing_nothing_and_overfits_one_window():
    model = load("gpt", "model")
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(layers=1, width=32, heads=2, context=16))
    tokens = torch.randint(0, 256, (1, 17))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    first = net(tokens[:, :-1], tokens[:, 1:]).item()
    assert abs(first - 5.545) < 0.1
    for _ in range(80):
        optimizer.zero_grad()
        loss = net(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    written = net.generate(tokens[:, :4], 12, temperature=0)
    assert written.shape == (1, 16)
    assert (written[0] == tokens[0, :16]).float().mean() > 0.8


def test_text_is_the_same_every_time_and_split_by_file(tmp_path):
    text = load("gpt", "text")
    for number in range(40):
        (tmp_path / f"m{number:02d}.py").write_text(f"# {number:02d}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("not ours")
    train, validation = text.library_text(10_000, tmp_path)
    assert validation == b"# 04\n# 24\n"
    assert len(train) == 38 * 5 and b"not ours" not in train
    assert text.library_text(300_000) == text.library_text(300_000)
    assert sum(map(len, text.library_text(300_000))) == 300_000


def test_text_without_sources_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load("gpt", "text").library_text(1000, tmp_path)


def test_windows_cover_the_text_and_look_one_byte_ahead():
    windows = load("gpt", "text").Windows(bytes(range(100)), context=8)
    assert len(windows) == 12
    tokens, targets = windows[3]
    assert tokens.tolist() == list(range(24, 32)) and targets.tolist() == list(range(25, 33))
    with pytest.raises(IndexError):
        windows[12]
    with pytest.raises(ValueError, match="8 bytes"):
        load("gpt", "text").Windows(b"12345678", context=8)


# --- CIFAR-10's archive and the digits


def make_archive(records_per_file: int = 3, label: int | None = None, cut: int = 0, leave_out: str = "") -> bytes:
    """A small archive of CIFAR-10's binary layout with pictures that tell their file and record."""
    data = load("cifar10", "pictures")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for number, name in enumerate(data.TRAIN_MEMBERS + data.TEST_MEMBERS):
            if leave_out and leave_out in name:
                continue
            body = b"".join(
                bytes([(number + i) % 10 if label is None else label]) + bytes([(number * 16 + i) % 256]) * 3072
                for i in range(records_per_file)
            )
            body = body[: len(body) - cut]
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def test_cifar_reader_keeps_order_labels_and_pixels(tmp_path):
    data = load("cifar10", "pictures")
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make_archive())
    found = data.read_cifar10(path)
    assert (len(found.train), len(found.test)) == (15, 3)
    assert found.train.labels_n.tolist() == [(n + i) % 10 for n in range(5) for i in range(3)]
    picture, label = found.test[2]
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
    assert picture.unique().tolist() == [5 * 16 + 2] and int(label) == 7


def test_cifar_reader_keeps_the_planes_apart():
    data = load("cifar10", "pictures")
    record = bytes([4]) + bytes([1]) * 1024 + bytes([2]) * 1023 + bytes([9]) + bytes([3]) * 1024
    pictures = data._parse({"x": record}, ["x"])
    assert pictures.pictures_n3hw[0].amin((1, 2)).tolist() == [1, 2, 3]
    assert pictures.pictures_n3hw[0, 1, 31, 31] == 9


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"cut": 1}, "no whole number"), ({"label": 10}, "label is 10"), ({"leave_out": "batch_3"}, "data_batch_3.bin")],
)
def test_cifar_reader_refuses_what_is_not_cifar(tmp_path, fault, message):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make_archive(**fault))
    with pytest.raises(ValueError, match=message):
        load("cifar10", "pictures").read_cifar10(path)


@pytest.mark.slow
def test_digits_split_is_fixed_and_stratified():
    pytest.importorskip("sklearn", reason="needs scikit-learn (pip install 'deepspeedlite[examples]')")
    data = load("cifar10", "pictures")
    first, second = data.read_digits(), data.read_digits()
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert torch.equal(first.test.pictures_n3hw, second.test.pictures_n3hw)
    assert first.train.pictures_n3hw.shape == (1437, 3, 32, 32)
    assert int(first.train.pictures_n3hw.max()) == 255
    per_class = torch.bincount(first.test.labels_n)
    assert int(per_class.max() - per_class.min()) <= 2
    seen = {bytes(p.flatten().tolist()) for p in first.train.pictures_n3hw}
    assert sum(bytes(p.flatten().tolist()) in seen for p in first.test.pictures_n3hw) <= 2, "test pictures leaked"


def test_network_is_the_tutorials():
    model = load("cifar10", "model")
    net = model.Net()
    assert sum(p.numel() for p in net.parameters()) == 62_006
    assert net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_moving_average_follows_the_weights():
    ema = load("cifar10", "ema")
    trained, kept = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    average = ema.MovingAverage(kept, trained, decay=0.9)
    torch.testing.assert_close(kept.weight, trained.weight)
    expected = trained.weight.detach().clone()
    for update in range(1, 200):
        with torch.no_grad():
            trained.weight.fill_(update / 100)
        average.update(trained)
        expected += (1 - min(0.9, update / (update + 10))) * (trained.weight.detach() - expected)
    torch.testing.assert_close(kept.weight, expected)
    assert not kept.weight.requires_grad


# --- downloads


class _Handler(BaseHTTPRequestHandler):
    """Serves `server.body`. `server.cuts` lists after how many bytes to drop the connection, answer by answer."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and server.knows_ranges else 0
        if start >= len(server.body) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.body)}")
            self.end_headers()
            return
        rest = server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(rest[:cut])
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(body: bytes, cuts: list[int] = (), knows_ranges: bool = True, status: int = 200):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.body, server.cuts, server.ranges = body, list(cuts), []
    server.knows_ranges, server.status = knows_ranges, status
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


BODY = bytes(range(256)) * 400
GOOD = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def fetch(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return load("cifar10", "download").fetch


def fetch_error(call, *args) -> str:
    with pytest.raises(RuntimeError) as caught:
        call(*args)
    assert type(caught.value).__name__ == "DownloadError"
    return str(caught.value)


def test_download_goes_on_where_the_connection_was_cut(fetch, tmp_path):
    path = tmp_path / "new" / "file"
    with serving(BODY, cuts=[1000, 50_000]) as server:
        assert fetch(server.url, path, GOOD) == path
        assert server.ranges == [None, "bytes=1000-", "bytes=51000-"]
        fetch(server.url, path, GOOD)
        assert len(server.ranges) == 3, "a file that is there and right is not asked for again"
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_download_goes_on_from_an_earlier_run(fetch, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY[:777])
    with serving(BODY) as server:
        fetch(server.url, tmp_path / "file", GOOD)
        assert server.ranges == ["bytes=777-"]
    assert (tmp_path / "file").read_bytes() == BODY


def test_download_starts_over_where_ranges_are_unknown(fetch, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 777)
    with serving(BODY, knows_ranges=False) as server:
        fetch(server.url, tmp_path / "file", GOOD)
    assert (tmp_path / "file").read_bytes() == BODY


def test_download_finishes_a_part_that_is_whole_and_drops_one_that_is_too_long(fetch, tmp_path):
    for number, part in enumerate([BODY, BODY + b"more"]):
        path = tmp_path / str(number)
        path.with_name(path.name + ".part").write_bytes(part)
        with serving(BODY) as server:
            fetch(server.url, path, GOOD)
        assert path.read_bytes() == BODY


def test_download_with_a_wrong_checksum_is_refused_and_thrown_away(fetch, tmp_path):
    with serving(BODY[:-1] + b"!") as server:
        message = fetch_error(fetch, server.url, tmp_path / "file", GOOD)
    assert GOOD in message and "SHA-256" in message
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_from_before_is_fetched_again(fetch, tmp_path):
    (tmp_path / "file").write_bytes(BODY[:500])
    with serving(BODY) as server:
        fetch(server.url, tmp_path / "file", GOOD)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_server_that_keeps_cutting_is_given_up_and_the_part_kept(fetch, tmp_path):
    with serving(BODY, cuts=[100] * 50) as server:
        message = fetch_error(fetch, server.url, tmp_path / "file", GOOD)
        assert len(server.ranges) == load("cifar10", "download").TRIES
    assert "run again" in message
    assert (tmp_path / "file.part").read_bytes() == BODY[:800]


def test_download_names_the_servers_refusal(fetch, tmp_path):
    with serving(BODY, status=404) as server:
        assert "404" in fetch_error(fetch, server.url, tmp_path / "file", GOOD)


def test_download_gives_up_soon_without_a_server(fetch, tmp_path):
    with serving(BODY) as server:
        url = server.url
    assert "refused" in fetch_error(fetch, url, tmp_path / "file", GOOD)


def test_cifar_is_fetched_and_read(fetch, tmp_path):
    data = load("cifar10", "pictures")
    body = make_archive()
    with serving(body, cuts=[200]) as server:
        path = data.fetch_cifar10(tmp_path, url=server.url, sha256=hashlib.sha256(body).hexdigest())
    assert path.name == "cifar-10-binary.tar.gz" and len(data.read_cifar10(path).train) == 15


# --- both trainings, as a person starts them


def launch(tmp_path: Path, *arguments: str, ranks: int = 2, timeout_s: int = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", str(ranks), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DSL_DATA": str(tmp_path / "data")}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout_s)


def cifar(tmp_path: Path, *more: str, **options: int) -> subprocess.CompletedProcess[str]:
    folder = EXAMPLES / "cifar10"
    arguments = (str(folder / "train.py"), "--deepspeed_config", str(folder / "ds_config.json"), *more)
    return launch(tmp_path, *arguments, **options)


def test_tutorial_config_is_the_well_known_one():
    from deepspeedlite.config import load_config

    config = load_config(EXAMPLES / "cifar10" / "ds_config.json", world_size=2)
    assert config.optimizer.type == "Adam" and config.scheduler.type == "WarmupLR"
    assert config.optimizer.params == {"lr": 1e-3, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}
    assert config.scheduler.params == {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1000}
    assert config.batch(2).micro == 16


@pytest.mark.slow
def test_demo_reaches_97_percent_on_two_ranks_within_a_minute(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn (pip install 'deepspeedlite[examples]')")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cifar(tmp_path, "--data", "digits", "--min_accuracy", "0.97")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout and "handwritten digits" in done.stdout
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s / 2 < 60, "of each rank's core, whatever else the machine has to do meanwhile"
    assert re.search(r"test accuracy: 9[789]\.\d\d% \(\d+ of 360\)", done.stdout)
    shares = re.findall(r"\((\d+) of (\d+)\)", done.stdout)
    assert len(shares) == 11 and sum(int(total) for _, total in shares[:10]) == 360
    assert list(tmp_path.iterdir()) == [], "the digits need no download and leave no files"


@pytest.mark.slow
def test_demo_with_ema_on_three_ranks_and_a_bar_it_cannot_reach(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn (pip install 'deepspeedlite[examples]')")
    options = ("--data", "digits", "--use_ema", "-e", "1", "-b", "48", "--min_accuracy", "1.01")
    done = cifar(tmp_path, *options, ranks=3)
    assert done.returncode != 0
    assert "48 pictures a step, 1 epochs" in done.stdout and "moving average" in done.stdout
    assert "below the 101.00%" in done.stdout
    assert re.search(r"test accuracy: [\d.]+% \(\d+ of 360\)", done.stdout), "uneven shards are counted once each"


@pytest.mark.slow
def test_gpt_learns_and_writes(tmp_path):
    folder = EXAMPLES / "gpt"
    options = ("--steps", "40", "--width", "64", "--layers", "2", "--text_bytes", "500000", "--generate", "50")
    config = ("--deepspeed_config", str(folder / "ds_config.json"))
    done = launch(tmp_path, str(folder / "train.py"), *config, *options, "--max_val_loss", "3.2")
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (float(x) for x in re.findall(r"validation loss[^:]*: ([\d.]+)", done.stdout))
    assert before > 4.5 and after < 3.2
    assert re.search(r"step 40/40  loss [\d.]+  [\d,]+ tokens/s", done.stdout)
    assert "def " in done.stdout.split("-" * 80)[1]


@pytest.mark.slow
def test_gpt_learns_as_a_pipeline(tmp_path):
    """Two stages of two replicas."""
    config = ("--deepspeed_config", str(EXAMPLES / "gpt" / "ds_config.json"))
    options = ("--steps", "40", "--micro_batches", "4", "--max_val_loss", "3.3")
    done = launch(tmp_path, str(EXAMPLES / "gpt" / "train_pipeline.py"), *config, *options, ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 1: layers 3-6" in done.stdout + done.stderr
    assert re.search(r"step 40/40  loss [\d.]+  [\d,]+ tokens/s", done.stdout)
