"""ESLM and Rho-1: the loss is the mean over the tokens above a quantile (Bal et al., arXiv 2505.19893; Lin et al., arXiv 2404.07965)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from composer.core import State, Time
from composer.models import ComposerModel
from torch import Tensor

from composer_effalgos.plan import Tokens
from composer_effalgos.plan.outputs import NotReadableError
from composer_effalgos.plan.token_loss import watched_tokens
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError
from composer_effalgos.weighting.formulas import select_above_quantile
from composer_effalgos.weighting.weighting import Weighting


class ESLM(Weighting):
    """Trains only on the tokens of a batch whose loss is at or above a quantile; the loss is the mean over these tokens.

    With a reference model, the quantile is taken of the loss minus the reference model's loss (Rho-1). No history is needed, so it works
    with any loader, including a single pass over a stream. A step takes as long as before, because all tokens go through the model; the
    papers report that fewer tokens are needed. The logged loss is that of the kept tokens.

    The model's own loss is used. Token losses are read from its autograd graph, so it may shift, ignore or smooth labels, or add terms that
    do not depend on the outputs. The loss must be a single ``torch`` cross-entropy over class indices, not compiled by ``torch.compile``.

    Runs on ``INIT``, ``FIT_START`` and, on several ranks with ``global_batch``, ``BEFORE_TRAIN_BATCH``.
    Source: Bal et al., "ESLM: Risk-Averse Selective Language Modeling for Efficient Pretraining", arXiv 2505.19893; Lin et al., "Rho-1: Not
    All Tokens Are What You Need", arXiv 2404.07965.

    Args:
        quantile: Fraction of tokens to leave out, in [0, 1). Rho-1 leaves out 0.3 to 0.4.
        score: Score to take the quantile of: ``'loss'``, or the ``'entropy'`` of the prediction.
        reference: A trained :class:`~composer.models.ComposerModel` with the same tokens, whose losses are subtracted. It is moved to the
            device, set to evaluation mode, and run once on every batch.
        burn_in: Initial period of the run in which all tokens count; ``None`` for none.
        global_batch: Whether to take the quantile over the tokens of all ranks or of each rank; in both cases per microbatch.

    Raises:
        InputError: An argument is out of range; at ``FIT_START``, if combined with pruning or weighted subsets; in training, if the loss
            cannot be read per token.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import ESLM
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='1ep', algorithms=[ESLM()])  # doctest: +SKIP
    """

    by_token = True

    def __init__(
        self,
        quantile: float = 0.1,
        score: Literal['loss', 'entropy'] = 'loss',
        *,
        reference: ComposerModel | None = None,
        burn_in: str | int | Time | None = None,
        global_batch: bool = False,
    ) -> None:
        check_number('quantile', quantile, least=0, below=1)
        if score not in ('loss', 'entropy'):
            raise InputError(f"score: expected 'loss' or 'entropy', got {score!r}")
        if reference is not None and not isinstance(reference, ComposerModel):
            raise InputError(f'reference: expected a ComposerModel, got {type(reference).__name__}; wrap it in HuggingFaceModel')
        if reference is not None and score != 'loss':
            raise InputError(f"score: expected 'loss' beside reference, whose losses are subtracted, got {score!r}")
        super().__init__(burn_in, global_batch=global_batch)
        self.quantile, self.score, self.reference = quantile, score, reference
        self._compared = False  # whether the reference was checked to have the model's targets

    def __repr__(self) -> str:
        reference = None if self.reference is None else type(self.reference).__name__
        settings = f'quantile={self.quantile}, score={self.score!r}, reference={reference}, global_batch={self.global_batch}'
        return f'{type(self).__name__}({settings})'

    def _check_combination(self, state: State) -> None:
        super()._check_combination(state)
        if self._planner.by_position:
            raise InputError(
                f'algorithms: ESLM cannot be combined with {self._planner.by_position[0]}, which weighs samples or reads their losses; '
                "take a strategy without, such as 'random', or leave one out"
            )
        self._compared = False
        if self.reference is not None:
            state.device.module_to_device(self.reference).eval()

    def weigh(self, tokens: Tokens, batch: Any) -> Tensor:
        if self.reference is not None:
            scores = tokens.likelihoods - self._reference_losses(self.reference, tokens, batch)
        else:
            scores = tokens.losses if self.score == 'loss' else tokens.entropies()
        (scores, shares), mine = self._population(scores, tokens.shares)
        weights = select_above_quantile(scores, shares, self.quantile)
        return torch.where(weights.isfinite().all(), weights, 1.0)[mine]

    def _reference_losses(self, reference: ComposerModel, tokens: Tokens, batch: Any) -> Tensor:
        name = type(reference).__name__
        try:
            losses, targets = watched_tokens(lambda: reference.loss(reference(batch), batch))
        except NotReadableError as error:
            raise InputError(f'reference: {name}.loss: {error}') from error
        same = len(targets) == len(tokens.targets)
        if same and not self._compared:  # only once, because it synchronises with the device
            same, self._compared = torch.equal(targets, tokens.targets), True
        if not same:
            raise InputError(
                f"reference: expected the labels of the model's loss, {len(tokens.targets)} tokens, got {len(targets)} others of {name}; "
                'take a reference with the same tokenizer and shift'
            )
        return losses
