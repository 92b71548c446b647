"""The Hugging Face Hub: who may push what where, the model card, and the push."""

from nio_hf.hub.access import Destination, check_destination, ensure_repository
from nio_hf.hub.card import CARD_NAME, write_card
from nio_hf.hub.push import WAITS, push_folder

__all__ = [
    "CARD_NAME",
    "WAITS",
    "Destination",
    "check_destination",
    "ensure_repository",
    "push_folder",
    "write_card",
]
