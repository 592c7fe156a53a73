"""What every part builds on: the world it runs in, devices, the log, errors. Imports nothing else of the package."""
