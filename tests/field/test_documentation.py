"""What README and docs/ show is run: a page's Python as one script, its JSON as a configuration, its commands' options.

What a snippet needs and does not show, such as a model, stands before it in a comment, `<!-- given`, that no reader
sees.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist
from harness import distributed
from paths import ROOT

from deepspeedlite.config import load_config

BLOCK = re.compile(r"^(?:<!-- given\n(?P<given>.*?)^-->\n+)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
PAGES = sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu"}


class Snippet(NamedTuple):
    page: str
    line: int
    kind: str
    given: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: str, *kinds: str) -> list[Snippet]:
    text = (ROOT / page).read_text()
    return [
        Snippet(page, text.count("\n", 0, found.start("text")), found["kind"], found["given"] or "", found["text"])
        for found in BLOCK.finditer(text)
        if found["kind"] in kinds
    ]


def pages_with(*kinds: str) -> list[str]:
    return [page for page in PAGES if snippets(page, *kinds)]


def with_batch(snippet: Snippet) -> dict[str, object]:
    """A configuration that shows some sections, completed by a batch size."""
    config: dict[str, object] = json.loads(snippet.text)
    return config if BATCH & set(config) else {"train_batch_size": 8, **config}


@pytest.mark.slow_unless(page="README.md")
@pytest.mark.parametrize("page", pages_with("python"))
@distributed(world_size=2)
def test_a_pages_python_runs(page, tmp_path):
    """From its first snippet to its last, in one namespace; ds_config.json is the JSON last shown, or README's."""
    names: dict[str, object] = {"__name__": "snippet"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["train.py", "--deepspeed_config", "ds_config.json"])
        for snippet in [*snippets("README.md", "json"), *snippets(page, "python", "json")]:
            if snippet.kind == "json":
                dist.barrier()
                if dist.get_rank() == 0:
                    Path("ds_config.json").write_text(json.dumps(with_batch(snippet)))
                dist.barrier()
                continue
            for part, source in (("given", snippet.given), ("snippet", snippet.text)):
                code = compile("\n" * snippet.line + source, f"{snippet.place} ({part})", "exec")
                exec(code, names)


@pytest.mark.parametrize("page", pages_with("json"))
def test_a_pages_configurations_are_taken(page):
    for snippet in snippets(page, "json"):
        load_config(with_batch(snippet), world_size=2)


# --- commands -------------------------------------------------------------------------------------------------------

SCRIPTS = dict(re.findall(r'^([\w]+) = "(deepspeedlite[\w.]*:main)"$', (ROOT / "pyproject.toml").read_text(), re.M))


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """The words of each command of a page, without variables before it and comments after it."""
    for snippet in snippets(page, "sh", "console"):
        lines = snippet.text.replace("\\\n", " ").splitlines()
        lines = [line[2:] for line in lines if line.startswith("$ ")] if snippet.kind == "console" else lines
        for command in (command for line in lines for command in line.split(" && ")):
            words = [word for word in shlex.split(command, comments=True) if word not in ("[NAME", "...]", "...")]
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield f"{snippet.place}: {command}", words


def printed(program: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """By a program of ours: `["dslite_report"]` or `["python", "-m", "deepspeedlite.config"]`."""
    monkeypatch.setattr(sys, "argv", [program[-1], *arguments])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        if program[0] in SCRIPTS:
            module, _, function = SCRIPTS[program[0]].partition(":")
            getattr(importlib.import_module(module), function)()
        else:
            runpy.run_module(program[-1], run_name="__main__", alter_sys=True)
    return said.getvalue()


def own_program(words: list[str]) -> tuple[list[str], list[str]] | None:
    """A command's program, if it is ours, and its arguments up to a script or command that it runs."""
    length = 1 if words[0] in SCRIPTS else 3 if words[:2] == ["python", "-m"] else 0
    ends = [at for at, word in enumerate(words) if word in ("--", "nvidia-smi") or word.endswith(".py")]
    return (words[:length], words[length : min(ends, default=None)]) if length else None


@pytest.mark.parametrize("page", pages_with("sh", "console"))
def test_a_pages_commands_exist(page, monkeypatch):
    """Targets of make are in the Makefile, files in the checkout, and programs of ours know the options."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    helps: dict[tuple[str, ...], str] = {}
    for place, words in commands(page):
        if words[0] == "make":
            assert set(words[1:2]) <= targets, place
        elif words[0].startswith(("./", "tools/")):
            assert (ROOT / words[0]).exists(), place
        elif (found := own_program(words)) is not None:
            program, arguments = found
            options = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)}
            own = (*program, *takewhile(re.compile(r"[a-z]+").fullmatch, arguments[:2]))
            if own not in helps:
                helps[own] = printed(program, [*own[len(program) :], "--help"], monkeypatch)
            assert "usage:" in helps[own].lower(), f"{place}: prints no help"
            for option in options:
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", helps[own]), f"{place}: {option} is not in its help"
