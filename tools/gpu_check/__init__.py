"""`make gpu-check`: builds, checks and measures the library on this machine's accelerators (docs/gpu-check.md)."""
