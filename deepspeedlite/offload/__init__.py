"""Where model states lie between their uses, and how they come and go: see `placement` and `store`."""
