"""docs/compatibility.md, generated from the table."""

from __future__ import annotations

from deepspeedlite.compat.drop_in import STANDS_IN_FOR
from deepspeedlite.compat.drop_in.entry import Names
from deepspeedlite.compat.drop_in.modules import ABSENT_MODULES, MODULES
from deepspeedlite.compat.drop_in.table import SAME_MODULE

INTRODUCTION = f"""\
# What was written for DeepSpeed

Scripts and libraries that say `import deepspeed` run on deepspeedlite without an edit, where somebody asks for it:

```sh
deepspeedlite --as_deepspeed train.py ...                                # one training, on every machine of it
PYTHONPATH=$(python -m deepspeedlite.drop_in path) python train.py ...   # one command, and all that it starts
python -m deepspeedlite.drop_in install                                  # this environment, until `uninstall`
```

`install` writes a `.pth` file and DeepSpeed's commands; it refuses where a real DeepSpeed is installed, unless
`--force` is given, and never touches another's file. Nobody gets the name without asking.

| command | what it is here |
| --- | --- |
| `deepspeed`, `ds`, `deepspeed.pt` | `deepspeedlite`, the [launcher](launcher.md) |
| `ds_ssh` | `dslite_ssh`, which takes `-f HOSTFILE` too |
| `ds_report`, `dsr` | `dslite_report`, and DeepSpeed's `--hide_operator_status` and `--hide_errors_and_warnings` |
| `ds_bench` | `dslite_bench`, with its own options: DeepSpeed's are other ones |
| `ds_io` | `dslite_io`; with DeepSpeed's options it measures one setting, reading and writing, beside fio |
| `ds_nvme_tune` | `dslite_io tune`, with DeepSpeed's `--nvme_dir`, `--io_size` and `--loops` |

`deepspeed` and every module below it are then the same objects as `deepspeedlite` and its modules, in child processes
too, however they are started. `importlib.metadata.version("deepspeed")` and `deepspeed.__version__` say
`{STANDS_IN_FOR}+lite`: the release whose names are served. `python -m deepspeed.launcher.runner` is our launcher. The
same module paths work under our own name, so that replacing `deepspeed` by `deepspeedlite` in a script is enough.

All modules of DeepSpeed {STANDS_IN_FOR} can be imported, and all public names that they define or have from each other;
so scripts run whose heads import what they never call. A name that is absent here raises an `AbsentError` (an
`ImportError`), which says why and what to use, when it is called or subclassed, and an `AttributeError` that says so
when something is read from it; `isinstance` is False of everything. Constants have DeepSpeed's values.
`importlib.util.find_spec` answers, and `hasattr` of the module is true, for all of them, as in DeepSpeed
{STANDS_IN_FOR}: code that falls back where one is missing does so for the sake of older releases, and uses what it has
found where it is asked to. `hasattr` of an absent name itself finds nothing in it. What this page does not name is
internal to DeepSpeed, and says so when it is used.
The keys of the configuration have a [reference of their own](config.md).

What public repositories import is counted: `tests/unit/client_names.txt` lists their names, each as one that works,
one of a capability that is absent, or an internal of DeepSpeed, and a test asks all of them.

Where a process has imported `deepspeed` and that is this library, three things in a configuration are taken as
DeepSpeed takes them, and said once each; under our own name alone they are errors:

- A value still `"auto"` in `initialize` means the key's default. So it is with DeepSpeed in its own sections; for
  batch sizes and the parameters of an optimizer or a schedule it dies of the text, and here the default counts too
  (a batch size, or a parameter without a default, must come from elsewhere).
- A key at the top level that is not known, such as `"zero_optimization.reduce_bucket_size"`, is passed over.
- `"stage": true` is stage 1, and `false` is 0.

## Clients

`make test-clients` trains small models with these, two CPU ranks each, without an edit to the client:

| client | what the tests cover |
| --- | --- |
| transformers' Trainer 5.24 | stages 0 to 3, its or DeepSpeed's optimizer, checkpoints, resuming, whole models saved |
| Accelerate 1.15 | stages 0 to 3, accumulation, `save_state` and `load_state`, `unwrap_model`, `get_state_dict` |
| Lightning 2.6 (Trainer and Fabric) | stages 0 to 3, modules built sharded, checkpoints and resuming |
| PEFT 0.21 | LoRA at stage 3, the adapter saved and loaded again |
| TRL 1.16 | supervised fine-tuning with a generation in between, DPO and GRPO, at stages 2 and 3 |
| LLaMA-Factory 0.9.5 | `make test-llamafactory`: its own configurations for SFT and DPO, resuming, saved weights |
| Megatron core 0.16 | its groups as the mpu, its split linear layers on four ranks, stages 0 to 3, checkpoints |

What was found, beside DeepSpeed {STANDS_IN_FOR} (DSL_PEER_PYTHON) and each client's own data parallelism:

| | Trainer | Accelerate | Lightning | Fabric | PEFT | TRL |
| --- | --- | --- | --- | --- | --- | --- |
| fp32 losses as with DeepSpeed, and as without, to 2e-5 | 0 to 3 | 0 to 3 | 0 to 3 | 0 to 3 | 3 | 2, 3 |
| bf16 losses as with DeepSpeed, to 5e-3 | 0 to 3 | 0 to 3 | 0 to 3 | 0 to 3 | 3 | 2, 3 |
| resumed as uninterrupted, fp32, to 1e-6 | 2, 3 | 2, 3 | 2, 3 | 2, 3 | | |

- In bf16 our stage 0 is held against DeepSpeed's stage 1: its stage 0 keeps no fp32 masters in bf16, ours does. Against
  its stage 0 the losses of six steps at a rate of 0.01 were 6e-3 apart.
- In bf16 the real zero.Init draws values in 16 bits whatever the layer asks for; ours lets the layer draw, and casts. A
  model built in fp32 therefore starts elsewhere (the first loss by 5e-3 here); Lightning's and Fabric's tests build
  theirs in bf16.
- A run that Lightning resumes is held against what its own data parallelism resumes with, to 2e-5: it draws data anew.
- On CPU ranks the clients themselves need help, of which `tests/clients/` has an example each: Accelerate must be told
  `gloo`; transformers takes `bf16=True` with `use_cpu=True` alone, and then needs `use_configured_state` lest it leave
  DeepSpeed out; Lightning demands a GPU, and its check is overridden. None of this has been run on GPUs.
- Times and memory beside DeepSpeed's are in [performance.md](performance.md#clients).

Lightning's `convert_zero_checkpoint_to_fp32_state_dict` opens DeepSpeed's own files, which
[a key of the checkpoint section](checkpoints.md#deepspeeds-layout) has `save_checkpoint` write; from our own files
`python -m deepspeedlite.checkpoint to_fp32` makes the same.

Generated by `python -m deepspeedlite.drop_in docs` from `deepspeedlite/drop_in/modules.py`; edit that, not this file.
A test compares it with DeepSpeed {STANDS_IN_FOR}, where that is installed: every name is there, and those that are
called the same take the same arguments.

- **same**: takes what DeepSpeed's takes, and does the same.
- **differs**: is there, and differs in what is said.
- **absent**: can be imported; an error with the reason when it is used.
"""


def render() -> str:
    """The page."""
    lines = [INTRODUCTION, "## Modules and names\n"]
    for path, names in MODULES.items():
        same = [other for other, ours in SAME_MODULE.items() if path == other and ours != path]
        lines.append(f"### `deepspeed{'.' + path if path else ''}`\n")
        if same:
            lines.append(f"The same module as `deepspeedlite.{SAME_MODULE[path]}`.\n")
        lines += ["| names | | |", "| --- | --- | --- |", *_rows(names), ""]
    lines += ["## Modules that are absent, with all below them\n", "| module | why, and what to use |", "| --- | --- |"]
    lines += [f"| `deepspeed.{path}` | {why} |" for path, why in ABSENT_MODULES.items() if not path.startswith("zero.")]
    return "\n".join(lines) + "\n"


def _rows(names: Names) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, entry in names.items():
        status = "absent" if not entry.home else "differs" if entry.note else "same"
        groups.setdefault((status, entry.note), []).append(f"`{name}`")
    order = {"same": 0, "differs": 1, "absent": 2}
    return [
        f"| {', '.join(found)} | {status} | {note} |"
        for (status, note), found in sorted(groups.items(), key=lambda g: order[g[0][0]])
    ]
