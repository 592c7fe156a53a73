"""Runs the real DeepSpeed's `init_inference` on tiny models, for tests that hold ours against it.

    PEER_PYTHON ds_peer_inference.py OUT.pt FAMILY ...

Run by the Python of an environment that has DeepSpeed and transformers, on each rank of a world that RANK, WORLD_SIZE
and MASTER_PORT tell. Rank 0 writes {family: logits, or the text of the error} to OUT.pt.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from tiny_transformers import logits_of, tiny


def policy_of(model: Any, family: str) -> dict[str, Any]:
    """What DeepSpeed's own tutorials give it for a family."""
    if family != "t5":
        return {}
    from transformers.models.t5.modeling_t5 import T5Block

    return {"injection_policy": {T5Block: ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")}}


def main() -> None:
    out, *families = sys.argv[1:]
    import deepspeed

    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # a minute's compilation, for what gloo can do
    deepspeed.init_distributed("gloo")

    found: dict[str, Any] = {}
    for family in families:
        model = tiny(family)
        try:
            engine = deepspeed.init_inference(
                model,
                dtype=torch.float32,
                tensor_parallel={"tp_size": int(os.environ["WORLD_SIZE"])},
                **policy_of(model, family),
            )
            with torch.no_grad():
                found[family] = logits_of(engine, family)
        except Exception as error:
            found[family] = f"{type(error).__name__}: {error}"
    if os.environ["RANK"] == "0":
        torch.save(found, out)


if __name__ == "__main__":
    main()
