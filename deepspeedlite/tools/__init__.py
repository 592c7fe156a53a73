"""Command-line tools beside the launcher and the report: benchmarks of ranks and disks, memory plans, checkpoints."""
