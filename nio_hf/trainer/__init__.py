"""NIO in the Hugging Face Trainer."""

from nio_hf.trainer.arguments import NIOTrainingArguments
from nio_hf.trainer.trainer import NIOTrainer, NIOTrainerMixin

__all__ = ["NIOTrainer", "NIOTrainerMixin", "NIOTrainingArguments"]
