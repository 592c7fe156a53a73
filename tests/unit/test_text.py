"""Text for people: sizes, times, the word that was meant, tables."""

from __future__ import annotations

import pytest

from deepspeedlite.host.text import columns, parse_size, print_table, size_text, time_text
from deepspeedlite.runtime.text import did_you_mean, nearest


def test_sizes_have_three_digits_or_the_places_asked_for():
    sizes = (0, 12, 1000, 1024, 1536, 1000 << 20, 78 << 30, 5 << 40)
    assert [size_text(size) for size in sizes] == [
        *("0", "12 B", "1000 B", "1 KiB", "1.5 KiB", "1000 MiB", "78 GiB", "5 TiB")
    ]
    assert [size_text(size, 2) for size in (0, 12, 800_000_000, 7 << 30)] == ["0", "12 B", "762.94 MiB", "7.00 GiB"]
    assert [parse_size(text) for text in ("12", "4k", "1.5 KiB".replace("1.5", "3"), "1 MiB", "2TB")] == [
        *(12, 4096, 3072, 1 << 20, 2 << 40)
    ]


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "M", "1 X", "1e3", "01"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(ValueError, match="is no size; write bytes"):
        parse_size(text)


def test_times():
    assert [time_text(us) for us in (1.234, 123.4, 1234, 5e6)] == ["1.23 us", "123 us", "1.23 ms", "5 s"]


def test_the_word_that_was_meant():
    assert nearest("WEIGTH_decay", ["lr", "Weight_Decay"]) == "Weight_Decay" and nearest("x", ["lr"]) is None
    assert did_you_mean("stge", ["stage", "lr"]) == "did you mean stage?"
    assert did_you_mean("x", ["stage"], otherwise="see --help") == "see --help"
    assert did_you_mean("stge", ["stage"], form=' ("{}"?)') == ' ("stage"?)'


def test_columns_are_as_wide_as_their_cells_and_colours_take_no_room():
    rows = [("name", "n", "what"), ("\x1b[32mok\x1b[0m", "12", ""), ("longer", "3", "x")]
    assert columns(rows, right=[1]) == ["name     n  what", "\x1b[32mok\x1b[0m      12", "longer   3  x"]


def test_a_table_into_a_pipe_is_not_cut_and_takes_nothing_for_markup(capsys):
    print_table(("name", "n"), [("[red]" + "x" * 150, "1"), ("b", "10")], right=["n"], title="of it", ends=[0])
    title, head, first, second = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert title == "of it" and head.startswith("name ") and head.endswith("  n")
    assert first == "[red]" + "x" * 150 + "   1" and second.endswith("10")
    print_table(("name",), [("a",), ("b",)], boxed=True, ends=[0], bold=[1])
    assert len(capsys.readouterr().out.splitlines()) == 7
