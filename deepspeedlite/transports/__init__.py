"""Transports beside torch.distributed's own (`comm.transport`, whose Protocol they have), each by a backend's name.

The package's root says which there are. `gloo` sends shards from CPU rank to CPU rank, over memory that they share
(`shared_memory`) where they are on one host. Without it torch's collectives do the same, more slowly.
"""
