"""Where training's numbers go: `registry` hands them to the writers, a file each, with the interface of `writer`."""
