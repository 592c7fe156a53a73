"""Parallelism beyond data: `pipeline`."""

from deepspeedlite.config.base import Int, Section, key


class Pipeline(Section, beside="pipeline"):
    """Settings of the pipeline engine, which is chosen by passing a PipelineModule."""

    activation_checkpoint_interval: Int = key(0, "Layers between checkpoints; 0: none.", ge=0)
