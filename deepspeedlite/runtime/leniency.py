"""Whether configurations are read by DeepSpeed's rules, under which some mistakes are passed over.

Strict is the rule. Where scripts know the library by DeepSpeed's name, it is made lenient once for the process, since
configurations are read in many places: by `initialize`, by `zero.Init`, by `activation_checkpointing.configure`.
"""

from __future__ import annotations


class _Leniency:
    on = False


def be_lenient(on: bool = True) -> None:
    """Read configurations by DeepSpeed's rules from now on, or (False) by ours."""
    _Leniency.on = on


def is_lenient() -> bool:
    """Whether DeepSpeed's rules are in force."""
    return _Leniency.on
