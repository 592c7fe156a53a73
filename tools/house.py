"""What the house looks like: sizes, walls and habits of the package, by its syntax trees and its import graph.

    python tools/house.py [CHECKOUT]               a table of every room, and what is counted over all of them
    python tools/house.py --svg FILE [CHECKOUT]    a drawing of the rooms, by who imports whom

A room is a folder or file of `deepspeedlite/`; `checkpoint/formats`, `comm/guard` and `parallel/replica`
are rooms of their own.
Lines of code are those that hold something else than a comment or a docstring. Only the standard library is needed.

What counts as what:

- core: the rooms of `CORE`, without their `__main__.py`.
- cycle: modules that import each other, deferred imports (inside functions) included; what is imported for types only
  is not. A module's import of another does not count as one of the packages that hold it.
- foreign store: an assignment to, or a deletion of, an attribute of another object. `self.x` and `cls.x` are one's own,
  and so is `local.x` where `local` was made in the same function by calling a class, or is a function defined there;
  `self.part.x` is foreign. It crosses a border where no class of the same room has that attribute, and one of another
  room has; it is of others where no class of the package has it, or torch's tensors do.
- callback slot: an attribute that a class annotates with a Callable and that is stored from outside, as above.
- public: no name on the way to it starts with an underscore.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "deepspeedlite"
CORE = ("engine", "factory", "config", "runtime", "comm", "zero", "offload", "optim")
CORE += ("comm/guard", "parallel/replica", "checkpoint")
OWN_ROOMS = ("checkpoint/formats", "comm/guard", "parallel/replica")
MAX_FUNCTION_LINES = 60
# What the drawing says under a room's name; the lowest first.
NOTES = {
    "runtime": "world, device, log, errors",
    "host": "processors, tables as text",
    "config": "keys, checks, recipes",
    "launcher": "starts ranks on hosts",
    "env_report": "what a machine has",
    "comm": "groups and transports",
    "comm/guard": "keeps strangers out",
    "ops": "compiled ops and oracles",
    "parallel/replica": "a model over several ranks",
    "offload": "device, host or disk",
    "zero": "flat buffers, units, prefetch",
    "optim": "masters, step, schedules",
    "preflight": "does it all fit?",
    "data": "loaders",
    "metrics": "train log, monitors, stalls",
    "activation_checkpointing": "recomputation",
    "checkpoint": "save, load, manifest",
    "checkpoint/formats": "DeepSpeed, Hugging Face",
    "engine": "the training interface",
    "factory": "builds an engine",
    "parallel": "pipelines",
    "inference": "engines, loading, splitting",
    "tools": "bench, memory plans",
    "compat": "DeepSpeed's names",
    "(root)": "lazy: imports no torch",
}
THIN_LINES = 100  # a room outside the core with less code only passes names on, and is not drawn
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef)
_LAYOUT_TOKENS = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_TENSORS_OWN = {"grad", "data", "requires_grad"}
_DIRECTIVES = ("# noqa", "# type:", "# fmt:", "# pragma:", "# mypy:")


@dataclass(frozen=True, kw_only=True)
class Store:
    """A store to an attribute of another object."""

    where: str
    room: str
    target: str
    attribute: str


@dataclass(kw_only=True)
class Source:
    """One file of the package, and what its text shows."""

    path: Path
    module: str
    room: str
    lines: int
    code: int
    comments: int
    imports: frozenset[str] = frozenset()
    stores: list[Store] = field(default_factory=list)
    attributes: frozenset[str] = frozenset()
    """Names of attributes that its classes have."""
    callables: frozenset[str] = frozenset()
    """Names of attributes that its classes annotate with a Callable."""
    annotations: int = 0
    any_annotations: int = 0
    long_functions: list[str] = field(default_factory=list)
    undocumented: list[str] = field(default_factory=list)

    @property
    def is_core(self) -> bool:
        return self.room in CORE and self.path.name != "__main__.py"


# --- reading ----------------------------------------------------------------------------------------------------------


def read_package(checkout: Path) -> list[Source]:
    """Every file of the package below `checkout`."""
    root = checkout / PACKAGE
    paths = sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)
    modules = {module_of(path, root): path for path in paths}
    return [_read(path, module, root, modules) for module, path in modules.items()]


def module_of(path: Path, root: Path) -> str:
    """`deepspeedlite.zero.unit`."""
    return ".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def room_of(path: Path, root: Path) -> str:
    """`zero`, `checkpoint/formats`; `(root)` for the package's own file."""
    name = path.relative_to(root).with_suffix("").as_posix()
    own = [room for room in OWN_ROOMS if name == room or name.startswith(f"{room}/")]
    return own[0] if own else "(root)" if name in ("__init__", "_version") else name.split("/")[0]


def _read(path: Path, module: str, root: Path, modules: Mapping[str, Path]) -> Source:
    text = path.read_text()
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))  # once: it is what takes the time
    room = room_of(path, root)
    code, comments = code_and_comments(text, nodes)
    annotations = list(_annotations(nodes))
    where = path.relative_to(root.parent).as_posix()
    return Source(
        path=path,
        module=module,
        room=room,
        lines=text.count("\n"),
        code=code,
        comments=comments,
        imports=frozenset(_imports(tree, modules)) - {module},
        stores=list(_foreign_stores(tree, nodes, where, room)),
        attributes=frozenset(_class_attributes(nodes)),
        callables=frozenset(_callable_attributes(nodes)),
        annotations=len(annotations),
        any_annotations=sum(_mentions_any(annotation) for annotation in annotations),
        long_functions=list(_long_functions(nodes, where)),
        undocumented=list(_undocumented(tree, where)),
    )


def code_and_comments(text: str, nodes: list[ast.AST]) -> tuple[int, int]:
    """Lines of code, and comments that are no directives to a tool."""
    documented: set[int] = set()
    for node in nodes:
        if isinstance(node, (ast.Module, *_SCOPES)):
            # In a class, a string after an attribute documents it.
            for statement in node.body if isinstance(node, ast.ClassDef) else node.body[:1]:
                if _is_text(statement):
                    documented.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.string.startswith(_DIRECTIVES)
        elif token.type not in _LAYOUT_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented), comments


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _imports(tree: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    """The package's modules that a file imports, wherever it does; not what is imported for types only."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            names = [name if (name := f"{base}.{alias.name}") in modules else base for alias in child.names]
        yield from (name for name in names if name in modules)
        yield from _imports(child, modules)


def _foreign_stores(tree: ast.AST, all_nodes: list[ast.AST], where: str, room: str) -> Iterator[Store]:
    for function, nodes in _functions(tree, all_nodes):
        own = {"self", "cls", *_made_here(function, nodes)}
        for node in nodes:
            if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
                continue
            if not (isinstance(node.value, ast.Name) and node.value.id in own):
                yield Store(where=f"{where}:{node.lineno}", room=room, target=ast.unparse(node), attribute=node.attr)


def _functions(tree: ast.AST, all_nodes: list[ast.AST]) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """Every function, and the file itself, with the nodes that are in it and in no function of its own."""
    for scope in [tree, *(node for node in all_nodes if isinstance(node, _FUNCTIONS))]:
        found: list[ast.AST] = []
        waiting = list(ast.iter_child_nodes(scope))
        while waiting:
            node = waiting.pop()
            found.append(node)
            if not isinstance(node, _FUNCTIONS):
                waiting.extend(ast.iter_child_nodes(node))
        yield scope, sorted(found, key=lambda node: getattr(node, "lineno", 0))


def _made_here(function: ast.AST, nodes: list[ast.AST]) -> Iterator[str]:
    """Names of objects that a function makes itself: by calling a class, or by defining a function."""
    for node in nodes:
        if isinstance(node, _SCOPES):
            yield node.name
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, ast.Call) and _is_class(value.func):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[union-attr]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _is_class(called: ast.expr) -> bool:
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return name in ("cls", "__new__") or name.lstrip("_")[:1].isupper()


def _class_attributes(nodes: list[ast.AST]) -> Iterator[str]:
    for cls in nodes:
        if not isinstance(cls, ast.ClassDef):
            continue
        for statement in cls.body:
            if isinstance(statement, _FUNCTIONS):
                yield statement.name
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                yield statement.target.id
            elif isinstance(statement, ast.Assign):
                yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
        for node in ast.walk(cls):
            is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if is_stored and ast.unparse(node.value) == "self":
                yield node.attr


def _callable_attributes(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.AnnAssign) and "Callable[" in ast.unparse(node.annotation):
            yield node.target.attr if isinstance(node.target, ast.Attribute) else ast.unparse(node.target)


def _annotations(nodes: list[ast.AST]) -> Iterator[ast.expr]:
    for node in nodes:
        annotation = getattr(node, "returns", None) if isinstance(node, _FUNCTIONS) else None
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            annotation = node.annotation
        if annotation is not None:
            yield annotation


def _mentions_any(annotation: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation))


def _long_functions(nodes: list[ast.AST], where: str) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, _FUNCTIONS):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            length -= len((ast.get_docstring(node, clean=False) or "").splitlines())
            if length > MAX_FUNCTION_LINES:
                yield f"{where}:{node.lineno} {node.name}: {length} lines"


def _undocumented(scope: ast.AST, where: str) -> Iterator[str]:
    for node in getattr(scope, "body", []):
        if not isinstance(node, _SCOPES) or node.name.startswith("_") or _is_stub(node):
            continue
        if ast.get_docstring(node) is None:
            yield f"{where}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(node, where)


def _is_stub(node: ast.stmt) -> bool:
    """A signature only, of an overload or a Protocol, or the second half of a property."""
    if not isinstance(node, _FUNCTIONS):
        return False
    last = node.body[-1]
    is_empty = isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...
    return is_empty or any(ast.unparse(each).endswith((".setter", ".deleter")) for each in node.decorator_list)


# --- judging ----------------------------------------------------------------------------------------------------------


def core_lines(sources: list[Source]) -> int:
    """Lines of code of the core."""
    return sum(source.code for source in sources if source.is_core)


def cycles(graph: Mapping[str, frozenset[str] | set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (Tarjan's strongly connected components), larger than one."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in number:
                visit(target)
            if target in path:
                lowest[node] = min(lowest[node], lowest[target])
        if lowest[node] == number[node]:
            group = path[path.index(node) :]
            del path[path.index(node) :]
            found.append(sorted(group))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return [group for group in found if len(group) > 1]


def import_cycles(sources: list[Source]) -> list[list[str]]:
    """Modules that import each other, deferred imports included."""
    return cycles({source.module: source.imports for source in sources})


def foreign_stores(sources: list[Source]) -> dict[str, list[Store]]:
    """Stores to other objects' attributes: `own room`, `across rooms`, `of others` (torch, numpy, the user)."""
    rooms_with: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for attribute in source.attributes:
            rooms_with[attribute].add(source.room)
    found: dict[str, list[Store]] = {"own room": [], "across rooms": [], "of others": []}
    for store in (store for source in sources for store in source.stores):
        rooms = None if store.attribute in _TENSORS_OWN else rooms_with.get(store.attribute)
        kind = "of others" if not rooms else "own room" if store.room in rooms else "across rooms"
        found[kind].append(store)
    return found


def callback_slots(sources: list[Source]) -> list[str]:
    """Attributes of the package's objects that hold a function and are stored from outside."""
    callables = {name for source in sources for name in source.callables}
    return sorted(callables & {store.attribute for source in sources for store in source.stores})


# --- the table --------------------------------------------------------------------------------------------------------


def report(sources: list[Source]) -> str:
    """The table of rooms, and what is counted over all of them."""
    rooms: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        rooms[source.room].append(source)
    width = max(len(room) for room in rooms) + 2
    head = (
        f"{'room':<{width}}{'files':>6}{'lines':>8}{'code':>8}{'core':>8}{'comments per 100':>18}{'undocumented':>14}"
    )
    lines = [head]
    for room, files in [*sorted(rooms.items()), ("all", sources)]:
        code = sum(file.code for file in files)
        lines.append(
            f"{room:<{width}}{len(files):>6}{sum(file.lines for file in files):>8}{code:>8}{core_lines(files):>8}"
            f"{100 * sum(file.comments for file in files) / max(code, 1):>18.1f}"
            f"{sum(len(file.undocumented) for file in files):>14}"
        )
    stores = foreign_stores(sources)
    annotations = sum(source.annotations for source in sources)
    anys = sum(source.any_annotations for source in sources)
    core = [source for source in sources if source.is_core]
    core_comments = 100 * sum(source.comments for source in core) / max(1, core_lines(sources))
    found = import_cycles(sources)
    slots = callback_slots(sources)
    lines += [
        "",
        f"core: {core_lines(sources)} lines of code, {core_comments:.1f} comments per 100",
        f"import cycles, deferred imports included: {len(found)}",
        *(f"  {', '.join(group)}" for group in found),
        f"foreign stores: {sum(map(len, stores.values()))} "
        f"({', '.join(f'{len(of_kind)} {kind}' for kind, of_kind in stores.items())})",
        *(f"  across rooms: {store.where} {store.target}" for store in stores["across rooms"]),
        f"callback slots: {len(slots)}" + (f" ({', '.join(slots)})" if slots else ""),
        *_list("functions over 60 lines", [name for source in sources for name in source.long_functions]),
        f"annotations that mention Any: {anys} of {annotations}, {100 * anys / max(1, annotations):.1f} %",
        *_list("public names without a docstring", [name for source in sources for name in source.undocumented]),
    ]
    return "\n".join(lines)


def _list(title: str, names: list[str], shown: int = 20) -> list[str]:
    more = [f"  and {len(names) - shown} more"] if len(names) > shown else []
    return [f"{title}: {len(names)}", *(f"  {name}" for name in names[:shown]), *more]


# --- the drawing ------------------------------------------------------------------------------------------------------

_WIDTH, _BOX_W, _BOX_H, _ROW_H, _MARGIN = 1000, 190, 46, 84, 34


def room_graph(sources: list[Source]) -> dict[str, set[str]]:
    """The rooms that each room imports, of those that are drawn."""
    code: dict[str, int] = defaultdict(int)
    for source in sources:
        code[source.room] += source.code
    drawn = {room for room, lines in code.items() if room in CORE or room == "(root)" or lines >= THIN_LINES}
    room_of_module = {source.module: source.room for source in sources}
    graph: dict[str, set[str]] = {room: set() for room in sorted(drawn)}
    for source in sources:
        # A command may reach for anything, and the version's file is everybody's.
        if source.room in drawn and source.path.name != "__main__.py":
            targets = {room_of_module[name] for name in source.imports if not name.endswith("._version")}
            graph[source.room] |= (targets & drawn) - {source.room}
    order = {room: index for index, room in enumerate(NOTES)}
    for group in cycles(graph):
        for room in group:
            graph[room] -= {target for target in group if order.get(target, 0) > order.get(room, 0)}
    return graph


def levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How high each room stands: above every room it imports."""
    found: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in found:
            found[room] = max((height(target) + 1 for target in graph[room]), default=0)
        return found[room]

    return {room: height(room) for room in graph}


def needed_edges(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others: of those from A to B and B to C, not the one from A to C."""

    def reach(room: str) -> set[str]:
        return graph[room].union(*(reach(target) for target in graph[room]))

    return [
        (room, target)
        for room in sorted(graph)
        for target in sorted(graph[room])
        if not any(target in reach(other) for other in graph[room])
    ]


def drawing(sources: list[Source]) -> str:
    """The rooms as an SVG image: the higher imports the lower, the core is blue."""
    graph = room_graph(sources)
    level = levels(graph)
    top = max(level.values())
    corner: dict[str, tuple[float, float]] = {}
    for height in range(top + 1):
        row = [room for room in sorted(graph) if level[room] == height]
        gap = (_WIDTH - len(row) * _BOX_W) / (len(row) + 1)
        for index, room in enumerate(row):
            corner[room] = gap + index * (_BOX_W + gap), _MARGIN + (top - height) * _ROW_H
    lines = []
    for room, target in needed_edges(graph):
        (x1, y1), (x2, y2) = corner[room], corner[target]
        x1, y1, x2 = x1 + _BOX_W / 2, y1 + _BOX_H, x2 + _BOX_W / 2
        lines.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + 30:.0f} {x2:.0f} {y2 - 34:.0f} {x2:.0f} {y2 - 4:.0f}"/>'
        )
    boxes = []
    for room, (x, y) in sorted(corner.items()):
        kind = "core" if room in CORE else "other"
        middle = x + _BOX_W / 2
        boxes.append(
            f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{_BOX_W}" height="{_BOX_H}" rx="6"/>'
            f'<text x="{middle:.0f}" y="{y + 20:.0f}">{"deepspeedlite" if room == "(root)" else room}</text>'
            f'<text class="note" x="{middle:.0f}" y="{y + 37:.0f}">{NOTES.get(room, "")}</text>'
        )
    height_px = _MARGIN + (top + 1) * _ROW_H
    legend = "Each room imports what is below it (imports that follow from others are not drawn). Blue is the core."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height_px}" font-family="sans-serif">',
            "<style>text{font-size:14px;text-anchor:middle;fill:#1b2733}.note{font-size:11px;fill:#51606e}"
            ".core{fill:#cfe3f8;stroke:#2f6fae}.other{fill:#f0f1f3;stroke:#8b96a1}"
            "path{fill:none;stroke:#9aa7b3;marker-end:url(#tip)}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<polygon points="0 0 8 4 0 8" fill="#9aa7b3"/></marker></defs>',
            f'<rect width="{_WIDTH}" height="{height_px}" fill="#ffffff"/>',
            f'<text class="note" x="{_WIDTH // 2}" y="20">{legend}</text>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw instead")
    given = parser.parse_args()
    sources = read_package(given.checkout)
    if given.svg is None:
        print(report(sources))
    else:
        given.svg.write_text(drawing(sources))


if __name__ == "__main__":
    main()
