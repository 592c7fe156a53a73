"""The launcher: `deepspeedlite train.py ...` starts the ranks of one training and keeps them together.

    cli.py       parses the command line and prints the outcome; the only file that knows about argparse
    devices.py   which GPUs this machine offers, found without torch
    command.py   pure functions: a rank's command line and its environment
    local.py     the backend for this machine: options -> Job (other backends will stand beside it)
    agent.py     starts the ranks of a Job, forwards signals, ends all of them after the first failure
    output.py    carries the ranks' output to the terminal, whole lines only
    report.py    decides which rank failed first and words the last report
    guard.py     what happens to the ranks when the launcher itself is killed

No file here imports torch: the command must answer at once, and a launcher must not hold GPU memory.
"""
