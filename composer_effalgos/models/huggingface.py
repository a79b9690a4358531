"""Hugging Face models: from a configuration name with random weights, or from a local folder. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean, one_line

_KEY = 'model.pretrained_model_name_or_path'


def hf_causal_lm(
    num_classes: int,
    seq_len: int,
    *,
    pretrained_model_name_or_path: str,
    pretrained: bool = False,
    config_overrides: dict[str, Any] | None = None,
) -> Any:
    """A causal language model. The argument names are llm-foundry's.

    Args:
        num_classes: Vocabulary size of the data; that of a configuration from a folder may be larger.
        seq_len: Maximum sequence length.
        pretrained_model_name_or_path: Name of a configuration (``gpt2``, ``llama``, ``mamba``, ...), or a folder that holds one.
        pretrained: Load the weights in the folder.
        config_overrides: Configuration attributes to set, e.g. ``n_layer``.

    Returns:
        A ``transformers.PreTrainedModel``.

    Raises:
        InputError: A name or attribute is unknown or out of range, the model is not causal, or the weights are missing or do not match.
    """
    config = _config(pretrained_model_name_or_path, config_overrides or {}, num_classes, seq_len)
    model = _model('AutoModelForCausalLM', config, pretrained_model_name_or_path if pretrained else None)
    if _sees_the_future(model):
        raise InputError(f'{_KEY}: {config.model_type} sees the tokens that it should predict; set model.config_overrides.is_decoder=true')
    return model


def _sees_the_future(model: Any) -> bool:
    """Whether the output at a token depends on later tokens."""
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    tokens[1, 1] = 1
    model.eval()
    with torch.no_grad():
        first = model(tokens, use_cache=False, return_dict=True).logits[:, 0]
    model.train()
    return not torch.allclose(first[0], first[1])


def hf_sequence_classification(
    num_classes: int,
    seq_len: int,
    vocab_size: int,
    *,
    pretrained_model_name_or_path: str,
    pretrained: bool = False,
    config_overrides: dict[str, Any] | None = None,
) -> Any:
    """A text classifier.

    Args:
        num_classes: Number of classes.
        seq_len: Maximum sequence length.
        vocab_size: Vocabulary size of the data; that of a configuration from a folder may be larger.
        pretrained_model_name_or_path: Name of a configuration (``bert``, ``gpt2``, ...), or a folder that holds one.
        pretrained: Load the weights in the folder; the last layer is initialised at random if the folder has no weights for it.
        config_overrides: Configuration attributes to set, e.g. ``num_hidden_layers``.

    Returns:
        A ``transformers.PreTrainedModel``.

    Raises:
        InputError: A name or attribute is unknown or out of range, or the weights are missing or do not match.
    """
    config = _config(pretrained_model_name_or_path, config_overrides or {}, vocab_size, seq_len)
    config.num_labels = num_classes
    config.problem_type = 'single_label_classification'
    if config.pad_token_id is None:
        config.pad_token_id = 0  # these models classify at the last token that is not padding
    return _model('AutoModelForSequenceClassification', config, pretrained_model_name_or_path if pretrained else None)


def import_transformers() -> Any:
    """Import ``transformers``.

    Raises:
        InputError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError("model.name: Hugging Face's models need transformers; pip install 'composer-effalgos[text]'") from error
    return transformers


def _config(name: str, overrides: dict[str, Any], vocab_size: int, seq_len: int) -> Any:
    """Load the configuration, apply the overrides and check it against the data."""
    transformers = import_transformers()
    folder = Path(name).expanduser()
    from_folder = folder.is_dir()
    if not from_folder and name not in transformers.CONFIG_MAPPING:
        hint = did_you_mean(name, transformers.CONFIG_MAPPING.keys(), otherwise='such as gpt2, llama or bert')
        raise InputError(f"{_KEY}: expected a folder or the name of a configuration of Hugging Face's, got {name!r}; {hint}")
    try:
        config = (
            transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            if from_folder
            else transformers.AutoConfig.for_model(name)
        )
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f'{_KEY}: {name}: the configuration cannot be read ({one_line(error)[:200]})') from error
    known = {*config.to_dict(), *getattr(config, 'attribute_map', {})}
    for key in overrides:
        if key not in known:
            raise InputError(f'model.config_overrides.{key}: unknown key; {did_you_mean(key, known)}')
    if not from_folder:
        overrides = {'vocab_size': vocab_size, 'use_cache': False, **overrides}
    for key, value in overrides.items():
        setattr(config, key, value)
    for key, least in (('vocab_size', vocab_size), ('max_position_embeddings', seq_len)):
        value = getattr(config, key, None)
        if value is not None and (type(value) is not int or value < least):
            raise InputError(
                f'model.config_overrides.{config.attribute_map.get(key, key)}: expected at least {least} for this data, got {value}'
            )
    for key in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
        if not from_folder and key not in overrides and isinstance(value := getattr(config, key, None), int) and value >= config.vocab_size:
            setattr(config, key, None)  # refers to the published model's vocabulary
    return config


def _model(kind: str, config: Any, folder: str | None) -> Any:
    """Build the model with random weights, or with those in the folder."""
    factory = getattr(import_transformers(), kind)
    if type(config) not in factory._model_mapping:
        raise InputError(f'{_KEY}: {config.model_type} has no model for this task ({kind})')
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise InputError(f'model.pretrained: expected {_KEY} to be a folder that holds weights, got {folder!r}; nothing is downloaded')
    try:
        if folder is None:
            return factory.from_config(config)
        model, found = factory.from_pretrained(
            Path(folder).expanduser(), config=config, local_files_only=True, output_loading_info=True, torch_dtype='float32'
        )
    except Exception as error:  # each model raises its own types for inconsistent sizes
        raise InputError(f'model.{"config_overrides" if folder is None else "pretrained"}: {one_line(error)[:300]}') from error
    missing = [name for name in found['missing_keys'] if kind == 'AutoModelForCausalLM' or name.startswith(model.base_model_prefix + '.')]
    if missing:
        raise InputError(f'model.pretrained: {folder}: the weights are of another model: {", ".join(sorted(missing)[:3])} are not there')
    return model
