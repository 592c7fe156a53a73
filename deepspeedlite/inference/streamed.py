"""Weights that come as they are used, for models larger than the memory that computes (ZeRO-Inference).

Each rank keeps its shard of every layer in the host's memory or in a file on a fast disk. A layer's shards are gathered
for the time of its use, and those of the layers to come are read and gathered ahead of it: from the second pass on, by
the order of the pass before. It is stage 3 of ZeRO without gradients (arXiv:1910.02054; 2104.07857), and it stands on
the same flat values.

[Note: every rank takes part]
A pass gathers from all ranks, so each runs as many passes as the others, over prompts of its own. transformers'
`generate(synced_gpus=True)` goes on with empty passes where a rank's prompts are done earlier than another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from deepspeedlite.comm import Group
from deepspeedlite.config import load_config
from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.host.text import size_text
from deepspeedlite.offload.options import make_offload
from deepspeedlite.runtime.log import log_dist
from deepspeedlite.zero.flat_params import FlatParams, ParamState
from deepspeedlite.zero.leaf import leaf_modules, mark_leaves
from deepspeedlite.zero.prefetch import ParamPrefetcher
from deepspeedlite.zero.state_dicts import StateDicts
from deepspeedlite.zero.use_order import PrefetchLimits, UseTrace
from deepspeedlite.zero.wrap import NamedParameter, frozen_parameters, module_buckets, split_persistent

Read = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]


class ValuesOfOneRank(FlatParams):
    """Values that nobody else has a part of, and no graph refers to: used in the memory that they are read into."""

    def unshard(self) -> None:
        """Start reading them, if there is a buffer: ahead of their use there need not be."""
        if self.state is ParamState.SHARDED and self.params and self.store.fetch():
            self._enter(ParamState.UNSHARDING)

    def begin_use(self) -> None:
        """Read them, into a buffer more where there is none."""
        self.unshard()
        if self.state is ParamState.SHARDED:
            self._enter(ParamState.UNSHARDING)
        self.wait_for_unshard()
        self.uses += 1

    def wait_for_unshard(self) -> None:
        """Wait for what was read, and show it."""
        if self.state is not ParamState.UNSHARDING:
            return
        try:
            self.store.open()
        except BaseException:
            self._drop()
            raise
        self.values = self.shard.view(-1)
        self._views = [self.values[slot.start : slot.stop].view(slot.shape) for slot, _ in self.slots]
        self._show()

    def _drop(self) -> None:
        self.values, self._views = self.values.new_empty(0), []  # of the buffer nothing may be kept
        super()._drop()
        self.store.close()


class RepeatedPasses(ParamPrefetcher):
    """Passes follow each other, and nothing is written in between: buffers that the last layers of one leave idle are
    filled with the first layers of the next. Else they would all be read at once when it begins, and waited for.
    """

    def _prefetch(self) -> None:
        super()._prefetch()
        all(map(FlatParams.fetch, self.trace.known))  # as far as there are buffers that this pass has no use for


class StreamedWeights:
    """The weights of a model, sharded over all ranks and kept where `zero.offload_param` says. Collective.

    Args:
        model: its parameters have their values, or lie on the meta device and `read` has them.
        zero: the section; its stage is 3.
        device: what computes.
        aio: the section of how files are read.
        read: the values of parameters by their names, asked for one layer after the other, so that no more than one
            of them is whole at a time. Shapes and dtypes are the parameters' own.

    Raises:
        OffloadError: a rank's disk cannot be used, or has no room.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        zero: ZeroOptimization,
        device: torch.device,
        *,
        aio: Mapping[str, Any] | None = None,
        read: Read | None = None,
    ) -> None:
        group = Group()
        source = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero.model_dump(exclude_unset=True)}
        settings = load_config({**source, **({"aio": dict(aio)} if aio else {})}, world_size=group.size)
        self._offload = make_offload(settings, group)
        self._model, self.is_open = model, True
        mark_leaves(model, zero.leaf_module.classes, zero.leaf_module.names, zero.leaf_module.name_suffixes)
        leaves, trace = leaf_modules(model), UseTrace()
        everyone = frozen_parameters(model, ())
        held = {id(entry.param) for entry in everyone}
        small, large = split_persistent(
            everyone, held, zero.stage3_param_persistence_threshold, zero.stage3_model_persistence_threshold
        )
        with torch.no_grad():
            self._load(small, device, read)
            buckets = reversed(module_buckets(model, large, leaves))
            alone = group.size == 1 and self._offload.placement.uses_disk and device.type == "cpu"
            kind = ValuesOfOneRank if alone else FlatParams
            self._values = [
                kind(self._load(bucket, device, read), group, sharded=True, offload=self._offload, live=trace)
                for bucket in buckets
            ]
        self._dicts = StateDicts(model, leaves)
        limits = PrefetchLimits.from_config(zero)
        prefetcher = RepeatedPasses if self._offload.placement.uses_disk else ParamPrefetcher
        self._prefetcher = prefetcher(model, self._values, leaves, limits, trace=trace, state_dicts=self._dicts)
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._prefetcher.begin_forward(False), prepend=True),
            model.register_forward_hook(self._end_pass, always_call=True),
        ]
        nbytes = [values.numel * values.dtype.itemsize for values in self._values]
        log_dist(
            f"inference engine: {len(nbytes)} layers are whole only while they are used, else "
            f"{str(self._offload.placement) or 'sharded'}, {size_text(sum(nbytes))} over {group.size} ranks; "
            f"the largest has {size_text(max(nbytes, default=0))}"
        )

    def _load(
        self, bucket: Sequence[NamedParameter], device: torch.device, read: Read | None
    ) -> Sequence[NamedParameter]:
        """The same parameters on the device, with values."""
        empty = [entry.name for entry in bucket if entry.param.is_meta]
        found = read(empty) if empty and read is not None else {}
        loaded = []
        for name, param, place in bucket:
            value = found[name] if param.is_meta else param.data
            if not param.is_meta:
                param.data = value.to(device)
                loaded.append(NamedParameter(name, param, place))
                continue
            real = torch.nn.Parameter(value.to(device, param.dtype), requires_grad=param.requires_grad)
            for module, key in _holders(self._model, param):
                module._parameters[key] = real
            loaded.append(NamedParameter(name, real, place))
        return loaded

    def _end_pass(self, *_: Any) -> None:
        self._prefetcher.reshard()

    def close(self) -> None:
        """Give the disk its space back. The model has no weights any more: there may be no memory for them."""
        self.is_open = False
        for hook in self._hooks:
            hook.remove()
        self._prefetcher.close()
        self._dicts.close()
        for values in self._values:
            values.store.forget()  # what is on its way for a next pass has to arrive before its memory goes
        self._offload.close()


def _holders(model: torch.nn.Module, param: torch.Tensor) -> Iterator[tuple[torch.nn.Module, str]]:
    for module in model.modules():
        for key, held in module._parameters.items():
            if held is param:
                yield module, key
