"""Serves imports from the table: DeepSpeed's module paths under our name, and our name as `deepspeed`.

    deepspeedlite.runtime.engine    no file of ours: a module made of the table's names, each fetched when first used
    deepspeed.runtime.engine        the same module object
    deepspeed.comm                  our own module, the same object

[Note: one object under two names]
A finder in front of Python's own gives every `deepspeed.X` the module that `deepspeedlite.X` is. The import system
writes its specification into what a loader hands it, so the module's own is put back: reload, pickle and `python -m`
go on seeing the file it came from. A `__path__` that led both names to one folder would load every file twice.

[Note: names that are not here]
Everything that DeepSpeed has can be imported. A name that is not here is an object that says why when it is used, see
absent.py; constants have their values, and names that DeepSpeed's modules have from each other are looked up where they
are from (release.py). What DeepSpeed has not is Python's ordinary error. Modules that have a file here answer likewise
for what their files know nothing of.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from deepspeedlite.compat.drop_in import HOME, NAME, VERSION
from deepspeedlite.runtime.plugins import plugins

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:
    Loader = MetaPathFinder = object  # importlib.abc imports tempfile and more: ten times what all of this takes


class Finder(MetaPathFinder):
    """Finds the modules below `root`, which is our name or the one we stand in for."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module that exists already, one with a file, one made of names, or None: there is none. Raises nothing."""
        root, _, name = fullname.partition(".")
        if root != self.root or not name or fullname.startswith(f"{__package__}."):
            return None
        from deepspeedlite.compat.drop_in.table import canonical, is_module, modules  # not before somebody asks

        ours = canonical(name)
        if root != HOME or ours != name:
            return _same_as(fullname, f"{HOME}.{ours}")
        if name in modules():
            return _extended(fullname, path) or ModuleSpec(fullname, _FromTable(name))
        # Our own files are found before it is asked what DeepSpeed has, which is read from a file.
        found = PathFinder.find_spec(fullname, path)
        return found or (ModuleSpec(fullname, _FromTable(name)) if is_module(name) else None)


def stand_in() -> None:
    """Make `deepspeed` the name of deepspeedlite in this process. Called by the stand-in package's import."""
    if not any(isinstance(finder, Finder) and finder.root == NAME for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(NAME))
    package = importlib.import_module(HOME)
    package.__version__ = VERSION  # type: ignore[attr-defined]  # scripts compare it with releases of DeepSpeed
    sys.modules[NAME] = package
    plugins.add("configuration", "pass over", f"{HOME}.compat.lenient_config:pass_over")


def serve() -> None:
    """Serve DeepSpeed's module paths below our own name. Called by the package's import."""
    if not any(isinstance(finder, Finder) and finder.root == HOME for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(HOME))
        for name, loaded in tuple(sys.modules.items()):  # what this file itself imports is there already
            if name.startswith(f"{HOME}.") and name != __package__ and hasattr(loaded, "__path__"):
                _extend(loaded)


def name_of(module: str, name: str) -> Any:
    """What the module-level `__getattr__` of `module` answers for `name`. It is asked once for each name that there is.

    Raises:
        AttributeError: neither the table nor DeepSpeed has it.
    """
    path = module.removeprefix(HOME).lstrip(".")
    value = _value_of(path, name)
    setattr(sys.modules[module], name, value)
    return value


def _value_of(path: str, name: str) -> Any:
    from deepspeedlite.compat.drop_in import table

    entry = table.modules().get(path, {}).get(name)
    if entry is None:
        return _value_in_release(path, name)
    return getattr(_ours(entry.home), entry.attribute) if entry.home else _absent(path, name)


def _value_in_release(path: str, name: str) -> Any:
    """What DeepSpeed has beside what the table lists."""
    from deepspeedlite.compat.drop_in import release, table

    unknown = AttributeError(f"module {f'{HOME}.{path}'.rstrip('.')!r} has no attribute {name!r}")
    if name.startswith("__"):
        raise unknown
    if table.is_gone(path):
        return _absent(path, name)
    inside = f"{path}.{name}".lstrip(".")
    if table.is_module(table.canonical(inside)):
        return _ours(inside)
    there = [found for one in table.theirs(path) if (found := release.module(one)) is not None]
    for found in there:
        if name in found.values:
            return found.values[name]
    if any(name in found.names for found in there):
        return _absent(path, name)
    for module, given in (origin for found in there for origin in found.origins_of(name)):
        if (table.canonical(module), given) != (path, name):
            return getattr(_ours(module), given)
    raise unknown


def _absent(path: str, name: str) -> Any:
    from deepspeedlite.compat.drop_in import absent, table

    full = ".".join(filter(None, (NAME, path, name)))
    return absent.absent(_ours(path).__name__, name, f"{full} is not in {HOME}: {table.why_absent(path, name)}")


def _ours(path: str) -> ModuleType:
    return importlib.import_module(f"{HOME}.{path}".rstrip("."))


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

    @property
    def __all__(self) -> list[str]:
        """Public names, for `import *`: absent ones too."""
        from deepspeedlite.compat.drop_in.table import names_of

        return sorted(name for name in names_of(self.__name__.removeprefix(f"{HOME}.")) if not name.startswith("_"))


class _FromTable(Loader):
    """Makes a module of the table's names."""

    def __init__(self, path: str) -> None:
        self._path = path

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name, f"The names of DeepSpeed's {self._path}; see docs/compatibility.md.")
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass

    def get_code(self, fullname: str) -> CodeType:
        """For `python -m`: runs the module's `main`, where it has one."""
        from deepspeedlite.compat.drop_in.table import modules

        entry = modules().get(self._path, {}).get("main")
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
            except AttributeError:
                raise unknown from None

    vars(module).setdefault("__path__", [])  # DeepSpeed may have a package where we have a file
    module.__getattr__ = of_file_or_table  # type: ignore[method-assign]


def _extended(fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
    spec = PathFinder.find_spec(fullname, path)
    if spec is not None and isinstance(spec.loader, SourceFileLoader):
        spec.loader = _Extended(fullname, spec.loader.path)
    return spec
