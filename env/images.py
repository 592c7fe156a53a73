"""From an environment to a tagged image: build, verify, name, push. And many of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from env import context
from env.build import Built, build, check_space
from env.engine import connect, explain
from env.environment import Environment, load
from env.errors import ImageError
from env.steps import Show
from env.verify import Checked, Expected, Layer, layers, verify


@dataclass(frozen=True)
class Choice:
    """What the command line says beyond the environment."""

    base: str = ""
    run_base: str = ""
    python: str = ""
    torch_spec: str = ""
    torch_index: str | None = None
    archs: str | None = None
    ops: str = ""
    max_jobs: str = ""
    wheels: Path | None = None
    with_jit: bool = False
    no_cache: bool = False
    repository: str = "deepspeedlite"
    push: bool = False
    verbose: bool = False


@dataclass
class Made:
    """How an image went. `tags` is empty where it was refused one."""

    name: str
    tags: Sequence[str] = ()
    built: Built | None = None
    checked: Sequence[Checked] = ()
    layers: Sequence[Layer] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    verify_s: float = 0.0
    problem: str = ""

    @property
    def size_bytes(self) -> int:
        """Of the whole image."""
        return sum(layer.size_bytes for layer in self.layers)


def arguments(environment: Environment, choice: Choice) -> dict[str, str]:
    """The build arguments: the environment's, then the command line's, then what the checkout is."""
    chosen = environment.arguments()
    chosen |= _bases(environment, choice)
    archs = "PYTORCH_ROCM_ARCH" if environment.accelerator == "rocm" else "TORCH_CUDA_ARCH_LIST"
    given = {"TORCH_SPEC": choice.torch_spec, "OPS": choice.ops.replace(",", " "), "MAX_JOBS": choice.max_jobs}
    chosen |= {name: value for name, value in given.items() if value}
    if choice.archs is not None:
        chosen[archs] = choice.archs
    if choice.torch_index is not None:
        chosen["TORCH_INDEX_URL"] = choice.torch_index
    elif context.has_torch(choice.wheels, chosen["TORCH_SPEC"]):
        chosen["TORCH_INDEX_URL"] = ""
    commit, commit_time = context.commit()
    return {
        **chosen,
        "WITH_JIT": str(int(choice.with_jit)),
        "VERSION": context.version(),
        "GIT_HASH": commit,
        "SOURCE_DATE_EPOCH": commit_time,
    }


def _bases(environment: Environment, choice: Choice) -> dict[str, str]:
    """A base that is given is of whatever distribution: its own Python 3 is taken unless that is given too."""
    build_base = choice.base or environment.base.build
    run_base = choice.run_base or choice.base or environment.base.run
    if choice.with_jit and environment.accelerator != "cpu" and not choice.run_base:
        run_base = build_base  # whose compilers for the GPU are needed
    python = choice.python or ("" if choice.base or choice.run_base else environment.python)
    return {"BASE_IMAGE": build_base, "RUNTIME_IMAGE": run_base, "PYTHON_VERSION": python}


def make(name: str, choice: Choice, show: Show) -> Made:
    """Build, verify and tag one image.

    Raises:
        ImageError: it could not be built, or is not pushed. One that fails its checks is returned, without a tag.
    """
    environment = load(name)
    given = arguments(environment, choice)
    client = connect()
    check_space(client, given, all(is_here(client, given[name]) for name in ("BASE_IMAGE", "RUNTIME_IMAGE")))
    show(f"building {name} from {given['BASE_IMAGE']}, to run on {given['RUNTIME_IMAGE']}, {given['TORCH_SPEC']}")
    for image in dict.fromkeys([given["BASE_IMAGE"], given["RUNTIME_IMAGE"]]):
        pull(client, image, show)
    how: dict[str, Any] = {"no_cache": choice.no_cache, "show": show, "verbose": choice.verbose}
    built = build(client, environment, given, choice.wheels, **how)
    of = f"{built.cached_steps} of {built.steps} steps from the cache"
    show(f"built in {built.seconds:.1f} s by {built.builder}, {of}; verifying")
    made = Made(name, built=built, layers=layers(client, built.image))
    made.checked, made.facts = verify(client, built.image, Expected(environment, given, choice.with_jit))
    made.verify_s = sum(row.seconds for row in made.checked)
    failed = [row for row in made.checked if not row.ok]
    if failed:
        look = f"to look into it: docker run --rm -it {built.image} bash"
        made.problem = f"{len(failed)} of {len(made.checked)} checks failed, so it gets no tag; {look}"
        return made
    suffix = "-jit" if choice.with_jit else ""
    made.tags = [f"{choice.repository}:{tag}{suffix}" for tag in (name, f"{given['VERSION']}-{name}")]
    for tag in made.tags:
        client.images.get(built.image).tag(tag)
    if choice.push:
        for tag in made.tags:
            push(client, tag, show)
    return made


def pull(client: Any, image: str, show: Show) -> None:
    """Get a base image that is not here.

    Raises:
        ImageError: its registry does not have it, or cannot be reached.
    """
    import docker

    if is_here(client, image):
        return
    show(f"pulling {image}")
    try:
        client.images.pull(image)
    except docker.errors.APIError as error:
        raise ImageError(explain(f"{image} cannot be pulled: {str(error.explanation or error).strip()}")) from error


def push(client: Any, tag: str, show: Show) -> None:
    """Send an image to its registry.

    Raises:
        ImageError: the registry refuses it or cannot be reached.
    """
    show(f"pushing {tag}")
    for message in client.api.push(tag, stream=True, decode=True):
        if "error" in message:
            remedy = ""
            if any(word in message["error"] for word in ("denied", "unauthorized", "authentication")):
                remedy = "; log in first (docker login), and name a repository of yours: --repository HOST/NAME"
            raise ImageError(f"{tag} is not pushed: {explain(message['error'])}{remedy}")


# --- many -------------------------------------------------------------------------------------------------------------


def make_all(chosen: Sequence[str], choice_of: Callable[[str], Choice], at_once: int, show: Show) -> list[Made]:
    """Those environments whose base images can be had here; the others are listed with the reason."""
    client = connect()

    def one(name: str) -> Made:
        choice = choice_of(name)
        try:
            given = arguments(load(name), choice)
            for image in (given["BASE_IMAGE"], given["RUNTIME_IMAGE"]):
                if reason := why_not(client, image):
                    return Made(name, problem=f"left out: {reason}")
            return make(name, choice, lambda line: show(f"{name}: {line}"))
        except ImageError as error:
            show("\n".join(f"{name}: {line}" for line in str(error).splitlines()))
            return Made(name, problem=next(iter(str(error).splitlines()), "failed"), built=Built("", 0, 0, 0))

    with ThreadPoolExecutor(max_workers=at_once) as pool:
        return list(pool.map(one, chosen))


def why_not(client: Any, image: str) -> str:
    """Why an image is to be had neither here nor from its registry; "" if it is."""
    import docker

    if is_here(client, image):
        return ""
    try:
        client.api.inspect_distribution(image)
    except docker.errors.APIError as error:
        return f"{image} is not here, and its registry says: {str(error.explanation or error).strip()}"
    return ""


def is_here(client: Any, image: str) -> bool:
    """Whether the engine has it."""
    import docker

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        return False
    return True
