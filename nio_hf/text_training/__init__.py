"""Training of language models: where the data of `text` and the Trainer of recipes meet."""

from nio_hf.extras import require

require("recipes", "Recipes of text")
