"""Post-training: from a model that continues text to one that answers, or sorts texts into classes.

Read in this order: recipe.py (what a run can be told). Data: conversations.py (files of examples in the forms that
people have them), labelled.py (texts and their classes), encoding.py (token ids, and which are to be learnt),
quality.py (what is left out), augmentation.py (copies of labelled texts), material.py (all of that for a run),
preview.py (an example to look at), batches.py and text_batches.py (rows to learn from). The model: vocabulary.py
(special tokens for one that lacks them), layers.py (which layers learn, how fast), noise.py (NEFTune). The run:
derive.py (what nobody gave), plan.py (what will be done), jobs.py (what is trained), measure.py (what a model is worth
before and after), baseline.py (what a classifier is measured beside), finetuning.py (all of it).

This room has no training loop of its own: what is learnt here are objectives on the one in the training room.
"""

from typing import TYPE_CHECKING

from groundup.posttraining.recipe import FinetuneRecipe
from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.posttraining.batches import ExampleLoader
    from groundup.posttraining.conversations import FORMS, BadRecord, Conversation, Form, form_of, read_conversations
    from groundup.posttraining.encoding import Encoding, Example
    from groundup.posttraining.finetuning import conclude, finetune
    from groundup.posttraining.plan import Finetuning, plan_finetuning
    from groundup.posttraining.quality import (
        Shared,
        check_template,
        of_length,
        shared_with_training,
        without_duplicates,
    )
    from groundup.posttraining.vocabulary import resize_embeddings, with_template

_LAZY = {
    "FORMS": "conversations",
    "BadRecord": "conversations",
    "Conversation": "conversations",
    "Encoding": "encoding",
    "Example": "encoding",
    "ExampleLoader": "batches",
    "Finetuning": "plan",
    "Form": "conversations",
    "Shared": "quality",
    "check_template": "quality",
    "conclude": "finetuning",
    "finetune": "finetuning",
    "form_of": "conversations",
    "of_length": "quality",
    "plan_finetuning": "plan",
    "read_conversations": "conversations",
    "resize_embeddings": "vocabulary",
    "shared_with_training": "quality",
    "with_template": "vocabulary",
    "without_duplicates": "quality",
}

__all__ = [
    "FORMS",
    "BadRecord",
    "Conversation",
    "Encoding",
    "Example",
    "ExampleLoader",
    "FinetuneRecipe",
    "Finetuning",
    "Form",
    "Shared",
    "check_template",
    "conclude",
    "finetune",
    "form_of",
    "of_length",
    "plan_finetuning",
    "read_conversations",
    "resize_embeddings",
    "shared_with_training",
    "with_template",
    "without_duplicates",
]

__getattr__ = lazy_names(__name__, _LAZY)
