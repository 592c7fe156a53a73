"""`dslite_bench`: how fast the ranks' collectives are, as a table, as JSON and as a plot.

`cli` reads the command line and, where it is not a rank itself, starts the ranks through the launcher; `measure` is
what a rank does; `report` shows the points, with the plot in `plot`. Only `measure` needs torch.
"""

from deepspeedlite.tools.bench.cli import main

__all__ = ["main"]
