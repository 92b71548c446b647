"""Data sets of any kind: their sources, splits, parts and columns. The room knows nothing of NIO."""

from nio_hf.extras import require

require("recipes", "Data sets")
