"""The launcher: `deepspeedlite train.py ...` starts the ranks of one training, on one machine or many, as one.

    cli.py           parses the command line; the only file that knows about argparse
    options.py       options -> machines and variables
    start.py         the attempts, and the last words
    hostfile.py      which machines there are, and choosing from them
    cluster.py       turns one event loop for all nodes of a run; this machine alone is a cluster of one
    multinode.py     a run on several machines: the check before, and without ssh
    remote.py        its nodes, over links
    backends.py      how agents get started there: a table of ssh, pdsh, Open MPI, MPICH, Slurm, ...
    node.py          an agent's side of it, on each machine
    protocol.py      what the two say to each other, over ssh's pipes or TCP
    job.py           a node's place in the world -> each rank's command and environment
    agent.py         starts the ranks of a Job, forwards signals, ends all of them after the first failure
    output.py        carries the ranks' output to the terminal, whole lines only
    report.py        decides which rank failed first and words the last report
    loop.py          the event loop: descriptors, and signals (signals.py)
    process_tree.py  what happens to the ranks when the launcher itself is killed
    ssh.py           `dslite_ssh`: one command on all hosts

No file here imports torch: the command must answer at once, and a launcher must not hold GPU memory.
"""
