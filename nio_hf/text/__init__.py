"""Text data: documents, tokens, and the blocks that train a language model. The room knows nothing of NIO."""

from nio_hf.extras import require

require("recipes", "Text recipes")
