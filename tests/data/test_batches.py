from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist.data.batches import Split, TrainLoader

SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3)]


def numbered(num_samples):
    """Labels are the places in the split; images show the same number."""
    labels = torch.arange(num_samples)
    return Split(labels.to(torch.uint8)[:, None, None].expand(num_samples, 28, 28), labels)


def loader(num_samples=50, global_batch_size=12, **changes):
    return TrainLoader(numbered(num_samples), **({"global_batch_size": global_batch_size, "seed": 7} | changes))


def global_batches(world_size, accumulation_steps, first, stop, **changes):
    """The indices of each step, put together from all ranks and micro-batches in order."""
    ranks = [
        loader(rank=rank, world_size=world_size, accumulation_steps=accumulation_steps, **changes).steps(first, stop)
        for rank in range(world_size)
    ]
    return [
        [index for rank in step for micro in rank if micro.num_samples for index in micro.labels.tolist()]
        for step in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("epoch", [0, 1, 1000])
def test_the_order_of_an_epoch_is_a_permutation(epoch):
    assert sorted(loader().order(epoch).tolist()) == list(range(50))


def test_an_epoch_shows_every_image_once_in_its_order():
    batches = global_batches(1, 1, 0, 5)
    assert [len(batch) for batch in batches] == [12, 12, 12, 12, 2]
    assert list(chain(*batches)) == loader().order(0).tolist()


@pytest.mark.parametrize(("world_size", "accumulation_steps"), SHAPES)
def test_the_global_batch_depends_neither_on_ranks_nor_on_accumulation(world_size, accumulation_steps):
    assert global_batches(world_size, accumulation_steps, 0, 12) == global_batches(1, 1, 0, 12)


@settings(deadline=None, max_examples=60)
@given(
    num_samples=st.integers(1, 60),
    batch_share=st.floats(0.01, 1),
    world_size=st.integers(1, 5),
    accumulation_steps=st.integers(1, 4),
)
def test_every_image_is_trained_on_once_an_epoch(num_samples, batch_share, world_size, accumulation_steps):
    size = max(1, int(batch_share * num_samples))
    changes = {"num_samples": num_samples, "global_batch_size": size}
    epoch_steps = loader(**changes).epoch_steps
    batches = global_batches(world_size, accumulation_steps, 0, epoch_steps, **changes)
    assert sorted(chain(*batches)) == list(range(num_samples))


@pytest.mark.parametrize(("world_size", "accumulation_steps"), SHAPES)
def test_rows_are_the_places_in_the_global_batch(world_size, accumulation_steps):
    batches = global_batches(1, 1, 0, 5)
    for rank in range(world_size):
        own = loader(rank=rank, world_size=world_size, accumulation_steps=accumulation_steps)
        for batch, micros in zip(batches, own.steps(0, 5), strict=True):
            for micro in micros:
                assert micro.labels.tolist() == batch[micro.rows]
                assert micro.global_batch_size == len(batch)


def test_images_and_labels_stay_together():
    for micros in loader(world_size=2, rank=1, accumulation_steps=2).steps(0, 5):
        for micro in micros:
            assert micro.images.shape == (len(micro.labels), 28, 28)
            assert torch.equal(micro.images[:, 0, 0].long(), micro.labels)


@pytest.mark.parametrize(("world_size", "accumulation_steps"), SHAPES)
def test_shares_differ_by_one_image_at_most(world_size, accumulation_steps):
    sizes = [
        micro.num_samples
        for rank in range(world_size)
        for micros in loader(100, 50, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps).steps(
            0, 2
        )
        for micro in micros
    ]
    assert len(sizes) == 2 * world_size * accumulation_steps
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("cut", [1, 3, 5, 7, 10])
def test_a_restart_continues_where_it_stopped(cut):
    whole = global_batches(2, 2, 0, 12)
    assert global_batches(2, 2, 0, cut) + global_batches(2, 2, cut, 12) == whole


def test_no_steps_are_served_between_equal_ends():
    assert list(loader().steps(3, 3)) == []


@pytest.mark.parametrize(("rank", "num_samples"), [(0, 0), (1, 1), (2, 1)])
def test_a_rank_without_images_takes_part_with_a_stand_in_of_no_weight(rank, num_samples):
    *_, (micro,) = loader(rank=rank, world_size=3, accumulation_steps=2).steps(0, 5)
    assert (micro.global_batch_size, micro.num_samples) == (2, num_samples)
    assert len(micro.labels) == 1


def test_every_rank_gets_something_to_run_at_every_step():
    for world_size in (3, 12):
        for rank in range(world_size):
            steps = list(loader(rank=rank, world_size=world_size, accumulation_steps=3).steps(0, 10))
            assert len(steps) == 10
            assert all(1 <= len(micros) <= 3 and all(len(micro.labels) for micro in micros) for micros in steps)


def test_twenty_epochs_come_in_twenty_orders():
    orders = {tuple(loader().order(epoch).tolist()) for epoch in range(20)}
    assert len(orders) == 20


def test_neighbouring_seeds_share_no_order():
    """Where seeds are the sum of run and epoch, run 7 shows in its second epoch what run 8 shows in its first."""
    orders = {tuple(loader(seed=seed).order(epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_does_not_depend_on_the_global_random_state():
    torch.manual_seed(1)
    first = loader().order(0)
    torch.manual_seed(2)
    assert torch.equal(loader().order(0), first)


def test_drawing_an_order_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    loader().order(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_samples", "batch", "steps"), [(50, 12, 5), (48, 12, 4), (1, 1, 1), (50, 50, 1)])
def test_the_last_batch_of_an_epoch_may_be_short_but_is_not_dropped(num_samples, batch, steps):
    assert loader(num_samples, batch).epoch_steps == steps
    sizes = [sum(m.num_samples for m in micros) for micros in loader(num_samples, batch).steps(0, steps)]
    assert sum(sizes) == num_samples


def test_slices_of_a_split_keep_images_and_labels_together():
    split = numbered(10)
    parts = [split[a:b] for a, b in pairwise([0, 3, 10])]
    assert [len(part) for part in parts] == [3, 7]
    assert torch.equal(torch.cat([part.labels for part in parts]), split.labels)
    assert all(torch.equal(part.images[:, 0, 0].long(), part.labels) for part in parts)
