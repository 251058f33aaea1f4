"""Post-training: from a model that continues text to one that answers, or sorts texts into classes.

Read in this order: conversations.py (files of examples in the forms that people have them),
encoding.py (their token ids, and which are to be learnt), quality.py (what is left out), batches.py
(packed into rows, or padded).

This room has no training loop of its own: what is learnt here are objectives on the one in the training room.
"""

from groundup.posttraining.batches import ExampleLoader
from groundup.posttraining.conversations import FORMS, BadRecord, Conversation, Form, form_of, read_conversations
from groundup.posttraining.encoding import Encoding, Example
from groundup.posttraining.quality import (
    Shared,
    check_template,
    of_length,
    shared_with_training,
    without_duplicates,
)

__all__ = [
    "FORMS",
    "BadRecord",
    "Conversation",
    "Encoding",
    "Example",
    "ExampleLoader",
    "Form",
    "Shared",
    "check_template",
    "form_of",
    "of_length",
    "read_conversations",
    "shared_with_training",
    "without_duplicates",
]
