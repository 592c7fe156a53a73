"""The FLOPs profiler's report as text: totals, the classes that cost most, and the tree of modules.

Pure functions from figures to a string. Percentages are of the whole model's figure.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from deepspeedlite.host.text import columns


@dataclass
class ModuleProfile:
    """One module's part of the forward pass, its children included."""

    name: str
    """Full name in the model; empty for the model itself."""
    class_name: str
    depth: int
    """0 for the model itself."""
    params_numel: int
    flops: int = 0
    latency_ms: float = 0.0
    calls: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.flops // 2


def si(number: float) -> str:
    """A number with three or four digits and a decimal prefix, ready for a unit: `4.35 G`, `12 `."""
    for prefix in ("", "K", "M", "G", "T", "P"):
        if abs(number) < 999.995 or prefix == "P":
            break
        number /= 1000
    digits = f"{number:.0f}" if prefix == "" and number == int(number) else f"{number:.2f}"
    return f"{digits} {prefix}"


def parent_name(name: str, known: Container[str]) -> str:
    """The nearest module around `name` that is in `known`; the model itself (empty) at the latest."""
    while name:
        name = name.rpartition(".")[0]
        if name in known:
            break
    return name


_MEASURES: dict[str, tuple[Callable[[ModuleProfile], float], Callable[[float], str]]] = {
    "params": (lambda profile: profile.params_numel, lambda value: si(value).rstrip()),
    "MACs": (lambda profile: profile.macs, lambda value: si(value).rstrip()),
    "FLOPs": (lambda profile: profile.flops, lambda value: si(value).rstrip()),
    "latency": (lambda profile: profile.latency_ms, lambda value: f"{value:.2f} ms"),
}


def format_report(
    profiles: Sequence[ModuleProfile],
    title: str,
    module_depth: int,
    top_modules: int,
    detailed: bool,
    backward_factor: float,
    step_times_ms: Mapping[str, float],
) -> str:
    """The whole report, ending in a newline. `profiles` begins with the model itself and is in tree order."""
    model = profiles[0]
    lines = [f"FLOPs profile of {model.class_name} ({title})"]
    lines += [f"  {line}" for line in _totals(model, backward_factor, step_times_ms)]
    lines += ["", *_top(profiles, module_depth, top_modules)]
    if detailed:
        lines += ["", *_tree(profiles, module_depth)]
    return "\n".join(lines) + "\n"


def _totals(model: ModuleProfile, backward_factor: float, step_times_ms: Mapping[str, float]) -> list[str]:
    forward_ms = step_times_ms.get("forward") or model.latency_ms
    lines = [
        f"parameters  {si(model.params_numel)}",
        _pass_line("forward", model.flops, forward_ms) + f", {si(model.macs)}MACs",
    ]
    backward_ms, update_ms = step_times_ms.get("backward", 0.0), step_times_ms.get("step", 0.0)
    if backward_ms > 0:
        backward = backward_factor * model.flops
        lines.append(_pass_line("backward", backward, backward_ms) + f" ({backward_factor:g} x forward)")
        whole_ms = forward_ms + backward_ms + update_ms
        if update_ms > 0:
            lines.append(f"{'step':<10}  {update_ms:.2f} ms")
        lines.append(_pass_line("together", model.flops + backward, whole_ms))
    lines.append("counted: matrix products, convolutions, attention, recurrent layers; 1 MAC = 2 FLOPs")
    return lines


def _pass_line(what: str, flops: float, time_ms: float) -> str:
    rate = f", {si(flops / time_ms * 1e3)}FLOPS" if time_ms > 0 else ""
    return f"{what:<10}  {si(flops)}FLOPs in {time_ms:.2f} ms{rate}"


def _top(profiles: Sequence[ModuleProfile], module_depth: int, top_modules: int) -> list[str]:
    """Per measure, the module classes with the largest sums.

    At a depth, modules count whole. With depth -1 every module counts for what it does itself outside its children,
    so the sums add up to the model's.
    """
    depth = min(module_depth, max(profile.depth for profile in profiles))
    where = f"modules at depth {depth}" if depth >= 0 else "modules' own work"
    lines = [f"top {top_modules} of the {where}, by class"]
    for measure, (read, show) in _MEASURES.items():
        values = [read(profile) for profile in profiles] if depth >= 0 else _own(profiles, read)
        sums: dict[str, float] = {}
        for profile, value in zip(profiles, values):
            if value > 0 and (depth < 0 or profile.depth == depth):
                sums[profile.class_name] = sums.get(profile.class_name, 0) + value
        ranked = sorted(sums.items(), key=lambda item: -item[1])[: max(top_modules, 0)]
        total = read(profiles[0])
        shown = ", ".join(f"{name} {show(value)}{_percent(value, total)}" for name, value in ranked)
        lines.append(f"  {measure:<8}  {shown or 'none'}")
    return lines


def _own(profiles: Sequence[ModuleProfile], read: Callable[[ModuleProfile], float]) -> list[float]:
    """Each module's figure less its children's; not below zero where a child is shared with another module."""
    own = {profile.name: read(profile) for profile in profiles}
    for profile in profiles:
        if profile.name:
            own[parent_name(profile.name, own)] -= read(profile)
    return [max(value, 0) for value in own.values()]


def _tree(profiles: Sequence[ModuleProfile], module_depth: int) -> list[str]:
    """A table with one row per module down to `module_depth`, indented by depth."""
    rows = [["module", *_MEASURES, "calls"]]
    totals = {measure: read(profiles[0]) for measure, (read, _) in _MEASURES.items()}
    for profile in profiles:
        if 0 <= module_depth < profile.depth:
            continue
        label = "  " * profile.depth + (profile.name.rsplit(".", 1)[-1] or "model") + f": {profile.class_name}"
        cells = [
            show(read(profile)) + _percent(read(profile), totals[measure])
            for measure, (read, show) in _MEASURES.items()
        ]
        rows.append([label, *cells, str(profile.calls)])
    return columns(rows, right=range(1, len(rows[0])))


def _percent(value: float, total: float) -> str:
    return f" ({100 * value / total:.1f}%)" if total > 0 else ""
