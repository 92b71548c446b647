"""Recipes: a training with its model and data, as one flat YAML file."""
