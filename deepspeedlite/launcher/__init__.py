"""The launcher: `deepspeedlite train.py ...` starts the ranks of one training, on one machine or many, as one.

    cli.py           parses the command line; the only file that knows about argparse
    start.py         options -> machines and variables; the run on this machine, and its last words
    multinode.py     the run on several machines: check, start, restart
    backends/        how agents get started there: ssh, pdsh, Open MPI, MPICH, Slurm, ... one small file each
    cluster.py       the launcher's side of a run on several machines
    node.py          an agent's side of it, on each machine
    protocol.py      what the two say to each other, over ssh's pipes or TCP
    job.py           a node's place in the world -> each rank's command and environment
    agent.py         starts the ranks of a Job, forwards signals, ends all of them after the first failure
    output.py        carries the ranks' output to the terminal, whole lines only
    report.py        decides which rank failed first and words the last report
    signals.py       signals as something to select on
    process_tree.py  what happens to the ranks when the launcher itself is killed

No file here imports torch: the command must answer at once, and a launcher must not hold GPU memory.
"""
