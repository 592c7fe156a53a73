"""What stands for a name of DeepSpeed's that is not here: it can be imported, and says why when it is used.

Scripts import at their heads what they never call. So `from deepspeed.moe.layer import MoE` works, `isinstance(x, MoE)`
is False of everything, as nothing here is one, and whoever calls it, subclasses it or reads something from it gets the
reason. Who looks first (`hasattr(MoE, "forward")`, `getattr(comm.cdb, "backend", None)`) finds that it has nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NoReturn

from deepspeedlite.runtime.errors import AbsentError


class Absent(type):
    """The type of what stands for absent names. They are classes, so that isinstance, annotations and `|` take them."""

    why: str

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **options: Any) -> Absent:
        for base in bases:
            if isinstance(base, Absent):
                base._refuse()
        return super().__new__(cls, name, bases, body)

    def _refuse(cls) -> NoReturn:
        raise AbsentError(cls.why)

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        cls._refuse()

    def __getattr__(cls, name: str) -> NoReturn:
        raise AttributeError(f"{name}: {cls.why}")  # and no AbsentError, which hasattr would not take for an answer

    def __getitem__(cls, key: Any) -> NoReturn:
        cls._refuse()

    def __iter__(cls) -> Iterator[Any]:
        cls._refuse()

    def __contains__(cls, item: Any) -> bool:
        cls._refuse()

    def __len__(cls) -> int:
        return cls._refuse()

    def __bool__(cls) -> bool:
        return True  # not by its length

    def __repr__(cls) -> str:
        return f"<absent: {cls.why}>"


@cache
def absent(module: str, name: str, why: str) -> Absent:
    """What stands for `name` of our `module`; the same object every time. `why` is the message of its errors."""
    return Absent(name, (), {"__module__": module, "why": why})
