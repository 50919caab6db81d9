"""Rendered scenes: what captions say is drawn; what is private is not public; the presets run; memory at 256x256.

Dead leaves: their statistics are those of photographs, and classes name form and colour.
"""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from test_cli import TINY

import data
import scenes
import train
from config import PRESETS, Config, count
from ldm import LatentDiffusion, load_checkpoint

PAINTS = {name: np.array(rgb) for kind in scenes.KINDS.values() for name, rgb in kind.colours.items()}


@pytest.fixture(scope="module", autouse=True)
def few_scenes(tmp_path_factory):
    """28 pictures of each source and split, in a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(data, "COUNTS", {source: {"train": 28, "test": 28} for source in [*scenes.KINDS, "leaves"]})
        yield


@pytest.fixture(scope="module", params=scenes.KINDS)
def rendered(request):
    """(source, its kind, 84 pictures with their captions)."""
    kind = scenes.KINDS[request.param]
    images, *numbers = scenes.render(kind, 84, seed=5)
    captions = [kind.caption(*each) for each in zip(*numbers, strict=True)]
    return request.param, kind, data.Dataset(images, numbers[0], kind.classes, captions)


def painted(image: np.ndarray) -> np.ndarray:
    """Where the object is, bool [256, 256]: backgrounds have hardly any colour."""
    return np.ptp(image.astype(int), axis=-1) > 100


def outlines(mask: np.ndarray, angles: tuple = (0,)) -> np.ndarray:
    """A silhouette cut out, turned by each angle (degrees), at 24x24."""
    pictures = [Image.fromarray(mask.astype(np.uint8) * 255).rotate(angle) for angle in angles]
    return np.stack([np.asarray(p.crop(p.getbbox()).resize((24, 24))) > 127 for p in pictures])


def texture_seen(image: np.ndarray) -> str:
    """The background's texture, judged by its pixels alone."""
    grey, ground = image.mean(-1), ~ndimage.binary_dilation(painted(image), iterations=6)
    low, high = np.percentile(grey[ground], [2, 98])
    level = (grey - low) / (high - low)
    dy, dx = (g[ground] for g in np.gradient(ndimage.gaussian_filter(level, 1)))
    small, large = np.linalg.eigvalsh(np.cov(dy, dx))
    if small < 0.1 * large:   # it changes in one direction only
        return "striped"
    if np.mean((level[ground] > 0.2) & (level[ground] < 0.8)) > 0.45:
        return "cloudy"
    return "dotted" if level[ground].mean() < 0.35 else "checked"


def test_a_process_that_may_not_write_has_its_scenes_all_the_same(tmp_path, monkeypatch):
    """The second one of torchrun, while the first one is still rendering: nothing is in the cache."""
    expected = data.load("scenes", "test", image_size=256, channels=3)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    found = data.load("scenes", "test", image_size=256, channels=3)
    assert np.array_equal(found.images, expected.images) and found.captions == expected.captions
    assert not list(tmp_path.iterdir())


# ---- the pictures ----------------------------------------------------------------------------------

def test_scenes_follow_the_seed(rendered):
    source, kind, dataset = rendered
    again, other = (scenes.render(kind, 84, seed)[0] for seed in (5, 6))
    assert dataset.images.shape == (84, 256, 256, 3) and dataset.images.dtype == np.uint8
    assert np.array_equal(again, dataset.images) and not np.array_equal(other, dataset.images)
    assert np.bincount(dataset.labels).tolist() == [6] * len(kind.classes)


def test_captions_name_the_colour_that_is_painted(rendered):
    for image, caption in zip(rendered[2].images, rendered[2].captions, strict=True):
        colour = image[ndimage.binary_erosion(painted(image), iterations=2)].mean(0) / 255
        assert min(PAINTS, key=lambda name: np.abs(PAINTS[name] - colour).sum()) == caption.split()[1], caption


def test_captions_name_the_texture_that_is_painted(rendered):
    for image, caption in zip(rendered[2].images, rendered[2].captions, strict=True):
        assert texture_seen(image) == caption.split()[-2], caption


def test_classes_and_captions_name_the_object_that_is_painted(rendered):
    _, kind, dataset = rendered
    angles = (-10, -5, 0, 5, 10)
    templates = np.stack([outlines(scenes.distance_map(thing) > -3, angles) for thing in kind.classes])
    right = []
    for image, label, caption in zip(dataset.images, dataset.labels, dataset.captions, strict=True):
        thing = caption.split(" on ")[0].split()[2:]
        assert thing == ([kind.word] if len(kind.classes[label]) == 1 else []) + [kind.classes[label]]
        same = (templates == outlines(painted(image))[0]).mean((2, 3)).max(1)   # [classes]
        right.append(same.argmax() == label)
    assert np.mean(right) > 0.9


def test_articles():
    kind = scenes.KINDS["scenes-private"]
    assert kind.caption(4, 0, 0) == "an orange digit 0 on a striped background"
    assert kind.caption(1, 3, 1) == "a pink heart on a checked background"


def test_nothing_private_is_public():
    public, private = (data.load(source, "train", image_size=256, channels=3) for source in scenes.KINDS)
    assert not set(public.classes) & set(private.classes)
    assert not set(public.captions) & set(private.captions)
    one, other = (set(kind.colours) for kind in scenes.KINDS.values())
    assert not one & other
    alike = data.starting_classes(private.classes, public.classes)
    assert [public.classes[k] for k in alike] == ["circle", "triangle", "square", "diamond", *"OlZBASbTBq"]


def test_no_two_splits_are_drawn_from_one_seed(monkeypatch, tmp_path):
    seeds, render = [], scenes.render
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(scenes, "render", lambda kind, count, seed: seeds.append(seed) or render(kind, 1, seed))
    for source in scenes.KINDS:
        for split in ("train", "test"):
            data.load(source, split, image_size=256, channels=3)
    assert len(set(seeds)) == 4


def test_scenes_come_from_the_cache_the_second_time(monkeypatch):
    first = data.load("scenes", "test", image_size=256, channels=3)
    monkeypatch.delattr(scenes, "render")
    second = data.load("scenes", "test", image_size=256, channels=3)
    assert np.array_equal(first.images, second.images) and first.captions == second.captions
    assert data.load("scenes", "test", image_size=64, channels=1).images.shape == (28, 64, 64, 1)


# ---- dead leaves -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def leaves():
    return scenes.render_leaves(480, seed=5)


def test_leaves_follow_the_seed_and_no_two_are_alike(leaves):
    images, labels = leaves
    assert images.shape == (480, 32, 32, 3) and images.dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip(leaves, scenes.render_leaves(480, 5), strict=True))
    bank = scenes.clouds(256, np.random.default_rng(5))
    for i in (0, 7, 479):   # any picture by itself
        alone, other = (scenes.picture_of_leaves(labels[i], bank, np.random.default_rng((seed, i))) for seed in (5, 6))
        assert np.array_equal(alone, images[i]) and not np.array_equal(other, images[i])
    assert np.bincount(labels).tolist() == [30] * len(scenes.LEAVES)
    flat = images.reshape(480, -1).astype(float)
    distances = np.sqrt(np.square(flat).sum(1)[:, None] + np.square(flat).sum(1) - 2 * flat @ flat.T)
    assert (distances + 1e9 * np.eye(480)).min() > 0.02 * 255 * np.sqrt(3072)


def test_leaves_use_the_whole_range_of_brightness_and_all_hues(leaves):
    images, _ = leaves
    means = images.mean((1, 2)) / 255
    dark, bright = np.percentile(images, [1, 99], axis=(0, 1, 2))
    assert (dark < 30).all() and (bright > 225).all()
    assert (np.abs(means.mean(0) - 0.45) < 0.1).all() and (means.std(0) > 0.12).all()
    assert set(means.argmax(1)) == set(means.argmin(1)) == {0, 1, 2}


def test_leaves_have_the_statistics_of_photographs(leaves):
    """A power spectrum that falls like f^-2 to f^-3.5, and differences of neighbours with far heavier tails than
    Gaussian ones, whose kurtosis is 3 (Ruderman 1994)."""
    grey = leaves[0].mean(-1)
    grey -= grey.mean((1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(grey * np.outer(np.hanning(32), np.hanning(32))))**2).mean(0)
    f = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32))
    band = (f > 0.08) & (f < 0.4)
    assert -3.5 < np.polyfit(np.log(f[band]), np.log(power[band]), 1)[0] < -2
    steps = np.diff(grey, axis=2)
    assert (steps**4).mean() / (steps**2).mean()**2 > 8


def test_the_class_of_leaves_names_the_hue_of_the_ground_and_the_shape(leaves):
    images, labels = leaves
    warm = labels < len(scenes.SHAPES)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1).astype(float).mean(1)
    assert scenes.LEAVES[0] == "circle on warm" and scenes.LEAVES[-1] == "star on cold"
    assert np.mean((border[:, 0] > border[:, 2]) == warm) > 0.8    # redder than blue
    contrast = np.abs(images - border[:, None, None]).mean(-1)     # the object's, on the average of a class
    full, thin = (contrast[np.isin(labels % 8, [scenes.SHAPES.index(s) for s in shapes])].mean(0)
                  for shapes in (("circle", "square", "hexagon"), ("diamond", "star", "cross")))
    assert (full[8:24, 8:24].mean() / full[:3].mean()) > (thin[8:24, 8:24].mean() / thin[:3].mean())


def test_leaves_are_loaded_from_the_cache_at_any_size(monkeypatch):
    first = data.load("leaves", "train", channels=3)
    assert first.images.shape == (28, 32, 32, 3) and first.classes == scenes.LEAVES
    assert not np.array_equal(data.load("leaves", "test", channels=3).images, first.images)
    monkeypatch.delattr(scenes, "render_leaves")
    assert np.array_equal(data.load("leaves", "train", channels=3).images, first.images)
    assert data.load("leaves", "test", image_size=64, channels=1).images.shape == (28, 64, 64, 1)


# ---- the autoencoder on squares of the images ------------------------------------------------------

class Watched(torch.nn.Module):
    """Keeps what train_autoencoder shows it."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), []

    def loss(self, x, kl_weight):
        self.seen.append(x)
        return (self.weight * x).mean()


def test_the_autoencoder_sees_random_squares_of_the_images():
    y, x = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    images = np.stack([np.stack([0 * x + k, y, x], -1) for k in range(5)]).astype(np.uint8)   # number, row, column
    vae = Watched()
    torch.manual_seed(0)
    train.train_autoencoder(vae, images, Config(vae_crop=8, image_size=16, vae_steps=150, vae_batch=3, device="cpu"))
    places, batches = set(), []
    for seen in vae.seen:
        k, y, x = ((seen + 1) * 127.5).round().int().unbind(1)
        assert seen.shape == (3, 3, 8, 8) and (k == k[:, :1, :1]).all()
        assert (y == y[:, :1, :1] + torch.arange(8)[:, None]).all() and (x == x[:, :1, :1] + torch.arange(8)).all()
        batches.append(set(zip(y[:, 0, 0].tolist(), x[:, 0, 0].tolist(), strict=True)))
        places |= batches[-1]
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))   # to the edges, rows apart from columns
    assert len(places) > 75 and max(map(len, batches)) == 3   # each image its own


def test_without_squares_the_seed_gives_the_batches_it_always_gave():
    images, vae = np.random.default_rng(0).integers(256, size=(50, 8, 8, 1), dtype=np.uint8), Watched()
    torch.manual_seed(0)
    train.train_autoencoder(vae, images, Config(image_size=8, vae_steps=3, vae_batch=4, device="cpu"))
    torch.manual_seed(0)
    for seen in vae.seen:
        expected = train.to_pixels(images[torch.randint(50, (4,)).numpy()], torch.device("cpu"))
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)


@pytest.mark.parametrize("crop", [12, 264])
def test_squares_that_cannot_be_are_refused(crop):
    with pytest.raises(ValueError, match=f"--vae-crop must be a multiple of 8.*at most --image-size, not {crop}"):
        Config(**{**PRESETS["scenes256"], "vae_crop": crop}).check()


# ---- the presets -----------------------------------------------------------------------------------

def test_the_preset_runs_end_to_end_scaled_down(tmp_path):
    small = TINY[TINY.index("--vae-steps"):]   # the autoencoder's shape and the latents are the preset's
    train.main(["--preset", "scenes256", "--stage", "private", "--out", str(tmp_path), "--image-size", "32", "--bf16",
                "--vae-crop", "16", *small])
    model, facts = load_checkpoint(tmp_path / "private-eps10.pt")
    assert facts["classes"] == scenes.KINDS["scenes-private"].classes
    assert model.architecture["vae"]["ch_mult"] == list(PRESETS["scenes256"]["vae_mult"])
    assert facts["ledger"][0]["num_examples"] == 28
    with Image.open(tmp_path / "private-eps10.png") as picture:
        assert picture.width > 10 * 32


def test_cifar10_small_goes_from_leaves_to_a_zip_of_photographs(tmp_path):
    """The model is the preset's, of the size that the preset is for; only the steps are few."""
    private, classes = tmp_path / "private.zip", ["airplane", "cat", "truck"]
    with zipfile.ZipFile(private, "w") as archive:
        for k in range(12):
            picture = Image.fromarray(np.full((32, 32, 3), (20 * k, 90, 200), np.uint8))
            picture.save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"mine/train/{classes[k % 3]}/{k}.png")
    train.main(["--preset", "cifar10-small", "--private-data", str(private), "--out", str(tmp_path), "--vae-steps", "2",
                "--public-steps", "2", "--public-batch", "4", "--expected-batch", "4", "--epochs", "0.7",
                "--sample-steps", "2", "--device", "cpu"])
    model, facts = load_checkpoint(tmp_path / "private-eps10.pt")
    assert facts["classes"] == classes and facts["public_config"]["public_data"] == "leaves"
    assert facts["ledger"][0]["num_examples"] == 12
    assert 2e6 < count(model.unet.parameters()) < 4e6
    assert model.vae.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 2 * 8, 8, 8)


# ---- memory ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, together", [(32, 250), (64, 62), (256, 3)])
def test_images_are_encoded_and_decoded_few_at_a_time_where_they_are_large(monkeypatch, size, together):
    torch.manual_seed(0)
    vae = dict(ch=4, ch_mult=[1, 1, 1, 1], num_res_blocks=1, attn_resolutions=[], in_channels=1, resolution=size,
               z_channels=4, embed_dim=4)
    unet = dict(in_channels=4, out_channels=4, model_channels=8, num_res_blocks=1, attention_resolutions=[],
                channel_mult=[1], num_heads=1, context_dim=4)
    model = LatentDiffusion(dict(vae=vae, unet=unet, num_classes=2, linear_start=0.0015, linear_end=0.0195)).eval()
    images = np.random.default_rng(0).integers(256, size=(together + 2, size, size, 1), dtype=np.uint8)
    with torch.no_grad():
        whole = model.encode(train.to_pixels(images, torch.device("cpu")))
    sizes = []
    for module in (model.vae.encoder, model.vae.decoder):
        module.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    parts = train.encode_all(model, images, torch.device("cpu"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert sizes == [together, 2]
    assert model.generate(torch.zeros(together + 2, dtype=torch.long), 1).shape == images.shape
    assert sizes == [together, 2] * 2
