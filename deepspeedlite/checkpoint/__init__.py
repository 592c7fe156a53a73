"""Checkpoints: flat shards in safetensors files and one manifest that says where every parameter lies.

An engine hands its `train_state` to `checkpoints`; `save` and `load` do the rest with it: `state_map` says what of it
lies where on this rank, `merge` what ranks hold together, `coordination` has all ranks succeed or fail as one.
`manifest` describes a checkpoint and validates, `tensors` reads and writes files, `reader` reads ranges of parameters.
`writer` makes a checkpoint appear whole or not at all; `staging` is where, `folder_lock` has jobs take turns,
`tag` what lies in a folder, `foreign` what else may lie there. docs/checkpoint-format.md has the bytes.
"""
