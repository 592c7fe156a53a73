"""Pipeline parallelism: a model that is a list of layers, cut into stages; micro-batches pass from rank to rank.

    net = PipelineModule([LayerSpec(Embedding, ...), *[LayerSpec(Block, ...)] * 12, LayerSpec(Head, ...)],
                         num_stages=2, loss_fn=loss)
    engine, *_ = deepspeedlite.initialize(model=net, config="ds_config.json")
    loss = engine.train_batch(batches)        every rank; it takes gradient_accumulation_steps micro-batches

`topology.py` says which rank is which stage of which replica, `partition.py` where the list is cut, `module.py` builds
this rank's layers, `order.py` is the order of forward and backward passes, `channel.py` moves what passes between
stages, and `engine.py` runs it all.
"""

from __future__ import annotations

from deepspeedlite.drop_in.finder import name_of
from deepspeedlite.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]


def __getattr__(name: str) -> object:
    return name_of(__name__, name)
