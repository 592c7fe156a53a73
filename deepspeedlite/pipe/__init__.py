"""Pipeline parallelism: see `parallel/pipe/`. This is the path that scripts import."""

from __future__ import annotations

from deepspeedlite.parallel.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]
