"""DeepSpeed's own checkpoints: `reader`, `writer`, and what both know of their layout and states."""
