"""The launcher: `deepspeedlite train.py ...` starts the ranks of one training, on one machine or many, as one.

    options.py       the options: each is a field, and nodes get all of them
    cli.py           parses the command line; the only file that knows about argparse
    start.py         the attempts, and the last words
    hostfile.py      which machines there are, and choosing from them
    plan.py          options -> machines and variables
    job.py           a node's place in the world -> each rank's command and environment
    cluster.py       turns one event loop for all nodes of a run, and decides when all are to end
    agent.py         a node's ranks: starts them, tells how they end, ends them when told; this machine's is in-process
    multinode.py     nodes on other machines, over links: the start of their agents, the check before, the run
    backends.py      how agents get started there: a table of ssh, pdsh, Open MPI, MPICH, Slurm, ...
    node.py          an agent's side of a link, on each machine
    protocol.py      what the two say to each other, over ssh's pipes or TCP
    output.py        carries the ranks' output to the terminal, whole lines only
    report.py        what is known of the ranks: which failed first, and the words of the last report
    loop.py          the event loop: what can be read or written, and signals
    process_tree.py  what happens to the ranks when the launcher itself is killed
    ssh.py           `dslite_ssh`: one command on all hosts

No file here imports torch: the command must answer at once, and a launcher must not hold GPU memory.
"""
