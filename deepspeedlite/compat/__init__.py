"""What only scripts and libraries written for DeepSpeed need: nothing in the core knows of it.

initialize.py, engine.py      `initialize`, and the engine that it returns: the core's, under DeepSpeed's names
engine_accessors.py           what that engine answers about itself
stage3_names.py, param_access.py, optimizers.py     what is asked of parameters and optimizers
drop_in/                      the name `deepspeed`: module paths and names as a table, and what serves them
the rest                      helpers, constants and class names, one file for each of DeepSpeed's modules
"""
