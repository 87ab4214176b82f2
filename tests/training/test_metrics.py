import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from mnist.config import DataConfig, ImageConfig, RuntimeConfig
from mnist.data.datasets import read
from mnist.data.transforms import BatchTransform
from mnist.system.accelerator import build_accelerator
from mnist.training.evaluation import evaluate
from mnist.training.losses import build_loss
from mnist.training.metrics import METRICS, Scores, add_to_confusion
from tests.networks import mnist_model


def random_batch(seed, size=200):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (size,), generator=generator)
    logits = torch.randn(size, 10, generator=generator)
    logits[torch.arange(size), labels] += 1
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_the_confusion_matrix_is_that_of_scikit_learn(dtype):
    logits, labels = random_batch(0)
    counts = torch.zeros(100, dtype=dtype)
    add_to_confusion(counts, logits, labels)
    expected = confusion_matrix(labels, logits.argmax(dim=1), labels=range(10))
    assert counts.view(10, 10).long().tolist() == expected.tolist()


def test_counts_add_up_over_uneven_batches():
    logits, labels = random_batch(1)
    whole, parts = torch.zeros(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    add_to_confusion(whole, logits, labels)
    for rows in (slice(0, 64), slice(64, 65), slice(65, 200)):
        add_to_confusion(parts, logits[rows], labels[rows])
    assert parts.tolist() == whole.tolist()


def test_scores_agree_with_scikit_learn():
    logits, labels = random_batch(2)
    predictions = logits.argmax(dim=1)
    scores = Scores.from_sums({"loss": 50.0}, torch.from_numpy(confusion_matrix(labels, predictions, labels=range(10))))
    assert scores.accuracy == accuracy_score(labels, predictions)
    assert scores.accuracy_per_class == pytest.approx(recall_score(labels, predictions, average=None).tolist())
    assert scores.num_correct == int((predictions == labels).sum())


def test_sums_are_divided_once_by_the_number_of_samples():
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion[3, 3], confusion[3, 5] = 3, 1
    scores = Scores.from_sums({"loss": 2.0}, confusion)
    assert scores.as_dict() == {"loss": 0.5, "accuracy": 0.75, "num_correct": 3, "num_samples": 4}
    assert scores.confusion[3][5] == 1


def test_a_class_without_samples_has_no_accuracy():
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion[3, 3], confusion[3, 5] = 3, 1
    per_class = Scores.from_sums({"loss": 2.0}, confusion).accuracy_per_class
    assert per_class[3] == 0.75
    assert [accuracy is None for accuracy in per_class] == [k != 3 for k in range(10)]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_new_metric_is_a_mean_over_each_split_that_is_scored(monkeypatch, sharded):
    monkeypatch.setitem(METRICS, "ones", lambda _loss_sum, _logits, labels: (labels == 1).sum())
    test = read("digits", DataConfig()).train[:2300]
    scores = evaluate(
        mnist_model("tinynet"),
        test,
        num_classes=10,
        accelerator=build_accelerator(RuntimeConfig(cpu=True)),
        loss_fn=build_loss("cross_entropy"),
        transform=BatchTransform(ImageConfig()),
        sharded=sharded,
    )
    assert scores.as_dict()["ones"] == pytest.approx(float((test.labels == 1).float().mean()), rel=1e-6)
    assert scores.num_samples == 2300


def test_47_classes_are_counted_in_a_matrix_of_47_rows():
    counts, labels = torch.zeros(47 * 47, dtype=torch.int64), torch.arange(47)
    add_to_confusion(counts, torch.eye(47).roll(1, dims=0), labels)
    assert counts.view(47, 47).equal(torch.eye(47).roll(1, dims=0).long())
