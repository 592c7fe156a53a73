"""`optimizer` and `scheduler`: a name and its parameters, which `recipes` knows."""

from deepspeedlite.config.base import FreeForm, Section, Text, key


class Optimizer(Section, beside="optimizer"):
    """The optimizer to build when `initialize` is given none."""

    type: Text = key(..., "Adam, AdamW, SGD, Adagrad, Lion, Lamb or any class of torch.optim.", min_length=1)
    params: FreeForm = key(dict, "Its keyword arguments, under the names that its class uses.")


class Scheduler(Section):
    """The learning-rate schedule to build when `initialize` is given none."""

    type: Text = key(..., "WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle or LRRangeTest.", min_length=1)
    params: FreeForm = key(dict, "Its keyword arguments.")
