"""Checkpoints: flat shards in safetensors files and one manifest that says where every parameter lies.

`manifest` describes and validates, `tensors` reads and writes the files, `tag` makes a checkpoint appear whole or not
at all, `reader` reads ranges of parameters, `save` and `load` connect them with an engine.
docs/checkpoint-format.md has the bytes.
"""
