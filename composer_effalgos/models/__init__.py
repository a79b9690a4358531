"""Image classification models by name."""

from composer_effalgos.models.registry import MODELS, build_model

__all__ = ['MODELS', 'build_model']
