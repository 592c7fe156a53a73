"""Axes of parallelism beside data: which ranks hold one model together, and a folder for each way to split it."""
