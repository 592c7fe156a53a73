"""The CIFAR-10 tutorial: a small network trained on pictures by several ranks at once.

    deepspeedlite --num_gpus 2 examples/cifar10/train.py --deepspeed_config examples/cifar10/ds_config.json

Everything that has to do with distributed training is in `main`: `initialize` returns an engine, and the loop calls
`engine(...)`, `engine.backward(loss)` and `engine.step()`. Without network the handwritten digits of scikit-learn
stand in for CIFAR-10 (see pictures.py); `--data` chooses by hand. `DSL_DATA` names the folder for downloads (./data).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from download import DownloadError
from ema import MovingAverage
from model import CLASSES, Net
from pictures import CIFAR_FILE, PictureData, Pictures, fetch_cifar10, read_cifar10, read_digits
from progress import Progress
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite import comm

SHIFT_PIXELS = 3  # training pictures are moved by up to this much, so that the network learns shapes, not places
EPOCHS = {"CIFAR-10": 8}  # one of its epochs has 35 times the pictures of the digits'
USUAL_ACCURACY = {"CIFAR-10": 0.55}


def parse_arguments() -> argparse.Namespace:
    """The tutorial's arguments and deepspeedlite's own."""
    parser = argparse.ArgumentParser(description="Train a small picture classifier with deepspeedlite.")
    parser.add_argument("--with_cuda", action="store_true", help="insist on a GPU (otherwise: a GPU if there is one)")
    parser.add_argument("--use_ema", action="store_true", help="keep a moving average of the weights and test that")
    parser.add_argument("-b", "--batch_size", type=int, help="pictures per step over all ranks (default: the config's)")
    parser.add_argument("-e", "--epochs", type=int, help="default: 50 for the digits, 8 for CIFAR-10")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--log_interval", type=int, help="steps between two lines of progress (default: 20 lines)")
    parser.add_argument("--data", choices=("auto", "cifar10", "digits"), default="auto", help="what to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--min_accuracy",
        default="0",
        help="exit with an error when the test accuracy (0 to 1) is below this; 'usual' is what this data should reach",
    )
    return deepspeedlite.add_config_arguments(parser).parse_args()


def main() -> int:
    """Train and test; returns the process's exit code."""
    args = parse_arguments()
    if args.with_cuda and not torch.cuda.is_available():
        raise SystemExit("--with_cuda: torch sees no GPU here; leave the flag out to train on the CPU")
    random.seed(1000 * args.seed + world_rank())  # the shifts: each rank draws its own
    torch.manual_seed(args.seed)
    deepspeedlite.init_distributed()
    world = comm.Group()
    data = choose_data(args.data, world)
    epochs = EPOCHS.get(data.name, 50) if args.epochs is None else args.epochs

    config = config_with_batch(args)
    net = Net()
    engine, _, loader, _ = deepspeedlite.initialize(
        args=args, model=net, model_parameters=net.parameters(), training_data=data.train, config=config
    )
    say(
        f"training on {data.name}: {len(data.train):,} pictures, {len(data.test):,} to test; {world.size} rank(s) on "
        f"{engine.device}, {engine.train_batch_size()} pictures a step, {epochs} epochs"
    )
    average = MovingAverage(Net().to(engine.device), engine.module) if args.use_ema else None
    train(engine, loader, epochs, average, args.log_interval)
    correct_and_total = test(average.module if average else engine.module, data.test, engine.device, world)
    accuracy = report(correct_and_total, data, "moving average" if average else "trained weights")
    engine.destroy()
    wanted = USUAL_ACCURACY.get(data.name, 0.97) if args.min_accuracy == "usual" else float(args.min_accuracy)
    if accuracy < wanted:
        say(f"the test accuracy {accuracy:.2%} is below the {wanted:.2%} that --min_accuracy asks for")
        return 1
    return 0


def train(engine, loader, epochs: int, average: MovingAverage | None, log_interval: int | None) -> None:
    """Run the training loop and show how it goes."""
    per_step = engine.train_batch_size()
    steps = epochs * len(loader)
    started_s = time.perf_counter()
    engine.train()
    with Progress(steps, log_interval or -(-steps // 20), enabled=world_rank() == 0) as progress:
        for epoch in range(epochs):
            for pictures, labels in loader:
                logits = engine(shifted(pictures.to(engine.device)))
                loss = F.cross_entropy(logits.float(), labels.to(engine.device))
                engine.backward(loss)
                engine.step()
                if average:
                    average.update(engine.module)
                progress.step(f"epoch {epoch + 1}/{epochs}", loss.detach(), per_step)
    elapsed_s = time.perf_counter() - started_s
    say(f"trained {steps:,} steps in {elapsed_s:.1f} s: {steps * per_step / elapsed_s:,.0f} samples/s")


def shifted(pictures_b3hw: Tensor) -> Tensor:
    """The pictures of one micro-batch, all moved by one random offset; what comes into view is black."""
    height, width = pictures_b3hw.shape[-2:]
    padded = F.pad(pictures_b3hw, (SHIFT_PIXELS,) * 4)
    top, left = (random.randint(0, 2 * SHIFT_PIXELS) for _ in range(2))
    return padded[..., top : top + height, left : left + width]


@torch.no_grad()
def test(net: nn.Module, pictures: Pictures, device: torch.device, world: comm.Group) -> Tensor:
    """Right answers and pictures per class, int64 (2, 10), over all ranks.

    Each rank takes every world-th picture. The shares may differ in size; sums of counts do not mind.
    """
    net.eval()
    counts_2c = torch.zeros(2, CLASSES, dtype=torch.int64, device=device)
    mine = slice(world.rank, None, world.size)
    for batch, labels in zip(pictures.pictures_n3hw[mine].split(256), pictures.labels_n[mine].split(256)):
        labels = labels.to(device)
        right = net(batch.to(device)).argmax(dim=1) == labels
        counts_2c[0] += torch.bincount(labels[right], minlength=CLASSES)
        counts_2c[1] += torch.bincount(labels, minlength=CLASSES)
    world.all_reduce(counts_2c, op="sum")
    return counts_2c.cpu()


def report(counts_2c: Tensor, data: PictureData, what: str) -> float:
    """Print the accuracy per class and overall; returns the latter."""
    right_c, total_c = counts_2c.tolist()
    width = max(map(len, data.classes))
    say(f"test accuracy per class ({what}):")
    for name, right, total in zip(data.classes, right_c, total_c):
        say(f"  {name:<{width}}  {right / max(total, 1):7.2%}  ({right} of {total})")
    accuracy = sum(right_c) / max(sum(total_c), 1)
    say(f"test accuracy: {accuracy:.2%} ({sum(right_c)} of {sum(total_c)})")
    return accuracy


def choose_data(choice: str, world: comm.Group) -> PictureData:
    """CIFAR-10 or the digits, the same on every rank: one node without the archive is enough for the digits.

    Local rank 0 of each node downloads; the others wait for it.
    """
    folder = Path(os.environ.get("DSL_DATA", "data"))
    if choice != "digits":
        reason = None
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            try:
                fetch_cifar10(folder, progress=print_download if world.rank == 0 else None)
            except (DownloadError, OSError) as error:
                reason = str(error)
        reasons = [reason for reason in world.all_gather_objects(reason) if reason]
        if not reasons:
            return read_cifar10(folder / CIFAR_FILE)
        if choice == "cifar10":
            raise SystemExit(f"--data cifar10: {reasons[0]}")
        say(f"CIFAR-10 cannot be had ({reasons[0]}); training on scikit-learn's handwritten digits instead")
    return read_digits()


def print_download(have_bytes: int, total_bytes: int) -> None:
    """A line for every tenth of the download."""
    tenth = max(total_bytes // 10, 1)
    if have_bytes // tenth != (have_bytes - (1 << 20)) // tenth:
        say(f"CIFAR-10: {have_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB")


def config_with_batch(args: argparse.Namespace) -> dict | None:
    """None to let `initialize` read --deepspeed_config; with -b, that file with its batch size replaced."""
    if args.batch_size is None:
        return None
    config = json.loads(Path(args.deepspeed_config).read_text())
    config["train_batch_size"] = args.batch_size
    args.deepspeed_config = None
    return config


def world_rank() -> int:
    """This process's rank, 0 when it runs alone."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Print a line on rank 0."""
    if world_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
