"""What programs around a training ask of this machine, and tell: its processors, GPUs, addresses and ports; sizes, times
and tables as text."""
