import math

import pytest
import torch
from torch.utils.data import TensorDataset

from composer_effalgos.plan.classes import NO_CLASS, labels_of, logits_and_classes
from composer_effalgos.plan.loader import class_labels
from composer_effalgos.utils.errors import InputError


@pytest.mark.parametrize(
    ('rows', 'expected'),
    [
        (torch.tensor([[0.0, 1.0, 0.0], [0.1, 0.2, 0.7]]), [1, 2]),
        (torch.tensor([[0, 1, 0], [0, 0, 1]]), [1, 2]),
        (torch.tensor([[True, False], [True, True]]), [0, NO_CLASS]),
        (torch.tensor([[0.0, 0.0], [1.0, 1.0]]), [NO_CLASS, NO_CLASS]),
        (torch.tensor([[1.5, -0.5], [math.nan, 1.0]]), [NO_CLASS, NO_CLASS]),
        (torch.softmax(torch.arange(200.0).view(2, 100), dim=1).bfloat16(), [99, 99]),
        (torch.tensor([[5], [7]]), [5, 7]),
        (torch.tensor([[0.5], [0.25]]), [0.5, 0.25]),
    ],
)
def test_only_rows_that_are_distributions_are_soft_labels(rows, expected):
    assert labels_of((None, rows)).tolist() == expected


@pytest.mark.parametrize(('hint', 'ending'), [('', r'class indices \[B\]$'), ('use rule random', 'class indices .*; use rule random$')])
def test_refuses_what_is_no_classifier(hint, ending):
    with pytest.raises(InputError, match=f'^rule: expected a classifier for this rule, .* {ending}'):
        logits_and_classes(torch.zeros(4, 3, 2, 2), (None, torch.zeros(4, dtype=torch.int64)), 'rule', hint)


def test_the_classes_of_a_dataset_are_not_guessed_from_several_tensors():
    inputs, auxiliary, labels = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 0])
    assert torch.equal(class_labels(TensorDataset(inputs, labels)), labels)
    assert class_labels(TensorDataset(inputs, auxiliary, labels)) is None
