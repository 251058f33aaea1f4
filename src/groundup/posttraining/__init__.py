"""Post-training: from a model that continues text to one that answers, or sorts texts into classes.

Read in this order: recipe.py (what a run can be told). Data: conversations.py (files of examples in the forms that
people have them), labelled.py (texts and their classes), encoding.py (token ids, and which are to be learnt),
quality.py (what is left out), augmentation.py (copies of labelled texts), material.py (all of that for a run),
preview.py (an example to look at), batches.py and text_batches.py (rows to learn from). The model: vocabulary.py
(special tokens for one that lacks them), layers.py (which layers learn, how fast), noise.py (NEFTune). The run:
derive.py (what nobody gave), plan.py (what will be done), jobs.py (what is trained), finetuning.py (all of it). What
came of it: measure.py (what a model is worth before and after); for classes classifier.py (saved and opened again, over
sequence_classification.py, the form that transformers has for it), baseline.py (what it is measured beside),
class_evaluation.py and classifying.py (how good it is).

This room has no training loop of its own: what is learnt here are objectives on the one in the training room.
"""

from typing import TYPE_CHECKING

from groundup.posttraining.recipe import FinetuneRecipe
from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.posttraining.batches import ExampleLoader
    from groundup.posttraining.class_evaluation import evaluate_classifier, learning_curve_rows
    from groundup.posttraining.classifier import (
        TextClassifier,
        export_classifier,
        load_classifier,
        save_classifier,
        save_classifier_files,
    )
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
    from groundup.posttraining.text_batches import EncodedTexts, TextLoader, encode_texts
    from groundup.posttraining.vocabulary import with_template

_LAZY = {
    "FORMS": "conversations",
    "BadRecord": "conversations",
    "Conversation": "conversations",
    "EncodedTexts": "text_batches",
    "Encoding": "encoding",
    "Example": "encoding",
    "ExampleLoader": "batches",
    "Finetuning": "plan",
    "Form": "conversations",
    "Shared": "quality",
    "TextClassifier": "classifier",
    "TextLoader": "text_batches",
    "check_template": "quality",
    "conclude": "finetuning",
    "encode_texts": "text_batches",
    "evaluate_classifier": "class_evaluation",
    "export_classifier": "classifier",
    "finetune": "finetuning",
    "form_of": "conversations",
    "learning_curve_rows": "class_evaluation",
    "load_classifier": "classifier",
    "of_length": "quality",
    "plan_finetuning": "plan",
    "read_conversations": "conversations",
    "save_classifier": "classifier",
    "save_classifier_files": "classifier",
    "shared_with_training": "quality",
    "with_template": "vocabulary",
    "without_duplicates": "quality",
}

__all__ = [
    "FORMS",
    "BadRecord",
    "Conversation",
    "EncodedTexts",
    "Encoding",
    "Example",
    "ExampleLoader",
    "FinetuneRecipe",
    "Finetuning",
    "Form",
    "Shared",
    "TextClassifier",
    "TextLoader",
    "check_template",
    "conclude",
    "encode_texts",
    "evaluate_classifier",
    "export_classifier",
    "finetune",
    "form_of",
    "learning_curve_rows",
    "load_classifier",
    "of_length",
    "plan_finetuning",
    "read_conversations",
    "save_classifier",
    "save_classifier_files",
    "shared_with_training",
    "with_template",
    "without_duplicates",
]

__getattr__ = lazy_names(__name__, _LAZY)
