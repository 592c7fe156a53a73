"""Serves imports from the table: DeepSpeed's module paths under our name, and our name as `deepspeed`.

    deepspeedlite.runtime.engine    no file of ours: a module made of the table's names, each fetched when first used
    deepspeed.runtime.engine        the same module object
    deepspeed.comm                  our own module, the same object

[Note: one object under two names]
A finder in front of Python's own gives every `deepspeed.X` the module that `deepspeedlite.X` is. The import system
writes its specification into what a loader hands it, so the module's own is put back: reload, pickle and `python -m`
go on seeing the file it came from. A `__path__` that led both names to one folder would load every file twice.

[Note: names that are not here]
`from module import name` looks for a submodule when the module has no such attribute; so modules made here call
themselves packages, and the finder raises the table's reason. `hasattr` and `getattr` get an AttributeError with it.
Modules that have a file answer likewise for what the table lists and the file has not; their files know nothing of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from deepspeedlite.compat.drop_in import VERSION
from deepspeedlite.compat.drop_in.table import HOME, canonical, modules, why_absent
from deepspeedlite.runtime.errors import AbsentError
from deepspeedlite.runtime.leniency import be_lenient

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:
    Loader = MetaPathFinder = object  # importlib.abc imports tempfile and more: ten times what all of this takes

NAME = "deepspeed"


class Finder(MetaPathFinder):
    """Finds the modules below `root`, which is our name or the one we stand in for."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module that exists already, one made of the table's names, or None: Python looks for a file.

        Raises:
            AbsentError: DeepSpeed has it, and the table says why we do not.
        """
        root, _, name = fullname.partition(".")
        if root != self.root or not name:
            return None
        ours = canonical(name)
        if root != HOME or ours != name:
            return _same_as(fullname, f"{HOME}.{ours}")
        if name in modules():
            return _extended(fullname, path) or ModuleSpec(fullname, _FromTable(name))
        if why := why_absent(name):
            raise AbsentError(f"{NAME}.{name} is not in {HOME}: {why}")
        return None


def stand_in() -> None:
    """Make `deepspeed` the name of deepspeedlite in this process. Called by the stand-in package's import."""
    if not any(isinstance(finder, Finder) and finder.root == NAME for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(NAME))
    package = importlib.import_module(HOME)
    package.__version__ = VERSION  # type: ignore[attr-defined]  # scripts compare it with releases of DeepSpeed
    sys.modules[NAME] = package
    be_lenient()


def serve() -> None:
    """Serve DeepSpeed's module paths below our own name. Called by the package's import."""
    if not any(isinstance(finder, Finder) and finder.root == HOME for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(HOME))
        for path in modules().keys() - {""}:  # what this file itself imports is there already
            if (loaded := sys.modules.get(f"{HOME}.{path}")) is not None:
                _extend(loaded)


def name_of(module: str, name: str) -> Any:
    """What the module-level `__getattr__` of `module` answers for `name`: a submodule or the table's entry.

    Raises:
        AttributeError: the table has neither; with its reason, where it gives one.
    """
    path = module.removeprefix(HOME).lstrip(".")
    entry = modules().get(path, {}).get(name)
    if entry is not None and entry.home:
        value = getattr(importlib.import_module(f"{HOME}.{entry.home}"), entry.attribute)
        setattr(sys.modules[module], name, value)
        return value
    inside = f"{path}.{name}".lstrip(".")
    if canonical(inside) in modules():
        return importlib.import_module(f"{HOME}.{inside}")
    why = why_absent(inside)
    raise AttributeError(f"module {module!r} has no attribute {name!r}" + (f": {why}" if why else ""))


class _SameModule(Loader):
    """Gives out a module that goes by another name. See the note above."""

    def __init__(self, found: ModuleSpec) -> None:
        self._found = found

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._found.name)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own

    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m`."""
        code: CodeType | None = self._found.loader.get_code(self._found.name)  # type: ignore[union-attr]
        return code


class _Module(ModuleType):
    """A module of DeepSpeed's that is made of names from all over ours."""

    def __getattr__(self, name: str) -> Any:
        return name_of(self.__name__, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Importing `utils.z3_leaf_module` puts the module where `utils` has the function of that name.
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


class _FromTable(Loader):
    """Makes a module of the table's names."""

    def __init__(self, path: str) -> None:
        self._path = path

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name, f"The names of DeepSpeed's {self._path}; see docs/compatibility.md.")
        module.__path__ = []
        module.__all__ = [  # type: ignore[attr-defined]
            name for name, entry in modules()[self._path].items() if entry.home and not name.startswith("_")
        ]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass

    def get_code(self, fullname: str) -> CodeType:
        """For `python -m`: runs the module's `main`, where it has one."""
        entry = modules()[self._path].get("main")
        if entry is None:
            raise ImportError(f"{fullname} is not a command")
        return compile(f"from {HOME}.{entry.home} import main\nraise SystemExit(main())", fullname, "exec")


def _same_as(fullname: str, target: str) -> ModuleSpec | None:
    found = importlib.util.find_spec(target)
    if found is None:
        return None
    spec = ModuleSpec(fullname, _SameModule(found), origin=found.origin)
    spec.submodule_search_locations = found.submodule_search_locations
    return spec


class _Extended(SourceFileLoader):
    """Loads a module that has a file here, and lets it answer for what the table has beside."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _extend(module)


def _extend(module: ModuleType) -> None:
    """Let a module answer for names that its file knows nothing of."""
    own = vars(module).get("__getattr__")

    def of_file_or_table(name: str) -> Any:
        if own is None:
            return name_of(module.__name__, name)
        try:
            return own(name)
        except AttributeError as unknown:
            try:
                return name_of(module.__name__, name)
            except AttributeError as absent:
                why = why_absent(f"{module.__name__.partition('.')[2]}.{name}")
                raise (absent if why else unknown) from None

    vars(module).setdefault("__path__", [])  # see the note: a submodule that is not here has its reason
    module.__getattr__ = of_file_or_table  # type: ignore[method-assign]


def _extended(fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None and isinstance(spec.loader, SourceFileLoader):
        spec.loader = _Extended(fullname, spec.loader.path)
    return spec
