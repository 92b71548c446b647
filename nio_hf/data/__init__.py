"""Data sets of any kind: where they come from, their splits, parts and columns. It knows nothing of NIO."""

from nio_hf.extras import require

require("recipes", "Data sets")
