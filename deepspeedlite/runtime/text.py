"""The word that was probably meant, where one is not known. What costs time is imported late."""

from __future__ import annotations

from collections.abc import Iterable

IN_BRACKETS = ' (did you mean "{}"?)'


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that `word` was most likely meant to be, upper and lower case being one; or None."""
    from difflib import get_close_matches

    by_lower = {one.lower(): one for one in known}
    found = get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", form: str = "did you mean {}?") -> str:
    """`did you mean NAME?` with the known word nearest to a wrong one; `otherwise` where none is near."""
    found = nearest(word, known)
    return otherwise if found is None else form.format(found)
