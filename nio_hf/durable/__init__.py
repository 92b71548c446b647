"""Durable trainings with any Trainer: whole checkpoints, every tensor restored, a checkpoint on SIGTERM."""

from nio_hf.durable.trainer import AUTO, GO_ON, DurableTrainerMixin, TrainerMixin

__all__ = ["AUTO", "GO_ON", "DurableTrainerMixin", "TrainerMixin"]
