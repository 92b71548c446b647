"""Text data: documents, their tokens, and the blocks that a language model is trained on. It knows nothing of NIO."""

from nio_hf.extras import require

require("recipes", "Text recipes")
