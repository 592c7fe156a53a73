"""Step time and memory of ZeRO stages 1 to 3 beside DDP, FSDP2 and the real DeepSpeed, and whether our limits hold.

    python benchmarks/zero_step.py [--peer-python ENV/bin/python] [--dtype fp32|bf16] [--accumulation 1]
                                   [--rounds 5] [--steps 5] [--layers 8] [--only NAME...]
                                   [--before CHECKOUT]

All train the 33.6 M-parameter GPT of examples/gpt from the same weights on the same batches: 2 ranks, gloo, CPU, one
thread a rank, AdamW in torch's fused form, no clipping. Every contender has two processes of its own, so DeepSpeed can
live in another environment and memory is one contender's alone. All processes live throughout; the parent gives them
turns of `--steps` steps, in an order that moves on by one from round to round, and those whose turn it is not are
blocked in a read. A contender's figure is the median over the rounds of its median step in a round, a ratio the median
over the rounds of the ratio in a round. A step lasts from barrier to barrier: what it leaves for later is counted.
The first row is the model's own passes, which nobody can do without: its ratios are the least that any could have.

Stage 3 runs twice. Once both engines are told to let parameters go after forward as FSDP2 does (a reuse distance of 0,
a persistence threshold of 0); once, "default", with the defaults of both, beside FSDP2 with its own default, which
keeps the root's parameters. "whole after forward" shows what a rank really held then. DeepSpeed holds on to what its
prefetch has passed over; `ds3-no-prefetch` lets go of everything, which is slower. DeepSpeed's rows that are not called
default get `--peer-bucket-numel`: smaller buckets than its own of 5e8 elements are faster and leaner on this model.

`--before` names another checkout of this project (of an earlier commit, say): each of our rows is followed by its.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from machine import machine, print_json, print_table

WORKER = Path(__file__).resolve().parent / "zero_worker.py"
RANKS = 2
PATIENCE_S = 600.0  # for one answer; DeepSpeed compiles an extension when it first starts, which takes a minute
MAX_IDLE_SHARE, MIN_FREE_MIB = 0.1, 1024.0  # beyond these a run is warned about; a share is of one core
MIN_WARM_UP_STEPS = 4  # DeepSpeed's stage 3 and ours learn the order of use in the first ones

ON_CPU = {"offload_optimizer": {"device": "cpu"}}
AS_FSDP2 = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}


class Contender(NamedTuple):
    """A row of the table: how the worker builds it."""

    label: str
    kind: str  # a key of the worker's MAKERS
    options: dict[str, Any]
    checkout: str = ""  # whose code it runs, if not this one's


CONTENDERS = {
    "alone": Contender("forward and backward alone, no step, no exchange", "alone", {}),
    "ddp": Contender("DDP (gradient_as_bucket_view) + fused AdamW", "ddp", {}),
    "fsdp2": Contender("FSDP2 + fused AdamW", "fsdp2", {"reshard_root": True}),
    "fsdp2-default": Contender("FSDP2 + fused AdamW, default (root kept)", "fsdp2", {"reshard_root": None}),
    **{f"lite{stage}": Contender(f"deepspeedlite stage {stage}", "lite", {"stage": stage}) for stage in (0, 1, 2)},
    "lite3": Contender("deepspeedlite stage 3, reuse distance 0", "lite", {"stage": 3, **AS_FSDP2}),
    **{
        f"lite{stage}-unchecked": Contender(
            f"deepspeedlite stage {stage}, check_grad_overflow false",
            "lite",
            {"stage": stage, "check_grad_overflow": False, **(AS_FSDP2 if stage == 3 else {})},
        )
        for stage in range(4)
    },
    "lite3-default": Contender("deepspeedlite stage 3, default", "lite", {"stage": 3}),
    **{f"ds{stage}": Contender(f"DeepSpeed stage {stage}", "deepspeed", {"stage": stage}) for stage in (1, 2)},
    "lite2-cpu": Contender("deepspeedlite stage 2, optimizer on CPU", "lite", {"stage": 2, **ON_CPU}),
    "ds2-cpu": Contender("DeepSpeed stage 2, optimizer on CPU", "deepspeed", {"stage": 2, **ON_CPU}),
    "ds3": Contender("DeepSpeed stage 3, reuse distance 0", "deepspeed", {"stage": 3, **AS_FSDP2}),
    "ds3-no-prefetch": Contender(
        "DeepSpeed stage 3, reuse distance 0, no prefetch",
        "deepspeed",
        {"stage": 3, **AS_FSDP2, "stage3_prefetch_bucket_size": 0},
    ),
    **{
        f"ds{stage}-default": Contender(f"DeepSpeed stage {stage}, default", "deepspeed", {"stage": stage})
        for stage in (1, 2, 3)
    },
}
LEFT_OUT = (
    "lite0",
    *(f"lite{stage}-unchecked" for stage in range(4)),
    "lite2-cpu",
    "ds2-cpu",
    "ds1-default",
    "ds2-default",
    "ds3-no-prefetch",
)  # unless --only names them


class Limit(NamedTuple):
    """`mine` must not need more than `at_most` times what `peer` needs, of `what`: "time" or "peak memory"."""

    mine: str
    what: str
    peer: str
    at_most: float


LIMITS = [
    Limit("lite1", "time", "ddp", 1.05),
    Limit("lite2", "time", "ddp", 1.05),
    Limit("lite3", "time", "ddp", 1.15),
    Limit("lite3", "time", "fsdp2", 0.9),
    *(Limit(f"lite{stage}", "time", f"ds{stage}", 0.75) for stage in (1, 2, 3)),
    *(Limit(f"lite{stage}", "peak memory", f"ds{stage}", 1.0) for stage in (1, 2, 3)),
    Limit("lite3", "peak memory", "fsdp2", 1.0),
]
DEFAULT_LIMITS = [  # the same with the default settings of both; stages 1 and 2 of ours have no other
    Limit("lite3-default", "time", "ddp", 1.15),
    Limit("lite3-default", "time", "fsdp2-default", 0.9),
    Limit("lite1", "time", "ds1-default", 0.75),
    Limit("lite2", "time", "ds2-default", 0.75),
    Limit("lite3-default", "time", "ds3-default", 0.75),
    Limit("lite1", "peak memory", "ds1-default", 1.0),
    Limit("lite2", "peak memory", "ds2-default", 1.0),
    Limit("lite3-default", "peak memory", "ds3-default", 1.0),
    Limit("lite3-default", "peak memory", "fsdp2-default", 1.0),
]


OFFLOAD_LIMITS = [Limit("lite2-cpu", "time", "lite2", 1.1), Limit("lite2-cpu", "time", "ds2-cpu", 0.7)]


class WorkerError(RuntimeError):
    """A contender's process ended or fell silent; the message carries the end of what it printed."""


@dataclass
class Found:
    """What was measured of one contender. Memory is the larger of the ranks', in MiB."""

    version: str
    torch: str
    numel: int
    init_mib: float
    peak_init_mib: float
    times_ms: list[float] = field(default_factory=list)  # per counted round: median of its steps
    cpu_ms: list[float] = field(default_factory=list)  # per counted round: of all ranks together, per step
    losses: list[list[float]] = field(default_factory=lambda: [[] for _ in range(RANKS)])
    peak_steps_mib: float = 0.0
    end_mib: float = 0.0
    whole_numel: int = 0  # elements of whole parameters that a rank held after forward
    idle_s: list[float] = field(default_factory=lambda: [0.0, 0.0])  # CPU of all ranks, wall, while others had turns

    @property
    def peak_mib(self) -> float:
        """The highest of its whole life."""
        return max(self.peak_init_mib, self.peak_steps_mib)

    @property
    def idle_cpu_share(self) -> float:
        """Of one core, taken while it should have been asleep."""
        return self.idle_s[0] / self.idle_s[1] if self.idle_s[1] else 0.0

    def add_turn(self, answers: list[dict[str, Any]], counted: bool) -> None:
        """Account for one turn."""
        if counted:
            self.times_ms.append(statistics.median(map(max, zip(*(a["times_ms"] for a in answers)))))
            self.cpu_ms.append(sum(a["cpu_ms"] for a in answers))
            self.idle_s[0] += sum(a["idle_cpu_s"] for a in answers)
            self.idle_s[1] += max(a["idle_s"] for a in answers)
        for losses, answer in zip(self.losses, answers):
            losses += answer["losses"]
        self.end_mib = max(a["rss_mib"] for a in answers)
        self.peak_steps_mib = max(a["peak_mib"] for a in answers)
        self.whole_numel = max(a["whole_numel"] for a in answers)


class Pair:
    """The processes of one contender, and the pipes to them."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path) -> None:
        self.name, self.logs = name, [folder / f"{name}.{rank}.log" for rank in range(RANKS)]
        self.processes: list[subprocess.Popen[str]] = []
        try:
            for rank, log in enumerate(self.logs):
                self.processes.append(start_worker(name, rank, log, args))
            first = self.answers()
        except BaseException:
            self.kill()
            raise
        told = {key: first[0][key] for key in ("version", "torch", "numel")}
        init_mib, peak_mib = (max(answer[key] for answer in first) for key in ("rss_mib", "peak_mib"))
        self.found = Found(**told, init_mib=init_mib, peak_init_mib=peak_mib)

    def turn(self, steps: int, first: int, counted: bool) -> None:
        """Let it train `steps` steps, the first of which has that number."""
        for process in self.processes:
            process.stdin.write(json.dumps({"steps": steps, "first": first}) + "\n")
            process.stdin.flush()
        self.found.add_turn(self.answers(), counted)

    def answers(self) -> list[dict[str, Any]]:
        """One answer of each rank."""
        lines = []
        for process in self.processes:
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
            line = process.stdout.readline() if ready else ""
            if not line:
                what = "ended" if ready else f"said nothing for {PATIENCE_S:.0f} s"
                self.kill()
                raise WorkerError(f"{self.name}: a worker {what}\n{self.last_words()}")
            lines.append(line)
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        """The end of what its processes printed."""
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-12:]) for log in self.logs)

    def close(self) -> None:
        """End the processes in good order."""
        for process in self.processes:
            with suppress(BrokenPipeError):  # it died with a command unread
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """End them anyhow."""
        for process in self.processes:
            process.kill()
            process.wait()


def start_worker(name: str, rank: int, log: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    """One rank of a contender, waiting for its peer."""
    contender = CONTENDERS[name]
    theirs = contender.kind == "deepspeed"
    buckets = {}
    if theirs and not name.endswith("-default") and args.peer_bucket_numel:
        keys = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
        buckets = dict.fromkeys(keys, args.peer_bucket_numel)
    python = args.peer_python if theirs else sys.executable
    job = {
        "kind": contender.kind,
        "options": {**buckets, **contender.options},
        "rank": rank,
        "ranks": RANKS,
        "store_path": str(log.with_name(f"{name}.store")),
        "layers": args.layers,
        "bf16": args.dtype == "bf16",
        "accumulation": args.accumulation,
    }
    settings = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        # Nobody listens there (the ranks meet in a file), but DeepSpeed names its shared memory after them.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + list(CONTENDERS).index(name)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "DSL_LOG_LEVEL": "warning",
        "PYTHONWARNINGS": "ignore",
        # DeepSpeed compiles with the ninja of its own environment.
        "PATH": f"{Path(python).absolute().parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if contender.checkout:
        settings["PYTHONPATH"] = contender.checkout
    with log.open("w") as errors:
        return subprocess.Popen(
            [python, str(WORKER), json.dumps(job)],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def main() -> None:
    """Start the contenders, give them turns, report. Exit status 1 if one that was asked for could not run."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally` below: nobody is left behind
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="zero_step.") as folder:
        pairs: dict[str, Pair] = {}
        try:
            for name in args.only:  # one after the other: their initialisations do not meet
                with reporting_death(name, failures):
                    pairs[name] = Pair(name, args, Path(folder))
            least_free_mib = race(pairs, failures, args)
        finally:
            for pair in pairs.values():
                pair.close()
    found = {name: pair.found for name, pair in pairs.items() if name not in failures}
    if found:
        report(args, found, least_free_mib)
    for why in failures.values():
        print(f"NOT MEASURED: {why}", flush=True)
    sys.exit(1 if failures else 0)


@contextmanager
def reporting_death(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Note that a contender's process died, show its last words, and go on without it."""
    try:
        yield
    except (WorkerError, BrokenPipeError) as failure:
        failures[name] = str(failure).splitlines()[0] if isinstance(failure, WorkerError) else f"{name}: {failure}"
        print(failure, file=sys.stderr, flush=True)


def race(pairs: dict[str, Pair], failures: dict[str, str], args: argparse.Namespace) -> float:
    """Give the contenders their turns; the least memory, in MiB, that the machine had free after a round."""
    names, least_free_mib = list(pairs), free_mib()
    warm_up = max(args.steps, MIN_WARM_UP_STEPS)
    for number in range(args.rounds + 1):
        steps, first = (args.steps, warm_up + (number - 1) * args.steps) if number else (warm_up, 0)
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            if name not in failures:
                with reporting_death(name, failures):
                    pairs[name].turn(steps, first, counted=number > 0)
        least_free_mib = min(least_free_mib, free_mib())
    return least_free_mib


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: with fp32 master weights")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (a first one is not counted)")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=f"of {list(CONTENDERS)}")
    parser.add_argument(
        "--peer-bucket-numel", type=int, default=5_000_000, help="DeepSpeed's bucket sizes; 0: its defaults"
    )
    parser.add_argument("--before", metavar="CHECKOUT", help="another checkout of this project, to measure beside this")
    args = parser.parse_args()
    args.only = args.only or [
        name
        for name, contender in CONTENDERS.items()
        if name not in LEFT_OUT and (args.peer_python or contender.kind != "deepspeed")
    ]
    if not args.peer_python and any(CONTENDERS[name].kind == "deepspeed" for name in args.only):
        parser.error("DeepSpeed's contenders need --peer-python")
    if args.before:
        args.only = [each for name in args.only for each in (name, *add_earlier(name, args.before))]
    return args


def add_earlier(name: str, checkout: str) -> list[str]:
    """Make a contender of another checkout's, and name it, if this one is ours."""
    ours = CONTENDERS[name]
    if ours.kind != "lite":
        return []
    CONTENDERS[f"{name}-before"] = ours._replace(label=f"{ours.label}, before", checkout=str(Path(checkout).resolve()))
    return [f"{name}-before"]


def free_mib() -> float:
    """MemAvailable of the machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))


def report(args: argparse.Namespace, found: dict[str, Found], least_free_mib: float) -> None:
    """JSON lines, the table, and the limits."""
    asked = {key: getattr(args, key) for key in ("dtype", "accumulation", "rounds", "steps", "layers")}
    rows = []
    for name, figures in found.items():
        values = json_fields(name, figures, found)
        print_json(benchmark="zero_step", what=name, label=CONTENDERS[name].label, **values, **asked, **machine())
        rows.append(table_row(name, figures, found))
    first = next(iter(found.values()))
    title = (
        f"Training step, {first.numel / 1e6:.1f} M-parameter GPT, {args.dtype}, accumulation {args.accumulation}, "
        f"{RANKS} ranks with one thread each, gloo, {args.rounds} rounds of {args.steps} steps, torch {first.torch}"
    )
    head = ("contender", "median ms", "min", "max", "to DDP", "to FSDP2", "to DeepSpeed's stage")
    head = (*head, "RSS after init MiB", "peak MiB", "whole after forward M", "loss off DDP's")
    print_table(title, head, rows)
    print_notes(args, found, least_free_mib)
    print_limits("Limits:", LIMITS, found)
    if "lite2-cpu" in found:
        print_limits("Offloading to the CPU, on CPU ranks:", OFFLOAD_LIMITS, found)
    print_limits("The same with the default settings of both:", DEFAULT_LIMITS, found)


def json_fields(name: str, figures: Found, found: dict[str, Found]) -> dict[str, Any]:
    """What one JSON line says of a contender."""
    left_out = ("losses", "idle_s", "times_ms", "cpu_ms")
    fields = {key: value for key, value in asdict(figures).items() if key not in left_out}
    fields |= {f"{key}_ms": of(figures.times_ms) for key, of in SUMMARIES.items()}
    fields |= {f"ratio_to_{peer}": ratio(found, name, "time", peer) for peer in peers_of(name) if peer in found}
    fields |= {"cpu_ms": statistics.median(figures.cpu_ms), "idle_cpu_share": figures.idle_cpu_share}
    fields |= {"peak_mib": figures.peak_mib, "last_loss": figures.losses[0][-1]}
    fields |= {"loss_difference": loss_difference(found, name)}
    fields = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in fields.items()}
    return {**fields, "rounds_ms": [round(ms, 1) for ms in figures.times_ms]}


SUMMARIES = {"median": statistics.median, "min": min, "max": max}


def table_row(name: str, figures: Found, found: dict[str, Found]) -> tuple[str, ...]:
    """The same for people."""
    times = [f"{of(figures.times_ms):.1f}" for of in SUMMARIES.values()]
    ratios = [shown(ratio(found, name, "time", peer)) for peer in peers_of(name)]
    memory = [f"{mib:.0f}" for mib in (figures.init_mib, figures.peak_mib)]
    label = CONTENDERS[name].label + (f" ({figures.version})" if CONTENDERS[name].kind == "deepspeed" else "")
    apart = loss_difference(found, name)
    whole = f"{figures.whole_numel / 1e6:.1f}"
    return (label, *times, *ratios, *memory, whole, "-" if apart is None else f"{apart:.1e}")


def peers_of(name: str) -> tuple[str, str, str]:
    """The contenders that the three columns of ratios are to; "" where there is none."""
    name = name.removesuffix("-before")
    default = "-default" if name.endswith("-default") else ""
    return "ddp", "fsdp2" + default, name.replace("lite", "ds") if name.startswith("lite") else ""


def ratio(found: dict[str, Found], mine: str, what: str, peer: str) -> float | None:
    """`mine` over `peer`: of time the median of the rounds' ratios, of memory that of the peaks."""
    if mine not in found or peer not in found:
        return None
    ours, theirs = found[mine], found[peer]
    if what == "time":
        return statistics.median(a / b for a, b in zip(ours.times_ms, theirs.times_ms))
    return ours.peak_mib / theirs.peak_mib


def loss_difference(found: dict[str, Found], name: str) -> float | None:
    """The largest difference of any loss of any rank to DDP's on the same batch."""
    if "ddp" not in found or name == "alone":
        return None
    ranks = zip(found[name].losses, found["ddp"].losses)
    return max(abs(mine - theirs) for pair in ranks for mine, theirs in zip(*pair))


def shown(value: float | None) -> str:
    """A ratio, or a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def print_notes(args: argparse.Namespace, found: dict[str, Found], least_free_mib: float) -> None:
    """What a reader of the table should know."""
    released = ", ".join(f"{key}: {value}" for key, value in AS_FSDP2.items())
    print(f"Reuse distance 0: {released}, for ours and DeepSpeed's; FSDP2: reshard_after_forward=True everywhere.")
    buckets = f"{args.peer_bucket_numel} elements" if args.peer_bucket_numel else "DeepSpeed's default"
    print(f"Buckets of DeepSpeed's rows, those called default excepted: {buckets}. No one clips.")
    if args.dtype == "bf16":
        print("bf16: gradients are reduced in bf16 by DDP and FSDP2 (reduce_dtype); DDP has fp32 master weights.")
    print("Memory: of the larger rank. Peak: VmHWM of its whole life, the start included.")
    share = sum(figures.idle_cpu_share for figures in found.values())
    warning = "  WARNING: they disturb those that work" if share > MAX_IDLE_SHARE else ""
    print(
        f"Asleep, all contenders together took {share:.1%} of one core (gloo's threads look up now and then).{warning}"
    )
    warning = "  WARNING: the machine may have swapped" if least_free_mib < MIN_FREE_MIB else ""
    print(f"Least memory free between rounds: {least_free_mib:.0f} MiB.{warning}")


def print_limits(title: str, limits: list[Limit], found: dict[str, Found]) -> None:
    """One line for each that could be judged."""
    judged = [(limit, value) for limit in limits if (value := ratio(found, *limit[:3])) is not None]
    print(f"\n{title}" if judged else f"\n{title} none could be judged, its contenders did not run", flush=True)
    for limit, value in judged:
        verdict = "met" if value <= limit.at_most else "MISSED"
        least = ratio(found, "alone", "time", limit.peer) if limit.what == "time" else None
        floor = {} if least is None else {"passes_alone": round(least, 4)}
        print_json(benchmark="zero_step", **limit._asdict(), ratio=round(value, 4), verdict=verdict, **floor)
    for limit in limits:
        if not any(limit is other for other, _ in judged) and limit.mine in found:
            print(f"not judged: {limit.what} of {limit.mine} to {limit.peer}, which did not run")


if __name__ == "__main__":
    main()
