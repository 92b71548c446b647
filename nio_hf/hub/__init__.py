"""The Hugging Face Hub: who may push what where, the model card, and the push."""

from nio_hf.hub.push import Destination, check_destination, is_repo_id

__all__ = ["Destination", "check_destination", "is_repo_id"]
