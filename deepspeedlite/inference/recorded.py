"""A forward pass recorded as a CUDA graph for each shape of its inputs, and replayed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from deepspeedlite.runtime.tensors import map_tensors, tensors_in

_WARM_UPS = 3  # passes before the recording, in which libraries allocate what they need
_MOST_SHAPES = 8


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class RecordedForward:
    """Calls a module on a GPU; from the second call with inputs of one shape on, by replaying it.

    What is returned is the recording's own memory, which the next call with that shape overwrites. Whatever else than
    tensors is passed belongs to the shape. When `_MOST_SHAPES` are recorded, the oldest is forgotten.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._recordings: dict[str, _Recording] = {}

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run it."""
        shape = repr(map_tensors((inputs, kwargs), lambda one: (tuple(one.shape), one.dtype, one.device)))
        if shape not in self._recordings:
            while len(self._recordings) >= _MOST_SHAPES:
                del self._recordings[next(iter(self._recordings))]
            self._recordings[shape] = self._record(inputs, kwargs)
        recording = self._recordings[shape]
        kept = tensors_in((recording.inputs, recording.kwargs), 0)
        for own, given in zip(kept, tensors_in((inputs, kwargs), 0)):
            own.copy_(given)
        recording.graph.replay()
        return recording.output

    def _record(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recording:
        inputs, kwargs = map_tensors((inputs, kwargs), lambda one: one.clone())
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                self._module(*inputs, **kwargs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._module(*inputs, **kwargs)
        return _Recording(graph, inputs, kwargs, output)
