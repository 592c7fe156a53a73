"""What the command line asks for: each option is a field, with its help.

No more is imported than --help needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

# --help has the options under these headings, each from this one on.
GROUPS = {"hostfile": "where", "module": "what", "check": "how"}


def _option(value: str, text: str, default: Any = None, also: str = "") -> Any:
    """A field that the command line sets. `value`: its name in --help, "" for a switch, "N" for a number."""
    return field(default=default if value else False, metadata={"value": value, "help": text, "also": also.split()})


@dataclass(frozen=True)
class LaunchOptions:
    """What the user asked for, checked for form but not yet against the machines. Each node gets all of it."""

    script: str = ""
    script_args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)  # for ranks on all nodes, over the node's own: see `exported`
    cwd: str = ""

    hostfile: str | None = _option(
        "FILE", "machines and their slots, a line each: `worker-1 slots=4` (/job/hostfile)", also="-H"
    )
    include: str | None = _option("SLOTS", "use only these: worker-1@worker-2:0,2-3", also="-i")
    exclude: str | None = _option("SLOTS", "use all but these", also="-e")
    num_nodes: int | None = _option("N", "use the first N machines; those left over are to spare (all)")
    num_gpus: int | None = _option(
        "N", "ranks per machine (every slot or GPU; one CPU rank where there is none)", also="--num_accelerators"
    )
    force_multi: bool = _option("", "go through the network even for one machine")
    launcher: str | None = _option(
        "NAME", "pdsh, ssh, openmpi, mpich, slurm, impi or mvapich (pdsh where installed, else ssh)"
    )
    launcher_args: str = _option("ARGS", "more arguments for it", "")
    ssh_port: int | None = _option("N", "port of sshd on the machines")
    no_ssh: bool = _option("", "this command is run on every machine: with --node_rank and --master_addr")
    node_rank: int | None = _option("N", "with --no_ssh: which machine this is")
    master_addr: str = _option("ADDR", "address the ranks meet at (the first machine's)", "")
    master_port: int | None = _option("N", "port the ranks meet at (29500, or a free one if it is busy; 0: any)")

    module: bool = _option("", "the script is a module's name, run as with python -m")
    no_python: bool = _option("", "the script is a program, run without Python in front")
    no_local_rank: bool = _option("", "do not pass --local_rank=N to the script")
    as_deepspeed: bool = _option("", "`import deepspeed` in the script is deepspeedlite (see docs/compatibility.md)")
    export_env: Sequence[str] = _option(
        "NAME[=VALUE]", "hand this variable to every rank; may be repeated (see also .deepspeed_env)", ()
    )
    venv_script: str | None = _option("FILE", "sourced on every machine first; its `python` runs the ranks")
    bind_cores_to_rank: bool = _option("", "give each rank cores of its own")
    bind_core_list: str | None = _option("CORES", "the cores to share out, such as 0-3,8")

    check: bool = _option("", "look at all machines, print a table, and start nothing")
    no_check: bool = _option("", "start even if machines differ", also="--no_ssh_check")
    dry_run: bool = _option("", "print what would run where, and start nothing")
    start_timeout: int = _option("N", "seconds that a machine may take to answer (60)", 60)
    max_restarts: int = _option("N", "after a failure start again, at most so often (0)", 0)
    min_nodes: int | None = _option("N", "restart with as few machines, when no spare one is left (all)")
    enable_each_rank_log: str | None = _option(
        "DIR", "also write each rank's output to DIR/<start time>_rank<N>.log, where it runs"
    )
    save_pid: bool = _option("", "keep the launcher's process id in <it>.ds in $XDG_RUNTIME_DIR (/tmp) while it runs")
    log_level: str | None = _option("LEVEL", "how much the launcher itself says (info)")
    quiet: bool = _option("", "only errors, as --log_level error", also="-q")

    @classmethod
    def on_command_line(cls) -> dict[str, Field[Any]]:
        """The fields that are options, by name."""
        return {option.name: option for option in fields(cls) if option.metadata}
