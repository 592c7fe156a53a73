"""Other formats, read into and written from the same map of states: a folder or a file each."""
