"""Trials: trainings of one recipe, each in a process of its own, with their results kept."""

from nio_hf.extras import require

require("recipes", "Trials of recipes")
