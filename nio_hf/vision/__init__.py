"""Image data: data sets, transforms and metrics. The room knows nothing of NIO."""

from nio_hf.extras import require

require("recipes", "Image recipes")
