"""What people watch: `tensorboard`, `wandb`, `csv_monitor`, `comet`, `comms_logger`, `flops_profiler`."""

from typing import Literal

from deepspeedlite.config.base import Flag, Int, Number, Path, Section, Text, key


class TensorBoard(Section):
    """Metrics as TensorBoard event files."""

    SWITCH = "enabled"
    MAY_DIFFER = True

    enabled: Flag = key(False, "Write event files (needs the tensorboard package).")
    output_path: Path = key("", "Directory for the files; empty: below the current directory.")
    job_name: Text = key("DeepSpeedJobName", "Subdirectory for this run.")


class Wandb(Section):
    """Metrics to Weights & Biases."""

    SWITCH = "enabled"
    MAY_DIFFER = True

    enabled: Flag = key(False, "Log to W&B (needs the wandb package).")
    group: Text | None = key(None, "Group that the run belongs to.")
    team: Text | None = key(None, "Team (entity) that the run belongs to.")
    project: Text = key("deepspeed", "Project that the run belongs to.")


class CsvMonitor(TensorBoard):
    """Metrics as one CSV file each."""

    enabled: Flag = key(False, "Write CSV files.")


class Comet(Section):
    """Metrics to Comet; what is null is as in its own configuration (COMET_API_KEY, ~/.comet.config)."""

    SWITCH = "enabled"
    MAY_DIFFER = True

    enabled: Flag = key(False, "Log to Comet (needs the comet_ml package).")
    samples_log_interval: Int = key(100, "Samples between two points of a metric.", ge=1)
    project: Text | None = key(None, "Project of the experiment.")
    workspace: Text | None = key(None, "Workspace of the project.")
    api_key: Text | None = key(None, "API key; better in the environment, as COMET_API_KEY.")
    experiment_name: Text | None = key(None, "Name of the experiment.")
    experiment_key: Text | None = key(None, "Key of the experiment to go on with, or of the one to create.")
    online: Flag | None = key(None, "False: write an archive on this machine instead of sending.")
    mode: Literal["get", "create", "get_or_create"] | None = key(None, "Continue an experiment or start one.")


class Monitors(Section):
    """The keys of the monitors, which `DeepSpeedConfig` has beside its own."""

    tensorboard: TensorBoard = key(TensorBoard, "TensorBoard.")
    wandb: Wandb = key(Wandb, "Weights & Biases.")
    csv_monitor: CsvMonitor = key(CsvMonitor, "CSV files.")
    comet: Comet = key(Comet, "Comet.")


class CommsLogger(Section):
    """A record of every collective: how often, how large, how long."""

    SWITCH = "enabled"
    MAY_DIFFER = True

    enabled: Flag = key(False, "Record collectives. Each is synchronized, so training is slower.")
    verbose: Flag = key(False, "Log each one as it happens.")
    prof_all: Flag = key(True, "Record every operation.")
    debug: Flag = key(False, "Add the calling function's name to each record.")
    prof_ops: list[Text] = key(list, "Operations to record when prof_all is false.")


class FlopsProfiler(Section):
    """FLOPs, latency and parameters, module by module, at one step."""

    SWITCH = "enabled"
    MAY_DIFFER = True

    enabled: Flag = key(False, "Profile. Turns wall_clock_breakdown on.")
    recompute_fwd_factor: Number = key(0.0, "Share of the forward pass that backward recomputes.", ge=0)
    profile_step: Int = key(1, "Global step to profile; allow a few for warming up.", ge=0)
    module_depth: Int = key(-1, "Depth to which modules are listed; -1: all.", ge=-1)
    top_modules: Int = key(1, "Modules listed per depth in the summary.", ge=1)
    detailed: Flag = key(True, "Print the whole module tree too.")
    output_file: Path | None = key(None, "File for the report; null: standard output.")
