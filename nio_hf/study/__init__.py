"""Studies: trainings of one recipe, each in a process of its own, and the conclusions from them."""

from nio_hf.extras import require

require("recipes", "Studies of recipes")
