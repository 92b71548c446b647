"""Pushes to the Hugging Face Hub: permissions, the model card, and the upload."""

from nio_hf.hub.push import Destination, check_destination, is_repo_id

__all__ = ["Destination", "check_destination", "is_repo_id"]
