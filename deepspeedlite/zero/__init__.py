"""The one ZeRO: a plan, a layout, units that own flat buffers, and the policy that groups parameters into units."""
