"""What an entry of the table is, and the three ways to write some."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One name. `home` is our module, "" for a name that is absent; then `note` says why and what to use."""

    home: str
    attribute: str = ""
    note: str = ""


Names = dict[str, Entry]
ABSENT = Entry("")


def at(home: str, names: str, differs: str = "") -> Names:
    """Names (separated by blanks) that module `home` of ours has; `differs` says in what."""
    return {name: Entry(home, name, differs) for name in names.split()}


def renamed(home: str, differs: str = "", **names: str) -> Names:
    """DeepSpeed's name -> the name in `home` of ours."""
    return {name: Entry(home, ours, differs) for name, ours in names.items()}


def no(why: str, names: str) -> Names:
    """Names (separated by blanks) that are absent."""
    return {name: Entry("", "", why) for name in names.split()}
