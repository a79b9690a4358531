"""ESLM and Rho-1: the mean over the tokens above a quantile (Bal et al., arXiv 2505.19893; Lin et al., arXiv 2404.07965)."""

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
    """Trains on the tokens of a batch whose loss is at or above a quantile: the loss is their mean.

    With a reference model the quantile is of the loss minus that of the reference (Rho-1). It needs no history, so it works on any loader,
    in a single pass over a stream too. It saves no time, since all tokens go through the model: it is said to need fewer. The loss that is
    logged is that of the kept tokens.

    The model's own loss stays the loss: its tokens are read from its graph, so it may shift the labels, ignore some, smooth them or add
    terms that do not read the outputs. Not readable are losses other than one ``torch`` cross-entropy over class indices, and what
    ``torch.compile`` compiles.

    Runs on ``INIT``, ``FIT_START`` and, over several ranks with ``global_batch``, ``BEFORE_TRAIN_BATCH``.
    Source: Bal et al., "ESLM: Risk-Averse Selective Language Modeling for Efficient Pretraining", arXiv 2505.19893; Lin et al., "Rho-1: Not
    All Tokens Are What You Need", arXiv 2404.07965.

    Args:
        quantile: The fraction of the tokens that is left out, in [0, 1). Rho-1 leaves out 0.3 to 0.4.
        score: What the quantile is of: ``'loss'``, or the ``'entropy'`` of the prediction.
        reference: A trained :class:`~composer.models.ComposerModel` with the same tokens, whose losses are subtracted. It is put on the
            device in evaluation mode, and sees every batch once.
        burn_in: Time at the beginning of the run in which all tokens count; ``None`` for none.
        global_batch: Whether the quantile is over the tokens of all ranks or over those of each rank. In either case over those of a
            microbatch.

    Raises:
        InputError: For an argument outside its range; at ``FIT_START``, beside pruning or weighted subsets; in training, for a loss that
            cannot be read token by token.

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
        self._compared = False  # whether the reference's tokens were seen to be the model's

    def __repr__(self) -> str:
        reference = None if self.reference is None else type(self.reference).__name__
        settings = f'quantile={self.quantile}, score={self.score!r}, reference={reference}, global_batch={self.global_batch}'
        return f'{type(self).__name__}({settings})'

    def _refuse(self, state: State) -> None:
        super()._refuse(state)
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
        if same and not self._compared:  # once: it waits for the device
            same, self._compared = torch.equal(targets, tokens.targets), True
        if not same:
            raise InputError(
                f"reference: expected the labels of the model's loss, {len(tokens.targets)} tokens, got {len(targets)} others of {name}; "
                'take a reference with the same tokenizer and shift'
            )
        return losses
