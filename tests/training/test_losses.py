import pytest
import torch
import torch.nn.functional as F

from mnist.training.losses import LOSSES, build_loss

LABELS = torch.tensor([3, 0, 9, 3, 7])


def one_hot():
    return F.one_hot(LABELS, 10).double()


REFERENCES = {
    ("cross_entropy", 0.0): lambda logits: F.cross_entropy(logits, LABELS),
    ("cross_entropy", 0.1): lambda logits: F.cross_entropy(logits, LABELS, label_smoothing=0.1),
    ("nll", 0.0): lambda logits: F.nll_loss(logits.log_softmax(dim=1), LABELS),
    ("mse_softmax", 0.0): lambda logits: F.mse_loss(logits.softmax(dim=1), one_hot()),
    ("mse_sigmoid", 0.0): lambda logits: F.mse_loss(logits.sigmoid(), one_hot()),
}


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 10, generator=generator, dtype=torch.float64).mul(3).requires_grad_()


def test_every_loss_has_a_reference():
    assert {name for name, _ in REFERENCES} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_gives_one_number_per_sample(name, logits):
    losses = build_loss(name)(logits, LABELS)
    assert losses.shape == (5,)
    alone = [build_loss(name)(logits[i : i + 1], LABELS[i : i + 1]).item() for i in range(5)]
    assert losses.tolist() == pytest.approx(alone)


@pytest.mark.parametrize(("name", "label_smoothing"), REFERENCES)
def test_the_mean_and_its_gradient_are_those_of_torch(name, label_smoothing, logits):
    ours = build_loss(name, label_smoothing)(logits, LABELS).mean()
    theirs = REFERENCES[name, label_smoothing](logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_label_smoothing_mixes_in_the_uniform_distribution(logits):
    log_probabilities = logits.log_softmax(dim=1)
    targets = 0.8 * one_hot() + 0.2 / 10
    expected = -(targets * log_probabilities).sum(dim=1)
    torch.testing.assert_close(build_loss("cross_entropy", 0.2)(logits, LABELS), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_confidently_right_logits_cost_nothing(name):
    logits = torch.full((5, 10), -40.0).scatter(1, LABELS[:, None], 40.0)
    torch.testing.assert_close(build_loss(name)(logits, LABELS), torch.zeros(5), atol=1e-6, rtol=0)
