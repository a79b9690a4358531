"""Language models and text classifiers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from composer.metrics import CrossEntropy, LanguageCrossEntropy
from composer.models import HuggingFaceModel
from torchmetrics.classification import MulticlassAccuracy

from composer_effalgos.models.huggingface import hf_causal_lm, hf_sequence_classification, import_transformers
from composer_effalgos.recipes.arguments import check_arguments
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError


def gpt2(num_classes: int, seq_len: int, *, layers: int = 3, width: int = 64, heads: int = 4, dropout: float = 0.0) -> Any:
    """GPT-2 (Radford et al. 2019) of any size. The defaults have 175 thousand parameters on bytes in sequences of 128.

    Args:
        num_classes: Vocabulary size.
        seq_len: Maximum sequence length.
        layers: Number of blocks.
        width: Embedding dimension.
        heads: Attention heads per block.
        dropout: Dropout probability of embeddings, attention and residuals.

    Returns:
        A ``transformers.GPT2LMHeadModel``.

    Raises:
        InputError: A size is out of range, or ``transformers`` is not installed.
    """
    for name, value in (('layers', layers), ('width', width), ('heads', heads)):
        if value < 1:
            raise InputError(f'model.{name}: expected at least 1, got {value}')
    if width % heads:
        raise InputError(f'model.width: expected a multiple of the {heads} heads, got {width}')
    check_number('model.dropout', dropout, least=0, below=1)
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=num_classes,
        n_positions=seq_len,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


LANGUAGE_MODELS: Mapping[str, Callable[..., Any]] = {'gpt2': gpt2, 'hf_causal_lm': hf_causal_lm}
"""Builders: ``(num_classes, seq_len, **options)``; ``num_classes`` is the vocabulary size."""

TEXT_CLASSIFIERS: Mapping[str, Callable[..., Any]] = {'hf_sequence_classification': hf_sequence_classification}
"""Builders: ``(num_classes, seq_len, vocab_size, **options)``."""


def build_language_model(name: str, num_classes: int, seq_len: int, **options: Any) -> HuggingFaceModel:
    """Build a language model with its own next-token loss. Its evaluation metric is cross-entropy in nats per token.

    Args:
        name: One of :data:`LANGUAGE_MODELS`.
        num_classes: Vocabulary size.
        seq_len: Maximum sequence length.
        **options: Arguments of the model's builder.

    Raises:
        InputError: An option is unknown or out of range.
    """
    options = check_arguments('model', LANGUAGE_MODELS[name], options, given=('num_classes', 'seq_len'))
    model = LANGUAGE_MODELS[name](num_classes, seq_len, **options)
    return HuggingFaceModel(model, use_logits=True, eval_metrics=[LanguageCrossEntropy()], shift_labels=True)


def build_text_classifier(name: str, num_classes: int, seq_len: int, vocab_size: int, **options: Any) -> HuggingFaceModel:
    """Build a text classifier with its own loss. Its evaluation metrics are cross-entropy in nats per sample and accuracy.

    Args:
        name: One of :data:`TEXT_CLASSIFIERS`.
        num_classes: Number of classes.
        seq_len: Maximum sequence length.
        vocab_size: Vocabulary size.
        **options: Arguments of the model's builder.

    Raises:
        InputError: An option is unknown or out of range.
    """
    options = check_arguments('model', TEXT_CLASSIFIERS[name], options, given=('num_classes', 'seq_len', 'vocab_size'))
    model = TEXT_CLASSIFIERS[name](num_classes, seq_len, vocab_size, **options)
    metrics = [CrossEntropy(), MulticlassAccuracy(num_classes=num_classes, average='micro')]
    return HuggingFaceModel(model, use_logits=True, eval_metrics=metrics, shift_labels=False)
