"""What programs around a training ask of this machine, and tell: processors, GPUs, addresses, ports; sizes, tables."""
