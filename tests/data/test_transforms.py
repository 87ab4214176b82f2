import importlib
import struct
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mnist.config import ImageConfig
from mnist.data.transforms import Augmentation, BatchTransform, uniform
from mnist.seeding import _splitmix64, derive_seed
from mnist.system.torchvision_compat import import_torchvision

CPU = torch.device("cpu")
LIMITS = {"rotation": 30.0, "scale": 0.2, "shear": 20.0, "translation": 0.2}
EVERYTHING = {
    "horizontal_flip": 0.5,
    "rotation": 12.0,
    "translation": 0.12,
    "scale": 0.1,
    "shear": 10.0,
    "elastic": 1.0,
}


@pytest.fixture(scope="module")
def transforms():
    return import_torchvision("transforms")


@pytest.fixture(scope="module")
def affine(transforms):
    functional = importlib.import_module("torchvision.transforms.functional")

    def apply(images, angle, scale, shear, shift):
        return functional.affine(
            images[:, None], angle, list(shift), scale, [shear, 0.0], transforms.InterpolationMode.BILINEAR
        ).squeeze(1)

    return apply


@pytest.fixture(scope="module")
def noise():
    return torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def blobs():
    """Soft blobs of ink, 8 pixels inside the border, each at another place."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    centres = torch.rand(64, 2, generator=torch.Generator().manual_seed(1)) * 6 + 10.5
    distance = (y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2
    return (255 * torch.exp(-distance / 18)).to(torch.uint8)


def augment(images, step=0, seed=0, **changes):
    return Augmentation(ImageConfig(**changes), seed, CPU)(images, step, slice(0, len(images)))


def centre_of_mass(images):
    pixels = torch.arange(28.0)
    mass = images.float().sum(dim=(1, 2))
    return images.float().sum(dim=2) @ pixels / mass, images.float().sum(dim=1) @ pixels / mass


@pytest.mark.parametrize(("mean", "std"), [(0.1307, 0.3081), (0.0, 1.0)])
def test_normalising_a_batch_is_to_tensor_and_normalize(transforms, noise, mean, std):
    reference = transforms.Compose(
        [transforms.ToPILImage(), transforms.ToTensor(), transforms.Normalize((mean,), (std,))]
    )
    expected = torch.stack([reference(image) for image in noise])
    torch.testing.assert_close(
        BatchTransform(ImageConfig(mean=(mean,), std=(std,)))(noise), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("size", [32, 40, 20])
def test_resizing_a_batch_is_resize_within_a_grey_level(transforms, noise, size):
    reference = transforms.Compose([transforms.ToPILImage(), transforms.Resize(size), transforms.ToTensor()])
    expected = torch.stack([reference(image) for image in noise])
    ours = BatchTransform(ImageConfig(mean=(0.0,), std=(1.0,), image_size=size))(noise)
    assert ours.shape == (6, 1, size, size)
    assert (255 * (ours - expected)).abs().max() < 1.5
    assert (255 * (ours - expected)).mean().abs() < 0.1


def test_float_pixels_give_what_uint8_pixels_give(noise):
    transform = BatchTransform(ImageConfig(image_size=32))
    assert torch.equal(transform(noise.float()), transform(noise))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_input_of_a_transform_stays_what_it_is(noise, dtype):
    images = noise.to(dtype)
    BatchTransform(ImageConfig())(images)
    assert torch.equal(images, noise.to(dtype))


@pytest.mark.parametrize(
    "draws",
    [
        {"rotation": 1.0},
        {"rotation": -0.5},
        {"scale": 1.0},
        {"scale": -1.0},
        {"shear": 1.0},
        {"shear": -0.3},
        {"right": 1.0},
        {"down": 1.0},
        {"right": -0.25, "down": 0.6},
        {"rotation": 0.7, "scale": -0.4, "shear": 0.6, "right": 0.5, "down": -0.3},
        {"rotation": -0.9, "scale": 0.8, "shear": -1.0, "right": -0.9, "down": -0.7},
    ],
)
def test_an_affine_map_is_that_of_torchvision(affine, noise, draws):
    """Shear is symmetric about 0, so that its sign, which is the other one in torchvision, means nothing."""
    row = [draws.get(name, 0.0) for name in ("rotation", "scale", "shear", "right", "down")]
    maps = Augmentation(ImageConfig(**LIMITS), 0, CPU)._affine(torch.tensor([row]).expand(6, 5), 1.0)
    grid = F.affine_grid(maps, [6, 1, 28, 28], align_corners=False)
    ours = F.grid_sample(noise.float()[:, None], grid, align_corners=False).squeeze(1)
    expected = affine(
        noise.float(),
        angle=row[0] * LIMITS["rotation"],
        scale=1 + row[1] * LIMITS["scale"],
        shear=-row[2] * LIMITS["shear"],
        shift=(row[3] * 28 * LIMITS["translation"], row[4] * 28 * LIMITS["translation"]),
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.01)


def test_shifts_fill_the_range_evenly_both_ways(blobs):
    images = blobs[:1].expand(1000, 28, 28)
    y, x = centre_of_mass(augment(images, translation=0.1))
    y0, x0 = centre_of_mass(blobs[:1])
    for shift in (y - y0, x - x0):
        assert shift.abs().max() <= 2.85
        assert shift.max() > 2.6
        assert shift.min() < -2.6
        assert shift.mean().abs() < 0.2


def test_zooms_fill_the_range_evenly_both_ways(blobs):
    images = blobs[:1].expand(1000, 28, 28)
    factors = (augment(images, scale=0.2).sum(dim=(1, 2)) / blobs[0].sum()).sqrt()
    assert 0.78 < factors.min() < 0.82
    assert 1.18 < factors.max() < 1.22
    assert (factors.mean() - 1).abs() < 0.02


@pytest.mark.parametrize("changes", [{"rotation": 20.0}, {"shear": 20.0}])
def test_rotation_and_shear_go_both_ways(changes):
    bar = torch.zeros(1, 28, 28, dtype=torch.uint8)
    bar[:, 4:24, 13:15] = 255
    tilted = augment(bar.expand(1000, 28, 28), **changes)
    columns = torch.arange(28.0)
    top = tilted[:, 6:10].sum(dim=1)
    lean = top @ columns / top.sum(dim=1) - 13.5
    assert lean.max() > 1.5
    assert lean.min() < -1.5
    assert lean.mean().abs() < 0.2


def test_half_of_the_images_are_mirrored_exactly(noise):
    images = noise[:1].expand(400, 28, 28)
    result = augment(images, horizontal_flip=0.5)
    is_flipped = (result == images.flip(-1)).all(dim=(1, 2))
    is_same = (result == images).all(dim=(1, 2))
    assert (is_flipped ^ is_same).all()
    assert 150 < is_flipped.sum() < 250


def test_flips_with_certainty_mirror_left_and_right(noise):
    assert torch.equal(augment(noise, horizontal_flip=1.0), noise.flip(-1).float())


def test_elastic_distortion_moves_ink_but_keeps_its_amount(blobs):
    result = augment(blobs, elastic=1.0)
    masses = result.sum(dim=(1, 2)) / blobs.sum(dim=(1, 2))
    assert (result - blobs).abs().amax(dim=(1, 2)).min() > 5
    assert masses.mean() == pytest.approx(1, abs=0.05)
    assert masses.std() < 0.15


def test_elastic_distortion_is_smooth():
    """A ramp of grey shows where each pixel came from: neighbours come from neighbouring places."""
    ramp = torch.arange(28.0).expand(32, 28, 28)
    inner = (slice(None), slice(8, 20), slice(8, 20))
    moved = (augment(ramp, elastic=1.0, elastic_sigma=4.0) - ramp)[inner]
    rough = (augment(ramp, elastic=1.0, elastic_sigma=0.5) - ramp)[inner]
    assert moved.diff(dim=2).abs().mean() < 0.3 * moved.abs().mean()
    assert rough.diff(dim=2).abs().mean() > 0.5 * rough.abs().mean()


def test_a_stronger_distortion_moves_ink_further(blobs):
    weak, strong = (augment(blobs, elastic=strength) - blobs for strength in (0.3, 1.0))
    assert strong.abs().mean() > 2 * weak.abs().mean()


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("changes", [*({name: value} for name, value in EVERYTHING.items()), EVERYTHING])
def test_what_happens_to_an_image_does_not_depend_on_the_number_of_ranks(blobs, changes, world_size):
    augmentation = Augmentation(ImageConfig(**changes), seed=3, device=CPU)
    whole = augmentation(blobs, 7, slice(0, 64))
    cuts = [rank * 64 // world_size for rank in range(world_size + 1)]
    shares = [augmentation(blobs[a:b], 7, slice(a, b)) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(shares), whole)


def test_augmentation_follows_from_seed_and_step_alone(blobs):
    augmentation = Augmentation(ImageConfig(**EVERYTHING), seed=3, device=CPU)
    first = augmentation(blobs, 7, slice(0, 64))
    torch.manual_seed(99)
    assert not torch.equal(augmentation(blobs, 8, slice(0, 64)), first)
    assert torch.equal(augmentation(blobs, 7, slice(0, 64)), first)
    assert not torch.equal(augment(blobs, step=7, seed=4, **EVERYTHING), first)


def test_a_rank_computes_the_random_numbers_of_its_own_rows_only(monkeypatch):
    """The last 4 images of a global batch of 4,096: as many numbers as for the first 4."""
    drawn = []
    monkeypatch.setattr("mnist.data.transforms.uniform", lambda *args: drawn.append(uniform(*args)) or drawn[-1])
    augmentation = Augmentation(ImageConfig(**EVERYTHING), seed=0, device=CPU)
    augmentation(torch.zeros(4, 28, 28, dtype=torch.uint8), 0, slice(4092, 4096))
    assert [draws.shape for draws in drawn] == [(4, 6 + 2 * 28 * 28)]


def test_random_numbers_are_those_of_splitmix64():
    """Integer arithmetic on tensors that wraps around, against Python's integers, which do not."""
    key, mask = derive_seed(3, "augmentation", 7), 2**64 - 1
    for row in (0, 1, 16_383):
        words = [_splitmix64((key + word * 0x9E3779B97F4A7C15) & mask) for word in (2 * row, 2 * row + 1)]
        values = struct.unpack("<8h", struct.pack("<2Q", *words))
        assert uniform(torch.tensor(key), slice(row, row + 1), 6)[0].tolist() == [value / 2**15 for value in values[:6]]


def draws_of(seed=0, step=0, rows=4096, count=6):
    return uniform(torch.tensor(derive_seed(seed, "augmentation", step)), slice(0, rows), count)


@pytest.mark.parametrize("count", [6, 1574])
def test_random_numbers_are_uniform_in_every_column(count):
    """Chi-square of 64 bins: 63 +- 11.2 where all is well. Fixed seeds, so it cannot fail by chance."""
    draws = draws_of(count=count)
    assert draws.min() >= -1
    assert draws.max() < 1
    bins = ((draws + 1) * 32).long()
    counts = torch.zeros(count, 64).scatter_add_(1, bins.T, torch.ones(count, 4096))
    chi_square = ((counts - 64) ** 2 / 64).sum(dim=1)
    assert chi_square.max() < 63 + 6 * 11.2
    assert chi_square.mean() == pytest.approx(63, abs=4 * 11.2 / count**0.5)


def test_random_numbers_of_rows_columns_steps_and_seeds_are_unrelated():
    """Correlations of 24,576 pairs: 0 +- 0.0064 where all is well; with pairs of bins as well, which see more."""
    base = draws_of()
    others = {
        "the next row": base.roll(1, 0),
        "the next but one": base.roll(2, 0),
        "the row 64 further": base.roll(64, 0),
        "the next column": base.roll(1, 1),
        "the next step": draws_of(step=1),
        "a step 157 further": draws_of(step=157),
        "the next seed": draws_of(seed=1),
        "another seed": draws_of(seed=157),
    }
    for name, other in others.items():
        assert torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1].abs() < 0.025, name
        cells = ((base + 1) * 8).long() * 16 + ((other + 1) * 8).long()
        counts = torch.bincount(cells.flatten(), minlength=256).float()
        assert ((counts - 96) ** 2 / 96).sum() < 255 + 6 * 22.6, name


def test_augmentation_leaves_the_global_random_state_alone(blobs):
    state = torch.get_rng_state()
    augment(blobs, **EVERYTHING)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_pixels_keep_shape_and_range(blobs):
    result = augment(blobs, **EVERYTHING)
    assert result.shape == blobs.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 255


def test_nothing_to_do_returns_the_very_input(noise):
    assert augment(noise) is noise


def test_augmentation_leaves_its_input_alone(noise):
    images = noise.clone()
    augment(images, **EVERYTHING)
    assert torch.equal(images, noise)


def as_colours(images):
    """(N, H, W) -> (N, 3, H, W): the image, its negative, and half of it."""
    return torch.stack([images, 255 - images, images // 2], dim=1)


@pytest.mark.parametrize("size", [28, 32])
def test_every_channel_is_transformed_as_an_image_of_its_own(blobs, size):
    transform = BatchTransform(ImageConfig(image_size=size))
    colours = as_colours(blobs)
    result = transform(colours)
    assert result.shape == (64, 3, size, size)
    for channel in range(3):
        assert torch.equal(result[:, channel : channel + 1], transform(colours[:, channel]))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (40, 48), (48, 40)])
def test_all_channels_of_an_image_move_together(height, width):
    generator = torch.Generator().manual_seed(0)
    colours = as_colours(torch.randint(0, 256, (5, height, width), dtype=torch.uint8, generator=generator))
    result = augment(colours, **EVERYTHING)
    assert result.shape == (5, 3, height, width)
    for channel in (0, 2):
        assert torch.equal(result[:, channel], augment(colours[:, channel], **EVERYTHING))


def test_a_rotation_keeps_lengths_on_a_wide_image():
    """A quarter turn of a bar in the middle of 40x80 pixels: as long as before, not stretched to the page."""
    image = torch.zeros(1, 40, 80, dtype=torch.uint8)
    image[:, 19:21, 30:50] = 255
    augmentation = Augmentation(ImageConfig(rotation=90.0), seed=0, device=CPU)
    maps = augmentation._affine(torch.tensor([[1.0, 0, 0, 0, 0]]), 40 / 80)
    grid = F.affine_grid(maps, [1, 1, 40, 80], align_corners=False)
    turned = F.grid_sample(image[:, None].float(), grid, align_corners=False)[0, 0]
    rows, columns = (turned.amax(dim=axis) > 127 for axis in (1, 0))
    assert (int(rows.sum()), int(columns.sum())) == (20, 2)


def test_each_channel_has_its_own_mean_and_std():
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(BatchTransform(ImageConfig(mean=mean, std=std))(images), expected)
