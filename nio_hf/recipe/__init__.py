"""Recipes: a training with its model and data, as one flat YAML file."""

from nio_hf.extras import require

require("recipes", "Recipes")
