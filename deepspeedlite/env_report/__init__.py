"""`dslite_report` (or `python -m deepspeedlite.env_report`): what this machine offers, and what is wrong with it.

A report is a list of sections, and a section is a function that returns rows: plain data with a verdict and, where the
verdict is bad, the remedy (`rows`). The sections are in `packages`, `machine` and `tools`; a new one is a function and
an entry in `report.SECTIONS`. torch is asked in a child (`probe`). `nodes` puts several machines side by side.

Exit status: 0, or 1 if a row says that training cannot work as things are; 2 for a wrong command line.
"""

from deepspeedlite.env_report.report import SECTIONS, collect, main, render, verdict
from deepspeedlite.env_report.rows import BAD, INFO, OK, WARN, Row

__all__ = ["BAD", "INFO", "OK", "SECTIONS", "WARN", "Row", "collect", "main", "render", "verdict"]
