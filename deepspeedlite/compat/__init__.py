"""Names that scripts written for DeepSpeed import and that nothing else here needs; `drop_in` serves them.

What belongs to a part of the library is there; this folder holds constants, small helpers and class names.
"""
