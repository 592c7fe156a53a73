"""The name `deepspeed`: the same objects under two names, in every kind of child, and a table that tells the truth."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

from deepspeedlite.compat.drop_in import VERSION, release
from deepspeedlite.compat.drop_in.absent import Absent
from deepspeedlite.compat.drop_in.docs import render
from deepspeedlite.compat.drop_in.install import COMMANDS
from deepspeedlite.compat.drop_in.modules import ABSENT_MODULES, MODULES
from deepspeedlite.launcher.stand_in import with_stand_in
from deepspeedlite.runtime.errors import AbsentError


def run(code: str, *flags: str, **more: str) -> str:
    """What a new Python prints that finds the stand-in on its path."""
    environ = with_stand_in({**os.environ, "PYTHONPATH": str(ROOT), **more})
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_both_names_are_the_same_objects():
    print_all = """
import deepspeed, deepspeedlite, deepspeed.comm, deepspeedlite.comm, pickle, importlib
import deepspeed.runtime.engine as theirs, deepspeedlite.runtime.engine as ours
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero import ZeroParamStatus as again
from deepspeed.ops.adam.fused_adam import FusedAdam
import deepspeed.zero
assert deepspeed is deepspeedlite and deepspeed.comm is deepspeedlite.comm and theirs is ours
assert deepspeed.comm.comm is deepspeed.comm and deepspeed.runtime.zero is deepspeed.zero
assert deepspeed.runtime.zero.partition_parameters.Init is deepspeed.zero.Init
assert ZeroParamStatus is again and deepspeed.ops.adam.FusedAdam is FusedAdam
assert theirs.DeepSpeedEngine is deepspeed.DeepSpeedEngine
from deepspeedlite.engine import DeepSpeedEngine, Engine  # where it was before, and as pickles of then name it
assert DeepSpeedEngine is theirs.DeepSpeedEngine and issubclass(DeepSpeedEngine, Engine)
assert issubclass(deepspeed.PipelineEngine, DeepSpeedEngine)
assert pickle.loads(b"cdeepspeedlite.engine\\nDeepSpeedEngine\\n.") is DeepSpeedEngine
from deepspeedlite.factory import initialize
assert initialize is deepspeed.initialize
assert deepspeed.checkpointing is deepspeed.runtime.activation_checkpointing.checkpointing
assert pickle.loads(pickle.dumps(ZeroParamStatus.AVAILABLE)) is ZeroParamStatus.AVAILABLE
assert deepspeed.comm.__spec__.name == deepspeed.comm.__name__ == "deepspeedlite.comm"
assert importlib.reload(deepspeed.comm) is deepspeedlite.comm
import sys
theirs = {n: m for n, m in sys.modules.items() if n.startswith("deepspeed.")}
twice = [n for n, module in theirs.items() if module is not sys.modules[module.__name__]]
assert not twice, twice
"""
    run(print_all)


def test_what_libraries_ask_before_they_import():
    code = """
import importlib.metadata, importlib.util
print(importlib.metadata.version("deepspeed"), *(importlib.util.find_spec(name) is not None for name in {names}))
import deepspeed
print(deepspeed.__version__, deepspeed.git_version_info.version, importlib.util.find_spec("deepspeed") is not None)
"""
    names = ["deepspeed", "deepspeed.comm", "deepspeed.runtime.engine", "deepspeed.none"]
    first, then = run(code.replace("{names}", str(names))).splitlines()
    assert first == f"{VERSION} True True True False"
    assert then == f"{VERSION} {VERSION} True"


def test_the_import_is_light():
    loaded = set(run("import deepspeed, sys; print(*sys.modules)").split())
    assert not loaded & {"torch", "numpy", "pydantic", "rich"}


@pytest.mark.slow_unless(method="fork")
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_children_have_the_name(method, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(f"""
import multiprocessing, deepspeed
def child(queue):
    import deepspeed.runtime.lr_schedules as schedules
    import deepspeedlite
    queue.put((deepspeed is deepspeedlite, schedules.VALID_LR_SCHEDULES[0]))
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(*queue.get())
    process.join()
""")
    environ = with_stand_in({**os.environ, "PYTHONPATH": str(ROOT)})
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environ)
    assert done.stdout.split() == ["True", "LRRangeTest"], done.stderr


# How public code looks before it leaps: each line is of a repository of its own, in our words.
PROBES = """
import importlib.util, deepspeed, deepspeed.comm as comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
assert not hasattr(deepspeed, "is_initialized") and not hasattr(deepspeed.utils, "is_initialized")
assert not hasattr(deepspeed.zero, "is_initialized") and getattr(deepspeed, "_ds_args", None) is None
if not hasattr(DeepSpeedZeroOptimizer, "train"):
    DeepSpeedZeroOptimizer.train = lambda self: self
cdb = getattr(comm, "cdb", None)  # patched method by method where it has them
assert [name for name in ("all_reduce", "broadcast") if hasattr(cdb, name)] == []
comm.cdb = None  # between two tests
try:
    from deepspeed.runtime.fp16.onebit_adam import OnebitAdam
except ImportError:  # of releases long ago
    OnebitAdam = None
assert OnebitAdam is None
try:
    from deepspeed.checkpoint import VOCABULARY_PARAMETER_PATTERNS, TP_REPLICATED_PARAMETER_PATTERNS
except ImportError:
    VOCABULARY_PARAMETER_PATTERNS = None
assert isinstance(VOCABULARY_PARAMETER_PATTERNS, str)
try:
    from deepspeed.sequence.layer import DistributedAttention
    supported = True
except ImportError:
    supported = False
assert supported  # it is asked for by an option of its own, and then says why it is not here
try:
    DistributedAttention(None, None)
except ImportError as error:
    assert "DistributedAttention is not in deepspeedlite" in str(error)
assert importlib.util.find_spec("deepspeed.ops.deepspeed4science") is not None  # likewise
assert importlib.util.find_spec("deepspeed.launcher.runner") is not None
print("looked")
"""


@pytest.mark.slow
def test_looking_first_leads_nowhere_that_fails() -> None:
    assert run(PROBES) == "looked"


@pytest.mark.slow
def test_modules_are_reached_from_their_parents_without_an_import():
    """As clients do, which DeepSpeed's own imports allow: `deepspeed.utils.logging.logger` after `import deepspeed`."""
    paths = sorted(path for path in MODULES if path)  # and all others, below
    code = f"import deepspeed, operator\nfor path in {paths}: operator.attrgetter(path)(deepspeed)\nprint('all')"
    assert run(code) == "all"


@pytest.mark.parametrize("module, says", [("launcher.runner", "deepspeedlite"), ("env_report", "dslite_report")])
def test_modules_run_as_commands(module, says):
    environ = with_stand_in({**os.environ, "PYTHONPATH": str(ROOT)})
    argv = [sys.executable, "-m", f"deepspeed.{module}", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and f"usage: {says}" in done.stdout, done.stdout + done.stderr


def test_the_launcher_gives_the_name_when_asked(tmp_path):
    """With --as_deepspeed every rank has it; without, no rank."""
    script = tmp_path / "train.py"
    script.write_text("import os, deepspeed\nprint(os.environ['RANK'], deepspeed.__name__, flush=True)\n")
    base = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", "2", "--master_port", "0"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*base, "--as_deepspeed", str(script)], capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and "0 deepspeedlite" in done.stdout and "1 deepspeedlite" in done.stdout, done.stderr
    done = subprocess.run([*base, str(script)], capture_output=True, text=True, env=environ)
    assert done.returncode != 0 and "No module named 'deepspeed'" in done.stdout + done.stderr


@pytest.fixture
def environment(tmp_path) -> Path:
    """A virtual environment that finds this checkout, and this environment's packages, by a `.pth`."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "under_test.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return tmp_path / "env"


def drop_in(environment: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [environment / "bin" / "python", "-m", "deepspeedlite.drop_in", *argv], capture_output=True, text=True
    )


def isolated(environment: Path) -> str:
    """Where an isolated Python of the environment has `deepspeed` from."""
    code = "import deepspeed; print(deepspeed.__name__)"
    done = subprocess.run([environment / "bin" / "python", "-I", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_install_and_uninstall(environment):
    """An environment has the name from one to the other, isolated Pythons and the command too; no file stays."""
    before = sorted(environment.rglob("*"))
    assert "No module named" in isolated(environment)
    done = drop_in(environment, "install")
    assert done.returncode == 0 and done.stdout.count("wrote") == 1 + len(COMMANDS), done.stderr
    assert isolated(environment) == "deepspeedlite"
    command = subprocess.run([environment / "bin" / "deepspeed", "--version"], capture_output=True, text=True)
    assert command.stdout.startswith("deepspeedlite "), command.stderr
    says = {"ds_ssh": "dslite_ssh", "ds_bench": "dslite_bench", "ds_io": "ds_io", "ds_report": "dslite_report"}
    says |= {
        "ds": "deepspeedlite",
        "deepspeed.pt": "deepspeedlite",
        "dsr": "dslite_report",
        "ds_nvme_tune": "ds_nvme_tune",
    }
    for name, usage in says.items():
        command = subprocess.run([environment / "bin" / name, "--help"], capture_output=True, text=True)
        assert command.returncode == 0 and f"usage: {usage}" in command.stdout, (name, command.stderr)
    assert says.keys() | {"deepspeed"} == COMMANDS.keys()
    assert drop_in(environment, "install").returncode == 0  # twice is as good as once
    assert drop_in(environment, "uninstall").stdout.count("removed") == 1 + len(COMMANDS)
    assert "No module named" in isolated(environment)
    assert [path for path in sorted(environment.rglob("*")) if path not in before and path.name != "__pycache__"] == []


def test_install_respects_a_real_deepspeed(environment):
    """Refused unless forced; then the real one is hidden, its command stays, and uninstalling shows it again."""
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "deepspeed").mkdir()
    (site / "deepspeed" / "__init__.py").write_text("")
    (site / "deepspeed-0.17.0.dist-info").mkdir()
    (site / "deepspeed-0.17.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.17.0\n"
    )
    (environment / "bin" / "deepspeed").write_text("#!/bin/sh\necho real\n")
    done = drop_in(environment, "install")
    assert done.returncode == 1 and "DeepSpeed 0.17.0 is installed" in done.stderr and "--force" in done.stderr
    assert isolated(environment) == "deepspeed"
    assert drop_in(environment, "install", "--force").returncode == 0
    assert isolated(environment) == "deepspeedlite"
    assert (environment / "bin" / "deepspeed").read_text() == "#!/bin/sh\necho real\n"
    assert drop_in(environment, "uninstall").stdout.count("removed") == len(COMMANDS)  # all but its own
    assert (environment / "bin" / "deepspeed").exists()
    assert isolated(environment) == "deepspeed"


# --- the table --------------------------------------------------------------------------------------------------------


def name_in(path: str) -> str:
    return f"deepspeedlite.{path}" if path else "deepspeedlite"


def assert_absent(value: object, why: str) -> None:
    """Whatever is done with an absent name says why, but for what scripts do without wanting anything of it."""
    assert isinstance(value, Absent) and not isinstance(1, value) and (value | None) and value
    uses = [
        value,
        lambda: type(value)("Mine", (value,), {}),
        lambda: value[0],
        lambda: 1 in value,
    ]
    for use in (*uses, lambda: list(value), lambda: len(value)):
        with pytest.raises(AbsentError) as raised:
            use()
        assert "is not in deepspeedlite" in str(raised.value) and why in str(raised.value)
    with pytest.raises(AttributeError, match=r"anything: .* is not in deepspeedlite") as raised:
        value.anything  # noqa: B018
    assert why in str(raised.value)
    assert not hasattr(value, "forward") and getattr(value, "anything", 3) == 3 and not hasattr(value, "_private")
    assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.parametrize("path", MODULES)
def test_every_entry_is_what_it_says(path):
    """What is there can be had in every way; what is absent can be imported, and says why when it is used."""
    module = importlib.import_module(name_in(path))
    for name, entry in MODULES[path].items():
        value = getattr(module, name)
        exec(f"from {name_in(path)} import {name}", {})
        if entry.home:
            assert value is not None and not isinstance(value, Absent)
        elif not isinstance(value, ModuleType):
            assert_absent(value, entry.note)


@pytest.mark.parametrize("path", ABSENT_MODULES)
def test_absent_modules_say_why(path):
    module = importlib.import_module(name_in(path))
    defined = release.module(path)
    names = {name for name in (defined.names if defined else ["anything"]) if not name.startswith("_")}
    for name in names - MODULES.get(path, {}).keys():
        assert_absent(getattr(module, name), ABSENT_MODULES[path])
    inside = ROOT.joinpath("deepspeedlite", *path.split("."))
    assert not inside.exists() and not inside.with_suffix(".py").exists(), "there is a file of ours at an absent path"


@pytest.mark.slow
def test_all_that_deepspeed_has_is_answered_for():
    """Each of its modules is found and imported, from its parents too, and each of its names is there or says why."""
    code = """
import importlib.util, operator, deepspeed
from pathlib import Path
from deepspeedlite.compat.drop_in import release, table
count = 0
for path in release.paths()[1:]:
    assert importlib.util.find_spec(f"deepspeed.{path}") is not None, path
    module = importlib.import_module(f"deepspeed.{path}")
    assert module is operator.attrgetter(path)(deepspeed), path
    file = Path(deepspeed.__file__).parent.joinpath(*table.canonical(path).split("."))
    ours = file.exists() or file.with_suffix(".py").exists()
    assert not ours or table.canonical(path) in table.modules(), f"{path} is a file of ours: list it in BOTH_HAVE"
    for name in release.names_of(path):
        getattr(module, name)
        count += 1
assert importlib.util.find_spec("deepspeed.moe.no_such_module") is None
print(count)
"""
    assert int(run(code)) > 9000


@pytest.mark.slow
def test_scripts_import_what_they_never_call():
    """As DeepSpeed's CIFAR example and DeepSpeed-Chat do at their heads; names from elsewhere are the same objects."""
    code = """
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.compression.helper import *
from deepspeed.runtime.pipe.engine import *
import deepspeed.moe.layer, deepspeed.runtime.engine
assert deepspeed.runtime.engine.MoE is deepspeed.moe.layer.MoE
assert DeepSpeedEngine is deepspeed.DeepSpeedEngine
print("all")
"""
    assert run(code) == "all"


def test_constants_have_deepspeeds_values():
    """Those that the table does not list too, each of its own type."""
    count, ours = 0, {"env_report.INFO"}  # a level of our own report's
    for path in release.paths():
        defined = release.module(path)
        module = importlib.import_module(name_in(path)) if defined and defined.values else None
        for name in (defined.values.keys() - MODULES.get(path, {}).keys()) if defined else ():
            value = defined.values[name]
            if f"{path}.{name}" in ours:
                continue
            assert (getattr(module, name), type(getattr(module, name))) == (value, type(value)), f"{path}.{name}"
            count += 1
    assert count > 800
    from deepspeedlite.runtime import constants

    assert constants.STEPS_PER_PRINT_DEFAULT is None and constants.GRADIENT_CLIPPING_DEFAULT == 1.0


def test_a_name_that_nobody_has_is_an_ordinary_error():
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'") as raised:
        exec("from deepspeedlite.runtime.engine import no_such_name", {})
    assert not isinstance(raised.value, AbsentError)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("deepspeedlite.runtime.no_such_module")


@pytest.mark.slow
def test_no_module_takes_the_place_of_a_name_that_ours_use():
    """Python puts an imported module into its parent, whatever had that name there."""
    code = """
import importlib
from deepspeedlite.compat.drop_in.release import paths
for path in filter(None, paths()):
    parent, _, name = f"deepspeedlite.{path}".rpartition(".")
    parent = importlib.import_module(parent)
    before = vars(parent).get(name)
    importlib.import_module(f"deepspeedlite.{path}")
    if before is not None and before is not vars(parent)[name]:
        print(path)
"""
    assert run(code) == ""


def test_names_may_be_replaced():
    """As transformers replaces a constructor's wrapper around zero.Init, and puts it back."""
    from deepspeedlite.runtime.zero import partition_parameters as pp

    original = pp.zero_wrapper_for_fp_tensor_constructor
    assert original(len, None) is len
    pp.zero_wrapper_for_fp_tensor_constructor = None
    assert (
        importlib.import_module(
            "deepspeedlite.runtime.zero.partition_parameters"
        ).zero_wrapper_for_fp_tensor_constructor
        is None
    )
    pp.zero_wrapper_for_fp_tensor_constructor = original


def test_documentation_is_generated():
    assert (ROOT / "docs" / "compatibility.md").read_text() == render(), "run: python -m deepspeedlite.drop_in docs"


# --- against the real DeepSpeed ---------------------------------------------------------------------------------------

ASK_PEER = """
import importlib, inspect, json, sys
asked, answer = json.loads(sys.stdin.read()), {}
def parameters(value):
    try:
        if inspect.isclass(value) and issubclass(value, BaseException) or not callable(value):
            return None
        all = inspect.signature(value).parameters.values()
        return [p.name for p in all if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    except (ValueError, TypeError):
        return None
for path, names in asked.items():
    module = importlib.import_module("deepspeed." + path if path else "deepspeed")
    answer[path] = {name: parameters(getattr(module, name)) if hasattr(module, name) else "absent" for name in names}
print("ANSWER" + json.dumps(answer))
"""


@pytest.mark.slow
def test_the_table_against_the_real_deepspeed():
    """Every name exists there; what is called the same takes the same arguments, by the same names."""
    if "DSL_PEER_PYTHON" not in os.environ:
        pytest.skip("needs the real DeepSpeed: set DSL_PEER_PYTHON to the Python of an environment that has it")
    asked = json.dumps({path: list(names) for path, names in MODULES.items()})
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [os.environ["DSL_PEER_PYTHON"], "-c", ASK_PEER], input=asked, capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.rpartition("ANSWER")[2])
    wrong = []
    for path, names in MODULES.items():
        for name, entry in names.items():
            found = theirs[path][name]
            if found == "absent":
                wrong.append(f"{path}.{name}: DeepSpeed has no such name")
            elif found and entry.home and not entry.note:
                ours = inspect.signature(getattr(importlib.import_module(name_in(path)), name)).parameters.values()
                missing = set(found) - {parameter.name for parameter in ours}
                if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours):
                    wrong.append(f"{path}.{name}: does not take {sorted(missing)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_release_is_written_down_as_it_is():
    """deepspeed_names.json is what the tool makes of the installed release, and its values are those of its modules."""
    if "DSL_PEER_PYTHON" not in os.environ:
        pytest.skip("needs the real DeepSpeed: set DSL_PEER_PYTHON to the Python of an environment that has it")
    constants = {path: [*found.values] for path in release.paths() if (found := release.module(path)) and found.values}
    code = """
import importlib, importlib.util, json, sys
answer = {}
for path, names in json.loads(sys.stdin.read()).items():
    try:
        module = importlib.import_module(f"deepspeed.{path}".rstrip("."))
    except Exception:
        continue  # needs a GPU, or a package that is not there
    answer[path] = {name: getattr(module, name) for name in names if hasattr(module, name)}
where = importlib.util.find_spec("deepspeed").submodule_search_locations[0]
print("ANSWER" + json.dumps([where, answer], default=repr))
"""
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    argv = [os.environ["DSL_PEER_PYTHON"], "-c", code]
    done = subprocess.run(argv, input=json.dumps(constants), capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    package, theirs = json.loads(done.stdout.rpartition("ANSWER")[2])
    ours = {path: json.loads(json.dumps(dict(release.module(path).values))) for path in theirs}
    wrong = [f"{p}.{n}" for p, found in theirs.items() for n, value in found.items() if ours[p][n] != value]
    assert not wrong and sum(map(len, theirs.values())) > 700
    tool = subprocess.run(
        [sys.executable, ROOT / "tools" / "deepspeed_names.py", package, "--output", "/dev/stdout"],
        capture_output=True,
        text=True,
    )
    assert tool.stdout == Path(release.__file__).with_name("deepspeed_names.json").read_text(), "run the tool again"


ENGINE_METHODS = """
forward backward step train eval zero_grad no_sync is_gradient_accumulation_boundary set_gradient_accumulation_boundary
save_checkpoint load_checkpoint save_16bit_model get_global_grad_norm get_lr get_mom train_batch_size
train_micro_batch_size_per_gpu gradient_accumulation_steps set_train_batch_size zero_optimization
zero_optimization_stage fp16_enabled bfloat16_enabled gradient_clipping deepspeed_io module_state_dict
zero_gather_16bit_weights_on_model_save _zero3_consolidated_16bit_state_dict _consolidated_16bit_state_dict destroy
compile was_step_applied scale save_fp16_model loss_scale get_batch_info set_train_micro_batch_size get_data_types
"""


@pytest.mark.slow
def test_the_engine_against_the_real_deepspeed():
    """The methods that scripts and clients call take what DeepSpeed's take."""
    if "DSL_PEER_PYTHON" not in os.environ:
        pytest.skip("needs the real DeepSpeed: set DSL_PEER_PYTHON to the Python of an environment that has it")
    code = ASK_PEER.replace(
        'importlib.import_module("deepspeed." + path if path else "deepspeed")',
        "importlib.import_module(path).DeepSpeedEngine",
    )
    public = """
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
print("PUBLIC", *(name for name in dir(DeepSpeedEngine) if name[0] != "_" and not hasattr(torch.nn.Module, name)))
"""
    asked = json.dumps({"deepspeed.runtime.engine": ENGINE_METHODS.split()})
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [os.environ["DSL_PEER_PYTHON"], "-c", public + code], input=asked, capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.rpartition("ANSWER")[2])["deepspeed.runtime.engine"]
    from deepspeedlite import DeepSpeedEngine
    from deepspeedlite.compat.engine_accessors import ABSENT

    names = set(done.stdout.partition("PUBLIC")[2].splitlines()[0].split())
    assert len(names) > 150
    assert {name for name in names if not hasattr(DeepSpeedEngine, name)} == set(ABSENT)
    wrong = []
    said = {"destination", "prefix", "keep_vars", "compiled_autograd_enabled", "schedule"}  # in docs/compatibility.md
    for name in ENGINE_METHODS.split():
        if theirs[name] == "absent":
            wrong.append(f"{name}: DeepSpeed has no such method")
            continue
        ours = inspect.signature(getattr(DeepSpeedEngine, name)).parameters
        missing = set(theirs[name]) - set(ours) - said
        if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values()):
            wrong.append(f"{name}: does not take {sorted(missing)}")
    assert not wrong, "\n".join(wrong)
