"""What is told of a training: progress lines, monitors, timers, memory, floating-point work."""
