"""Layers that are described first and built later, by the rank whose stage they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.runtime.log import logger

Layer = Callable[..., Any]


class LayerSpec:
    """A layer as its class and what it is made with, so that only the rank that holds it spends memory on it.

    Args:
        typename: a `torch.nn.Module` class, or anything that returns one (or a function of the layer's input).
        module_args: its arguments,
        module_kwargs: and keyword arguments.
    """

    def __init__(self, typename: Callable[..., Layer], *module_args: Any, **module_kwargs: Any) -> None:
        if not callable(typename):
            raise ConfigError(f"LayerSpec takes a class of modules and its arguments, not {typename!r}")
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs
        self.global_rank: int | None = None  # kept for scripts that read it

    def build(self, log: bool = False) -> Layer:
        """Make the layer."""
        if log:
            logger.info("building %r", self)
        return self.typename(*self.module_args, **self.module_kwargs)

    @property
    def name(self) -> str:
        """The class's name."""
        return getattr(self.typename, "__name__", repr(self.typename))

    def __repr__(self) -> str:
        args = [repr(arg) for arg in self.module_args] + [f"{k}={v!r}" for k, v in self.module_kwargs.items()]
        return f"{self.name}({', '.join(args)})"


class TiedLayerSpec(LayerSpec):
    """A layer that is one and the same module wherever its key occurs: on stages apart, copies that stay equal.

    Args:
        key: which layers are the same one.
        typename: as of LayerSpec.
        module_args: as of LayerSpec.
        forward_fn: called as `forward_fn(module, inputs)` instead of the module: to use an embedding as the head, say.
        tied_weight_attr: names of the weights that are meant (a name, or several), checked to be there. All the
            module's parameters are tied, as they are on one rank.
        module_kwargs: as of LayerSpec.
    """

    def __init__(
        self,
        key: str,
        typename: Callable[..., Layer],
        *module_args: Any,
        forward_fn: Callable[..., Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)

    def build(self, log: bool = False) -> Layer:
        """Make the module.

        Raises:
            ConfigError: it has none of the weights named.
        """
        module = super().build(log)
        for name in self.tied_weight_attr:
            owner: Any = module
            for part in name.split("."):
                owner = getattr(owner, part, None)
            if not isinstance(owner, torch.Tensor):
                raise ConfigError(
                    f"TiedLayerSpec({self.key!r}, {self.name}): the module has no weight {name!r}; tied_weight_attr= "
                    "names the weights that are tied"
                )
        return module


def name_of_layer(layer: Any) -> str:
    """What a layer is called in a list of layers: its class's name."""
    if isinstance(layer, LayerSpec):
        return layer.name
    return type(layer).__name__ if isinstance(layer, torch.nn.Module) else getattr(layer, "__name__", repr(layer))


def layer_numel(layer: Any) -> int:
    """Trained elements of a layer. One that is only described is built without memory, where its class allows that."""
    if isinstance(layer, LayerSpec):
        with torch.random.fork_rng():
            try:
                with torch.device("meta"):
                    built = layer.build()
            except (RuntimeError, NotImplementedError):  # its constructor reads values, say
                built = layer.build()
        layer = built
    if not isinstance(layer, torch.nn.Module):
        return 0
    return sum(param.numel() for param in layer.parameters() if param.requires_grad)
