"""NIO in the Hugging Face Trainer."""

from nio_hf.training.arguments import NIOTrainingArguments
from nio_hf.training.trainer import NIOTrainer, NIOTrainerMixin

__all__ = ["NIOTrainer", "NIOTrainerMixin", "NIOTrainingArguments"]
