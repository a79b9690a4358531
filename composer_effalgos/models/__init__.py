"""Models by name: image classifiers, language models, text classifiers."""

from composer_effalgos.models.registry import MODELS, build_model

__all__ = ['MODELS', 'build_model']
