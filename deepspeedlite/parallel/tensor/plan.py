"""Which linear layers of a model are split by columns and which by rows.

Three say it, and for each layer the first that does counts: an injection policy (blocks and the names in them of the
layers whose outputs are summed), the model's own plan (transformers' `_tp_plan`), and a rule read from the structure:
in a block of width H, layers named like queries, keys and values and those from H to something else are split by
columns, until one back to H comes, which is split by rows. Experts are split where the model's own plan says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch

from deepspeedlite.parallel.tensor.experts import are_experts
from deepspeedlite.parallel.tensor.heads import ROLES
from deepspeedlite.runtime.errors import InferenceError

COLUMNS, ROWS, GATHERED, SLICED, EXPERTS = "columns", "rows", "columns, gathered", "rows, sliced", "experts"
# Of a module of experts and its weights, which are split together (`experts`).
_OF_EXPERTS = {"": "moe_tp_experts", ".gate_up_proj": "packed_colwise", ".down_proj": "rowwise"}
_STYLES = {
    "colwise": COLUMNS,
    "rowwise": ROWS,
    "colwise_rep": GATHERED,
    "colwise_gather_output": GATHERED,
    "rowwise_rep": SLICED,
    "rowwise_split_input": SLICED,
}
# Styles that change nothing in a forward pass, and those of vocabularies, which `split` sees to.
_PASSED = {"replicated_with_grad_allreduce", "keep_full_weight", "embedding_rowwise", "replicate"}
_ELEMENTWISE = (
    torch.nn.ReLU, torch.nn.GELU, torch.nn.SiLU, torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.LeakyReLU, torch.nn.ELU,
    torch.nn.Hardswish, torch.nn.Softplus, torch.nn.Mish, torch.nn.Identity, torch.nn.Dropout,
)  # fmt: skip


class Rule(NamedTuple):
    """How a layer is split, and who says so."""

    how: str
    source: str


def is_linear(module: torch.nn.Module) -> bool:
    """A linear layer of torch's or a class of it, or transformers' Conv1D, whose weight is transposed."""
    return isinstance(module, torch.nn.Linear) or is_transposed(module)


def is_transposed(module: torch.nn.Module) -> bool:
    """GPT-2's kind of linear layer."""
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None


def widths(module: torch.nn.Module) -> tuple[int, int]:
    """Columns of a linear layer's input and output."""
    first, second = cast(torch.Tensor, module.weight).shape
    return (first, second) if is_transposed(module) else (second, first)


def role_of(name: str) -> str | None:
    """`q`, `k`, `v` or `qkv`, by a layer's name."""
    return ROLES.get(name.rpartition(".")[2])


def plan_of(model: torch.nn.Module, policy: Any) -> dict[str, Rule]:
    """The layers to split, by name.

    Raises:
        InferenceError: names what cannot be split.
    """
    plan = _by_policy(model, policy) if policy else {}
    own = getattr(model, "_tp_plan", None)
    if not plan and own:
        plan = _by_model(model, own)
    return plan or _by_structure(model)


# --- a policy ---------------------------------------------------------------------------------------------------------


def _by_policy(model: torch.nn.Module, policy: Any) -> dict[str, Rule]:
    if not isinstance(policy, Mapping):
        raise InferenceError("injection_policy must be a dict, {class of a block: names of layers in it}")
    plan: dict[str, Rule] = {}
    for block_class, names in policy.items():
        names = (names,) if isinstance(names, str) else names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InferenceError(
                f"injection_policy of {_named(block_class)} must be names of the layers whose outputs are summed, such "
                f"as ('self_attn.o_proj', 'mlp.down_proj'); got {names!r}"
            )
        blocks = [(name, part) for name, part in model.named_modules() if _is_of(part, block_class)]
        if not blocks:
            raise InferenceError(f"injection_policy names {_named(block_class)}, of which the model has none")
        unused = set(names)
        for path, block in blocks:
            for name, _ in _linears(block):
                ends = [one for one in names if name == one or name.endswith(f".{one}")]
                unused -= set(ends)
                plan[_joined(path, name)] = Rule(ROWS if ends else COLUMNS, "injection_policy")
        if unused:
            raise InferenceError(
                f"injection_policy names {', '.join(sorted(unused))}, which {_named(block_class)} has not; its linear "
                f"layers are {', '.join(name for name, _ in _linears(blocks[0][1]))}"
            )
    return plan


def _named(block_class: Any) -> str:
    return getattr(block_class, "__name__", str(block_class))


def _is_of(part: torch.nn.Module, block_class: Any) -> bool:
    return isinstance(part, block_class) if isinstance(block_class, type) else type(part).__name__ == block_class


# --- the model's own --------------------------------------------------------------------------------------------------


def _by_model(model: torch.nn.Module, own: Mapping[str, str]) -> dict[str, Rule]:
    patterns = [(re.compile(re.escape(one).replace(r"\*", r"\d+") + r"\Z"), style) for one, style in own.items()]
    parameters = dict(model.named_parameters())
    plan: dict[str, Rule] = {}
    strange: list[str] = []
    heads = _vocabulary(model)

    def style_of(name: str) -> str | None:
        return next((style for pattern, style in patterns if pattern.match(name)), None)

    for name, module in model.named_modules():
        style = style_of(name)
        if style is None or style in _PASSED or module in heads:
            continue
        if are_experts(module) and all(style_of(name + end) == how for end, how in _OF_EXPERTS.items()):
            plan[name] = Rule(EXPERTS, "the model's plan")
            parameters = {key: value for key, value in parameters.items() if not key.startswith(f"{name}.")}
            continue
        if style not in _STYLES or not is_linear(module):
            strange.append(f"{name} ({style})")
        else:
            plan[name] = Rule(_STYLES[style], "the model's plan")
    strange += [f"{name} ({style})" for name in parameters for pattern, style in patterns if pattern.match(name)]
    if strange:
        raise InferenceError(
            f"the model's plan splits {_some(strange)} in ways that are not in this release; "
            "give an injection_policy, or set tp_size to 1"
        )
    return plan


def _vocabulary(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Its embedding and head, of which the plan is not asked."""
    ask = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    found: set[torch.nn.Module] = set()
    for get in ask:
        try:
            part = get() if get is not None else None
        except NotImplementedError:
            part = None
        if isinstance(part, torch.nn.Module):
            found.add(part)
    return found


# --- the structure ----------------------------------------------------------------------------------------------------


def _by_structure(model: torch.nn.Module) -> dict[str, Rule]:
    plan: dict[str, Rule] = {}
    blocks = list(_blocks(model))
    for path, block in blocks:
        _check_kind(path, block)
        _plan_block(path, block, plan)
    for path, part in model.named_modules():
        if isinstance(part, torch.nn.Sequential) and not any(path.startswith(f"{block}.") for block, _ in blocks):
            _plan_sequence(path, part, plan)
    if not plan:
        linears = [name or type(model).__name__ for name, _ in _linears(model)]
        raise InferenceError(
            f"{type(model).__name__} has no layers that can be split over ranks: neither blocks in a ModuleList nor "
            f"Linear, activation, Linear in a Sequential; its linear layers are {_some(linears) or 'none'}; give an "
            "injection_policy, or set tp_size to 1"
        )
    return plan


def _blocks(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """What stands in lists of modules and has linear layers, the outermost of such."""

    def look(path: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        for name, part in module.named_children():
            inner = _joined(path, name)
            if isinstance(module, torch.nn.ModuleList) and len(list(_linears(part))) > 1:
                yield inner, part
            else:
                yield from look(inner, part)

    yield from look("", model)


def _check_kind(path: str, block: torch.nn.Module) -> None:
    fast = (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer, torch.nn.MultiheadAttention)
    for name, part in block.named_modules():
        if isinstance(part, fast):
            raise InferenceError(
                f"{_joined(path, name)} is torch's {type(part).__name__}, which computes with its weights itself: it "
                "cannot be split; set tp_size to 1"
            )
        if any(param.dim() > 2 for param in part.parameters(recurse=False)) or "Experts" in type(part).__name__:
            raise InferenceError(
                f"{_joined(path, name)} ({type(part).__name__}) has weights for several experts or positions in one: "
                "such experts are not split in this release; set tp_size to 1"
            )


def _plan_block(path: str, block: torch.nn.Module, plan: dict[str, Rule]) -> None:
    linears = list(_linears(block))
    width = _width_of(block, linears)
    open_: list[str] = []
    unknown: list[str] = []
    for name, module in linears:
        into, out = widths(module)
        if role_of(name) is not None or (into == width != out):
            plan[_joined(path, name)] = Rule(COLUMNS, "structure")
            open_.append(name)
        elif out == width and open_:
            plan[_joined(path, name)] = Rule(ROWS, "structure")
            open_ = []
        else:
            unknown.append(f"{name} ({into} to {out})")
    if unknown or open_:
        raise InferenceError(
            f"{path} ({type(block).__name__}): {_some(unknown + open_)} cannot be split by what the block's structure "
            f"shows (its width is {width}); give injection_policy={{{type(block).__name__}: (names of the layers whose "
            "outputs are summed)}}, or set tp_size to 1"
        )


def _width_of(block: torch.nn.Module, linears: list[tuple[str, torch.nn.Module]]) -> int:
    """The width of what passes between blocks: that of most norms, else what most layers take or give."""
    weights = (getattr(part, "weight", None) for part in block.modules() if not is_linear(part))
    norms = [weight.numel() for weight in weights if isinstance(weight, torch.Tensor) and weight.dim() == 1]
    counted = Counter(norms or [one for _, module in linears for one in widths(module)])
    return counted.most_common(1)[0][0]


def _plan_sequence(path: str, sequence: torch.nn.Sequential, plan: dict[str, Rule]) -> None:
    """Linear, elementwise activations, Linear."""
    before: str | None = None
    for name, part in sequence.named_children():
        if is_linear(part):
            if before is not None:
                plan[before] = Rule(COLUMNS, "structure")
                plan[_joined(path, name)] = Rule(ROWS, "structure")
                before = None
            else:
                before = _joined(path, name)
        elif not isinstance(part, _ELEMENTWISE):
            before = None


def _linears(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, part) for name, part in module.named_modules() if is_linear(part))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
