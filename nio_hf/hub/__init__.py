"""The Hugging Face Hub: who may push what where, the model card, and the push."""

from nio_hf.hub.access import Destination, check_destination, is_repo_id
from nio_hf.hub.card import CARD_NAME, card_on_hub, write_card
from nio_hf.hub.push import WAITS, push_command, push_errors, push_folder, tried
from nio_hf.hub.sharing import shareable, shareable_recipe

__all__ = [
    "CARD_NAME",
    "WAITS",
    "Destination",
    "card_on_hub",
    "check_destination",
    "is_repo_id",
    "push_command",
    "push_errors",
    "push_folder",
    "shareable",
    "shareable_recipe",
    "tried",
    "write_card",
]
