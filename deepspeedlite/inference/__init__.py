"""Inference: an engine for forward passes and generation on one rank or several.

Nothing here is imported before `init_inference` is asked for, and transformers never by this package itself: what
generates is the model's own `generate`.
"""
