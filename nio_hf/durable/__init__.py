"""Trainings in which nothing is lost: whole checkpoints, resumed in every tensor, on SIGTERM. For any Trainer."""

from nio_hf.durable.trainer import AUTO, GO_ON, DurableTrainerMixin, TrainerMixin

__all__ = ["AUTO", "GO_ON", "DurableTrainerMixin", "TrainerMixin"]
