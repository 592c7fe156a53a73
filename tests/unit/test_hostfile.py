"""The hostfile's reader: what it gives, what it refuses and how it says so; any text against a slow plain reference."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepspeedlite.launcher.hostfile import bare, read_hostfile, select, ssh_words
from deepspeedlite.runtime.errors import LaunchError


def read(tmp_path: Path, text: str | bytes, **options: bool) -> dict[str, int]:
    file = tmp_path / "hosts"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_hostfile(file, **options)


def test_hosts_come_in_the_files_order(tmp_path: Path) -> None:
    text = "# two and one\n\nworker-2 slots=4\n  worker-1\tslots=2  # the small one\n10.0.0.7 slots=08\n"
    assert list(read(tmp_path, text).items()) == [("worker-2", 4), ("worker-1", 2), ("10.0.0.7", 8)]


def test_what_editors_leave_is_no_fault(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfa slots=1\r\nb slots=2 # caf\xe9\r\n") == {"a": 1, "b": 2}


def test_a_user_a_port_and_the_words_of_open_mpi_are_taken(tmp_path: Path) -> None:
    text = "me@a slots=2 max_slots=4\nb:2222 max-slots=9 slots=1\n"
    assert read(tmp_path, text) == {"me@a": 2, "b:2222": 1}
    assert [bare(host) for host in ("me@a", "b:22", "me@c:1", "d")] == ["a", "b", "c", "d"]
    assert ssh_words("me@c:1", 22) == ["-p", "1", "--", "me@c"] and ssh_words("d") == ["--", "d"]
    slots = {"me@a": [0, 1], "b:2222": [0]}
    assert select(slots, "a:1@b", None) == select(slots, "a:1@b:2222:0", None) == {"me@a": [1], "b:2222": [0]}
    with pytest.raises(LaunchError, match="is written in UTF-16, not UTF-8"):
        read(tmp_path, "a slots=1".encode("utf-16"))


def test_slots_may_be_left_out_where_only_names_are_wanted(tmp_path: Path) -> None:
    assert read(tmp_path, "a\nb slots=3\n", slots_needed=False) == {"a": 0, "b": 3}


@pytest.mark.parametrize(
    "line, message",
    [
        ("a", "line 2: a has no slots; write how many ranks it takes, such as: a slots=4"),
        ("a slots=0", "line 2: a has slots=0; write at least 1"),
        ("a slots=-1", "line 2: 'slots=-1' after a is not understood; write: a slots=4"),
        ("a slots=four", "line 2: 'slots=four' after a is not understood"),
        ("a slots=٤", "line 2: 'slots=٤' after a is not understood"),
        ("a slots = 4", "line 2: 'slots = 4' after a is not understood"),
        ("a slots=4 slots=2", "line 2: 'slots=4 slots=2' after a is not understood"),
        ("a slots=" + "9" * 5000, "line 2: 'slots=99"),
        ("first slots=1", "line 2: first is on line 1 already; write one line per host"),
        ("-oProxyCommand=x slots=1", "line 2: the host -oProxyCommand=x begins with '-', which ssh would take"),
        ("me@ slots=1", "line 2: 'me@' is no host's name"),
        ("a:port slots=1", "line 2: 'a:port' is no host's name"),
        ("a slots=1 max_slots=x", "line 2: 'slots=1 max_slots=x' after a is not understood"),
        ("a,b slots=1", "line 2: 'a,b' is no host's name"),
        ("$(id) slots=1", "line 2: '$(id)' is no host's name"),
        ("fe80::1 slots=1", "line 2: 'fe80::1' is no host's name or IPv4 address, such as"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(LaunchError) as error:
        read(tmp_path, f"first slots=2\n{line}\n")
    assert f"hosts, {message}" in str(error.value)


def test_all_wrong_lines_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"line 1: a has no slots(.|\n)*line 3: a is on line 1(.|\n)*line 4: 'x'"):
        read(tmp_path, "a\nb slots=1\na slots=2\nc x\n")


@pytest.mark.parametrize("text", ["", "\n\n", "# worker-1 slots=4\n"])
def test_nobody_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(LaunchError, match="names no host; write one per line, such as: worker-1 slots=4"):
        read(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"none cannot be read: No such file"):
        read_hostfile(tmp_path / "none")


WORDS = st.sampled_from(
    [
        "a",
        "b.c",
        "w-1",
        "_x",
        "-a",
        "a@b",
        "@b",
        "a:22",
        "a@b:222222",
        "max_slots=3",
        "slots=1",
        "slots=12",
        "slots=0",
        "slots=x",
        "slots=",
        "#",
        "# b",
        "a#b",
        "\t",
    ]
)
LINES = st.lists(st.lists(WORDS, max_size=4).map(" ".join), max_size=5).map("\n".join)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"


def is_name(word: str) -> bool:
    return bool(word) and word[0] in LETTERS and all(letter in LETTERS + ".-" for letter in word)


def are_digits(word: str) -> bool:
    return bool(word) and all(digit in "0123456789" for digit in word)


def plainly(text: str) -> dict[str, int] | None:
    """The same by the plainest of means; None where the file is to be refused."""
    found: list[tuple[str, int]] = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        kept = ""
        for letter in line:
            if letter == "#":
                break
            kept += letter
        if kept.strip() == "":
            continue
        words = kept.split()
        words = [word for word in words if not (word[:10] in ("max_slots=", "max-slots=") and are_digits(word[10:]))]
        user, at, place = words[0].rpartition("@") if words else ("", "", "")
        name, colon, port = place.partition(":")
        port_is_good = are_digits(port) and len(port) <= 5 if colon else True
        if len(words) != 2 or not is_name(name) or (at and not is_name(user)) or not port_is_good:
            return None
        if words[1][:6] != "slots=":
            return None
        digits = words[1][6:]
        if not are_digits(digits) or len(digits) > 6 or int(digits) == 0:
            return None
        found.append((words[0], int(digits)))
    names = [name for name, _ in found]
    return dict(found) if names and len(set(names)) == len(names) else None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=LINES | st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
@example(text="a slots=1\nb.c slots=12")
@example(text="a slots=1\na slots=1")
def test_any_text_is_read_as_the_plain_reference_reads_it(tmp_path: Path, text: str) -> None:
    try:
        hosts = read(tmp_path, text)
    except LaunchError:
        hosts = None
    expected = plainly(text.removeprefix("\ufeff"))
    assert (hosts and list(hosts.items())) == (expected and list(expected.items()))
