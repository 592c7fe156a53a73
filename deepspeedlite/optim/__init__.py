"""Optimizers, learning-rate schedules and the step that applies them to flat runs."""
