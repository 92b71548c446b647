"""Training of image classifiers: where the data of `vision` and the Trainer of `trainer` meet."""

from nio_hf.extras import require

require("recipes", "Image recipes")
