"""An environment: what env/NAME.yaml says of an image, checked as a whole. Every fault is told with file, line and key.

Adding an environment is adding a file. `python -m env check` reads them all, and the constraints beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepspeedlite.runtime.text import did_you_mean
from env.errors import ImageError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "env"
CONSTRAINTS = FOLDER / "constraints" / "python.txt"
OWN_LABELS = ("org.opencontainers.image.", "org.deepspeedlite.")
OLDEST_TORCH = (2, 10)

Key = tuple[str | int, ...]


def _pinned(image: str) -> str:
    name, _, tag = image.rpartition("/")[2].partition(":")
    if not name or re.search(r"\s", image):
        raise ValueError("is no image; write one as debian:bookworm-slim or nvidia/cuda:13.0.1-base-ubuntu24.04")
    if "@sha256:" not in image and tag in ("", "latest"):
        raise ValueError("names no version, so that builds would differ; write a tag other than latest, or a digest")
    return image


def _exact_torch(spec: str) -> str:
    found = re.fullmatch(r"torch==(\d+)\.(\d+)(\.\d+)?(\+[a-z0-9.]+)?", spec)
    if not found:
        raise ValueError("is no exact version; write it as torch==2.13.0 or torch==2.13.0+cpu")
    if (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise ValueError("is too old: deepspeedlite needs torch 2.10")
    return spec


def _known_op(name: str) -> str:
    ops = buildable_ops()
    if name not in ops:
        hint = did_you_mean(name, ops, otherwise=".", form="; did you mean {}?")
        raise ValueError(f"is no op{hint} The ops are {', '.join(ops)}")
    return name


Image = Annotated[str, AfterValidator(_pinned)]
Package = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Bases(_Part):
    """The images that the two stages start from. They must have the same distribution."""

    build: Image
    run: Image


class Packages(_Part):
    """What the distribution's package manager installs, beside Python, sshd and pdsh."""

    build: list[Package] = ["g++"]
    run: list[Package] = []


class Torch(_Part):
    """Which torch, and an index to look for it in beside PyPI."""

    spec: Annotated[str, AfterValidator(_exact_torch)]
    index: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""


class Environment(_Part):
    """One image. `archs` and `version` (of CUDA or ROCm) are for GPUs; no `ops` means all that there are."""

    about: str
    accelerator: Literal["cpu", "cuda", "rocm"]
    version: Annotated[str, Field(pattern=r"^(\d+\.\d+)?$")] = ""
    base: Bases
    python: Annotated[str, Field(pattern=r"^3\.1\d$")]
    packages: Packages = Packages()
    torch: Torch
    archs: list[str] = []
    ops: list[Annotated[str, AfterValidator(_known_op)]] = []
    labels: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Environment:
        pattern = {"cpu": None, "cuda": r"\d+\.\d+a?(\+PTX)?", "rocm": r"gfx[0-9a-f]+"}[self.accelerator]
        if pattern is None and (self.archs or self.version):
            raise ValueError("archs and version are for GPUs: leave them out, or name another accelerator")
        if pattern and not (self.archs and self.version):
            raise ValueError(f"accelerator {self.accelerator} needs version and archs")
        for arch in self.archs:
            if pattern and not re.fullmatch(pattern, arch):
                example = "9.0 or 9.0+PTX" if self.accelerator == "cuda" else "gfx942"
                raise ValueError(f"archs: {arch} is none of {self.accelerator}; write {example}")
        for label in self.labels:
            if label.startswith(OWN_LABELS):
                raise ValueError(f"labels: {label} is set by the build itself; choose another prefix")
        return self

    @property
    def dockerfile(self) -> str:
        """Which of the two."""
        return "Dockerfile.rocm" if self.accelerator == "rocm" else "Dockerfile.cuda"

    def arguments(self) -> dict[str, str]:
        """The Dockerfile's build arguments."""
        archs = "PYTORCH_ROCM_ARCH" if self.accelerator == "rocm" else "TORCH_CUDA_ARCH_LIST"
        return {
            "BASE_IMAGE": self.base.build,
            "RUNTIME_IMAGE": self.base.run,
            "PYTHON_VERSION": self.python,
            "BUILD_PACKAGES": " ".join(self.packages.build),
            "RUN_PACKAGES": " ".join(self.packages.run),
            "TORCH_SPEC": self.torch.spec,
            "TORCH_INDEX_URL": self.torch.index,
            "ACCELERATOR": self.accelerator,
            "ACCELERATOR_VERSION": self.version,
            archs: ";".join(self.archs),
            "OPS": " ".join(self.ops),
        }


def names() -> list[str]:
    """All environments, in the order of their names."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Environment:
    """The environment of that name, or of a file's path.

    Raises:
        ImageError: there is none, or with every fault in it.
    """
    path = FOLDER / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    if not path.is_file():
        hint = did_you_mean(name, names(), otherwise=".", form="; did you mean {}?")
        raise ImageError(f"there is no environment {name}{hint} They are {', '.join(names())}")
    return read(path)


def read(path: Path) -> Environment:
    """The environment in a file.

    Raises:
        ImageError: with every fault, a line each.
    """
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    lines: dict[Key, int] = {}
    faults: list[str] = []
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{shown}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ImageError(f"{shown}:{line}: not valid YAML: {error.problem}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ImageError(f"{shown}:1: not an environment: it must be keys with values; see env/cpu.yaml")
    value = _plain(root, (), lines, faults)
    faults = [f"{shown}:{fault}" for fault in faults]
    try:
        found = Environment.model_validate(value)
    except ValidationError as error:
        faults += [f"{shown}:{_line(fault['loc'], lines)}: {_explain(fault)}" for fault in error.errors()]
    if faults:
        raise ImageError("\n".join(faults))
    return found


def _plain(node: yaml.Node, key: Key, lines: dict[Key, int], faults: list[str]) -> Any:
    """The node as dict, list or value; `lines` gets where each key is, `faults` the keys that are there twice."""
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            inner, line = (*key, name), name_node.start_mark.line + 1
            if name in result:
                faults.append(f"{line}: {_dotted(inner)}: is on line {lines[inner]} already")
            lines.setdefault(inner, line)
            result[name] = _plain(value_node, inner, lines, faults)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, index), lines, faults) for index, item in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node)


def _line(key: Key, lines: Mapping[Key, int]) -> int:
    """Where a key is; of one that is not there, its nearest parent."""
    return next(lines[key[:end]] for end in range(len(key), -1, -1) if key[:end] in lines)


def _dotted(key: Key) -> str:
    return ".".join(map(str, key)) or "the file"


def _explain(fault: Mapping[str, Any]) -> str:
    key, kind = fault["loc"], fault["type"]
    where = _dotted(key)
    if kind == "extra_forbidden":
        siblings = _fields(key[:-1])
        hint = did_you_mean(str(key[-1]), siblings, otherwise=f"the keys here are {', '.join(siblings)}")
        return f"{where}: there is no such key; {hint}"
    if kind == "missing":
        return f"{where}: is missing"
    text = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error" and not key:
        return text
    if kind == "string_type":
        text = f'must be text; put it in quotes: "{fault["input"]}"'
    return f"{where}: {fault['input']!r} {text}" if kind == "value_error" else f"{where}: {text}"


def _fields(key: Key) -> list[str]:
    model: type[BaseModel] = Environment
    for name in key:
        model = model.model_fields[str(name)].annotation  # type: ignore[assignment]
    return list(model.model_fields)


def buildable_ops() -> list[str]:
    """The ops that have sources."""
    from deepspeedlite.ops.op_builder import OPS

    return list(OPS)


# --- the constraints --------------------------------------------------------------------------------------------------


def check_constraints(path: Path = CONSTRAINTS) -> list[str]:
    """The faults of a constraints file: lines that pin nothing, and what the package needs and it does not allow."""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    pins: dict[str, str] = {}
    faults = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pin = re.fullmatch(r"([a-z0-9][a-z0-9-]*)==([0-9][\w.]*)", line.strip())
        if not pin:
            faults.append(f"{shown}:{number}: {line.strip()}: pins no version; write name==version, in small letters")
        elif pin[1] in pins:
            faults.append(f"{shown}:{number}: {pin[1]} is pinned already")
        elif pin[1] == "torch":
            faults.append(f"{shown}:{number}: torch is pinned by each environment's torch.spec")
        else:
            pins[pin[1]] = pin[2]
    for name, specifier in _dependencies():
        if name != "torch" and name not in pins:
            faults.append(f"{shown}: pyproject.toml needs {name}, and no line pins it")
        elif name != "torch" and not specifier.contains(pins[name]):
            faults.append(f"{shown}: {name}=={pins[name]} is not the {name}{specifier} that pyproject.toml needs")
    return faults


def _dependencies() -> Iterator[tuple[str, Any]]:
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if block is None:
        raise ImageError("pyproject.toml: there are no dependencies")
    for quoted in re.findall(r'"([^"]+)"', block[1]):
        requirement = Requirement(quoted)
        yield requirement.name.lower(), requirement.specifier
