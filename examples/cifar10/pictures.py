"""The pictures to train on: CIFAR-10 where it can be had, else the handwritten digits inside scikit-learn.

CIFAR-10 (Krizhevsky 2009) is read from its *binary* archive: 3073 bytes a record, a label and 3 x 32 x 32 pixels, so
nothing is unpickled. The digits (E. Alpaydin and C. Kaynak 1998, 1797 scans of 8 x 8 pixels) are enlarged to
CIFAR-10's shape, so that one network serves both. Pictures stay bytes; the network normalises them.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from download import OnProgress, fetch
from torch import Tensor
from torch.utils.data import Dataset

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_FILE = "cifar-10-binary.tar.gz"
CIFAR_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_MEMBERS = tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6))
TEST_MEMBERS = ("cifar-10-batches-bin/test_batch.bin",)
DIGITS_FILE = "digits.csv.gz"
RECORD_BYTES = 1 + 3 * 32 * 32
SPLIT_SEED = 0


class Pictures(Dataset):
    """N labelled pictures: uint8 (N, 3, 32, 32) and int64 (N,)."""

    def __init__(self, pictures_n3hw: Tensor, labels_n: Tensor) -> None:
        self.pictures_n3hw = pictures_n3hw
        self.labels_n = labels_n

    def __len__(self) -> int:
        return len(self.labels_n)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pictures_n3hw[index], self.labels_n[index]


@dataclass(frozen=True)
class PictureData:
    """A data set, split: what it is called, its classes in label order, and the two parts."""

    name: str
    classes: Sequence[str]
    train: Pictures
    test: Pictures


def fetch_cifar10(
    folder: Path, *, url: str = CIFAR_URL, sha256: str = CIFAR_SHA256, progress: OnProgress | None = None
) -> Path:
    """Have CIFAR-10's archive in `folder` and return its path. Raises DownloadError; see `download.fetch`."""
    return fetch(url, folder / CIFAR_FILE, sha256, progress=progress)


def read_cifar10(archive: Path) -> PictureData:
    """CIFAR-10 from its binary archive: 50,000 pictures to train on, 10,000 to test with.

    Raises:
        ValueError: a member is missing, or is no whole number of records with labels from 0 to 9.
    """
    with tarfile.open(archive, "r:gz") as tar:
        contents = {m.name: _read_member(tar, m) for m in tar if m.isfile() and m.name in TRAIN_MEMBERS + TEST_MEMBERS}
    missing = [name for name in TRAIN_MEMBERS + TEST_MEMBERS if name not in contents]
    if missing:
        raise ValueError(f"{archive} has no {', '.join(missing)}: this is not CIFAR-10's binary archive")
    train, test = (_parse(contents, members) for members in (TRAIN_MEMBERS, TEST_MEMBERS))
    return PictureData("CIFAR-10", CIFAR_CLASSES, train, test)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream else b""


def _parse(contents: dict[str, bytes], members: Sequence[str]) -> Pictures:
    for name in members:
        if not contents[name] or len(contents[name]) % RECORD_BYTES:
            raise ValueError(f"{name} has {len(contents[name])} bytes, no whole number of {RECORD_BYTES}-byte records")
    joined = bytearray().join(contents[name] for name in members)
    records = torch.frombuffer(joined, dtype=torch.uint8).view(-1, RECORD_BYTES)
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise ValueError(f"{members[0]} and following: a label is {int(labels.max())}, but CIFAR-10 has 0 to 9")
    return Pictures(records[:, 1:].reshape(-1, 3, 32, 32), labels)


def read_digits() -> PictureData:
    """scikit-learn's handwritten digits as colour pictures of 32 x 32: 1437 to train on, 360 to test with.

    The split is the same every time, with a fifth of each digit to test with. Raises FileNotFoundError, with the
    remedy, without the file.
    """
    lines = csv.reader(_digits_file().decode().splitlines())
    rows = torch.tensor([[float(value) for value in line] for line in lines])  # 64 pixels and a label
    grey_n1hw, labels = rows[:, :64].view(-1, 1, 8, 8) * (255.0 / 16.0), rows[:, 64].long()  # 0..16 in the source
    pictures = F.interpolate(grey_n1hw, size=(32, 32), mode="bilinear", align_corners=False)
    pictures = pictures.round().to(torch.uint8).repeat(1, 3, 1, 1)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    by_digit = shuffled[labels[shuffled].argsort(stable=True)]
    is_test = torch.arange(len(labels)) % 5 == 0
    train, test = (Pictures(pictures[part], labels[part]) for part in (by_digit[~is_test], by_digit[is_test]))
    return PictureData("handwritten digits (scikit-learn)", tuple(map(str, range(10))), train, test)


def _digits_file() -> bytes:
    """The file beside this one, as in images, or inside scikit-learn, which is not imported: that takes long."""
    found = [Path(__file__).with_name(DIGITS_FILE)]
    sklearn = importlib.util.find_spec("sklearn")
    if sklearn and sklearn.origin:
        found.append(Path(sklearn.origin).parent / "datasets" / "data" / DIGITS_FILE)
    for path in found:
        if path.is_file():
            return gzip.decompress(path.read_bytes())
    raise FileNotFoundError("the digits come with scikit-learn: pip install 'deepspeedlite[examples]'")
