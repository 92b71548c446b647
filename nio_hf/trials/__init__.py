"""Trials: trainings of one recipe, each in a process of its own, with their results kept."""
