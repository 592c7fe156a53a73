"""Pipeline parallelism: a model that is a list of layers, cut into stages; micro-batches pass from rank to rank.

    net = PipelineModule([LayerSpec(Embedding, ...), *[LayerSpec(Block, ...)] * 12, LayerSpec(Head, ...)],
                         num_stages=2, loss_fn=loss)
    engine, *_ = deepspeedlite.initialize(model=net, config="ds_config.json")
    loss = engine.train_batch(batches)        every rank; it takes gradient_accumulation_steps micro-batches

`topology.py` says which rank is which stage of which replica, `partition.py` where the list is cut, `module.py` builds
this rank's layers, `schedule.py` is the order of forward and backward passes, `stage_comm.py` moves what passes between
stages, and `engine.py` runs it all. Nothing of that is imported here.
"""

from __future__ import annotations

import torch


class Pipeline(torch.nn.Module):
    """What every `PipelineModule` is: whoever has another model need not import that to know it."""
