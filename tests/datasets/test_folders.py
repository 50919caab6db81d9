"""Pictures in folders and zips: classes, captions, CelebA; damaged pictures are refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from small_files import encoded, metadata, peak_memory, plain, write, zipped

from datasets import Dataset, load

FLAT = {"dog/b.png": plain(40), "cat/a.png": plain(10), "dog/a.png": plain(30),
        "ant/x.bmp": plain(5, kind="BMP")}


def grey_levels(dataset: Dataset) -> list[int]:
    assert (dataset.images == dataset.images[:, :1, :1]).all()   # every image has one colour
    return dataset.images[:, 0, 0, 0].tolist()


# ---- classes -----------------------------------------------------------------------------------

def test_classes_are_sorted_sub_folders(tree):
    others = {"readme.txt": b"no image", "dog/notes.txt": b"", "dog/._a.png": b"made by a Mac"}
    dataset = load(tree({**FLAT, **others}), "train", image_size=8)
    assert dataset.classes == ["ant", "cat", "dog"]
    assert dataset.labels.tolist() == [0, 1, 2, 2]
    assert dataset.images.shape == (4, 8, 8, 1) and dataset.images.dtype == np.uint8
    assert grey_levels(dataset) == [5, 10, 30, 40]   # the right image for each label


@pytest.mark.parametrize("top", ["", "cifar10/", "some/where/"])
def test_train_and_test_folders(tree, top):
    source = tree({f"{top}train/dog/0.png": plain(1), f"{top}train/cat/0.png": plain(2),
                   f"{top}train/cat/1.png": plain(3), f"{top}test/cat/0.png": plain(4)})
    train, test = (load(source, split, image_size=8) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]   # though no dog is in test
    assert (grey_levels(train), train.labels.tolist()) == ([2, 3, 1], [0, 0, 1])
    assert (grey_levels(test), test.labels.tolist()) == ([4], [0])


@pytest.mark.parametrize("top", ["", "train/"])
def test_training_images_are_never_used_for_testing(tree, top):
    source = tree({f"{top}{name}": content for name, content in FLAT.items()})
    assert len(load(source, "train", image_size=8).images) == len(FLAT)
    with pytest.raises(ValueError, match="no images for test; it holds 4 train images"):
        load(source, "test")


def test_colour_and_grey(tree):
    source = tree({"a/colour.png": plain((200, 100, 50)), "a/grey.png": plain(70)})
    colour = load(source, "train", image_size=8, channels=3).images
    assert colour.shape == (2, 8, 8, 3)
    assert colour[:, 0, 0].tolist() == [[200, 100, 50], [70, 70, 70]]
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50   # ITU-R 601, as PIL documents
    assert grey_levels(load(source, "train", image_size=8)) == [round(luma), 70]


def test_other_sizes_are_resized(tree):
    source = tree({"a/0.png": plain(9, (31, 17)), "a/1.jpg": plain(90, (64, 64), "JPEG"),
                   "a/2.png": plain(200)})
    images = load(source, "train", image_size=16).images
    assert images.shape == (3, 16, 16, 1)
    assert np.allclose(images.mean(axis=(1, 2, 3)), [9, 90, 200], atol=1)


def test_pictures_stand_as_their_camera_was_held(tree):
    exif = Image.Exif()
    exif[0x0112] = 6   # orientation: to be turned by 90 degrees clockwise
    picture = np.zeros((32, 32), np.uint8)
    picture[:16, :16] = 255
    files = {"a/as_is.png": encoded(picture), "a/turned.jpg": encoded(picture, "JPEG", exif=exif)}
    as_is, turned = load(tree(files), "train", image_size=16).images[..., 0]
    assert as_is[:7, :7].min() > 200 and as_is[:, 9:].max() < 50
    assert turned[:7, 9:].min() > 200 and turned[:, :7].max() < 50


def test_pictures_in_memory_take_a_byte_per_value(tmp_path):
    write({f"a/{k}.png": plain((k, 0, 0), (64, 64)) for k in range(200)}, tmp_path)
    peak = peak_memory(lambda: load(str(tmp_path), "train", image_size=64, channels=3))
    assert peak < 1.5 * 200 * 64 * 64 * 3


def bomb() -> bytes:
    """A PNG that claims to be 60,000 pixels high and wide."""
    content = bytearray(plain(3))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


REFUSED = {
    "an empty picture": ({**FLAT, "cat/broken.jpg": b""}, "cat/broken.jpg"),
    "text": ({**FLAT, "cat/broken.jpg": b"no image"}, "broken.jpg .*Pillow .* cannot tell its"),
    "half a picture": ({**FLAT, "cat/broken.jpg": plain(3, (64, 64), "JPEG")[:-100]},
                       "cat/broken.jpg"),
    "a bomb": ({**FLAT, "cat/broken.png": bomb()}, "cat/broken.png"),
    "fractions": ({**FLAT, "dog/deep.tif": encoded(np.ones((8, 8), np.float32), "TIFF")},
                  "deep.tif .*more than 16 bits, or fractions"),
    "32 bits": ({**FLAT, "dog/deep.tif": encoded(np.ones((8, 8), np.int32), "TIFF")},
                "deep.tif .*more than 16 bits, or fractions"),
    "no image": ({"a/readme.txt": b"text"}, "no images for train; it holds 1 .txt, 1 folder"),
    "a split below classes": ({**FLAT, "cat/test/0.png": plain(1)},
                              "images(.zip)?: cat/test/0.png: test/ must stand above"),
    "metadata in no split": ({"train/0.png": plain(1), "1.png": plain(1), "metadata.jsonl":
                              metadata({"file_name": "train/0.png"}, {"file_name": "1.png"})},
                             "images(.zip)?: 1.png lies in neither"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_folders_and_pictures_are_refused(tree, case):
    files, complaint = REFUSED[case]
    with pytest.raises(ValueError, match=complaint):
        load(tree(files), "train", image_size=8)


# ---- what an image looks like ------------------------------------------------------------------

def drawing(mode: str) -> bytes:
    """Black ink on the upper half; the lower half is transparent, and black underneath."""
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 8, 4))
    if mode == "P":
        picture = picture.quantize(4)
    file = io.BytesIO()
    picture.convert(mode).save(file, "PNG")
    return file.getvalue()


def transparent_colour(mode: str) -> bytes:
    """A PNG of black and grey whose grey is said to be transparent (tRNS)."""
    picture, file = Image.new(mode, (8, 8), "black"), io.BytesIO()
    picture.paste("grey", (0, 4, 8, 8))
    picture.save(file, "PNG", transparency=128 if mode == "L" else (128, 128, 128))
    return file.getvalue()


@pytest.mark.parametrize("content", [*map(drawing, ("RGBA", "LA", "P")),
                                     *map(transparent_colour, ("L", "RGB"))])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_lie_on_white(tree, content, channels):
    image = load(tree({"a/0.png": content}), "train", image_size=8, channels=channels).images[0]
    assert image[:4].max() == 0 and image[4:].min() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled(tree, kind, capsys):
    values = np.array([[0, 257, 40_000, 65_535]] * 4, np.uint16)
    found = load(tree({"a/0.png": encoded(values, kind)}), "train", image_size=4).images[0, 0, :, 0]
    assert np.abs(found - np.array([0, 1, 40_000 / 257, 255])).max() <= 0.5
    assert "grey of 16 bits, 0 to 65535, becomes 0 to 255" in capsys.readouterr().out


def test_grey_of_16_bits_may_be_inverted_or_transparent(tree):
    values, file = np.array([[0, 257, 65_535]] * 3, np.uint16), io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", tiffinfo={262: 0})   # 0 is white
    inverted = file.getvalue()
    chunk = b"tRNS" + struct.pack(">H", 257)   # behind the header: this grey is transparent
    content = encoded(values, "PNG")
    transparent = (content[:33] + struct.pack(">I", 2) + chunk
                   + struct.pack(">I", zlib.crc32(chunk)) + content[33:])
    source = tree({"a/0.tif": inverted, "a/1.png": transparent})
    images = load(source, "train", image_size=3).images[:, 0, :, 0]
    assert images.tolist() == [[255, 254, 0], [0, 255, 255]]


def test_all_formats_stand_upright(tree):
    exif, picture = Image.Exif(), np.zeros((32, 32), np.uint8)
    exif[0x0112], picture[:16] = 6, 255
    kinds = {"jpg": "JPEG", "tif": "TIFF", "png": "PNG", "webp": "WEBP"}
    files = {f"a/0.{ending}": encoded(picture, kind, exif=exif) for ending, kind in kinds.items()}
    for image in load(tree(files), "train", image_size=32).images[..., 0]:
        assert image[:, 18:].min() > 200 and image[:, :14].max() < 50


def test_damaged_pictures_of_many_frames_are_refused_by_name(tmp_path):
    frames, file = [Image.new("L", (8, 8), 50 * k) for k in range(4)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    content = file.getvalue()
    for size in range(20, len(content) - 20, 7):
        write({"a/0.gif": content[:size], "a/1.png": plain(1)}, tmp_path)
        try:
            load(str(tmp_path), "train", image_size=8)
        except ValueError as error:
            assert "a/0.gif" in str(error)


def with_exif(orientation: int, damage: str) -> bytes:
    """A JPEG whose upper half is white, with an EXIF that holds a tag of an odd type, or is cut."""
    tags = (b"II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIf", 0x10F, 11, 1, 1.5)
            + struct.pack("<HHIHHI", 0x112, 3, 1, orientation, 0, 0))
    picture = np.zeros((32, 32), np.uint8)
    picture[:16] = 255
    content = tags if damage == "odd type" else tags[:damage == "cut" and 9]
    return encoded(picture, "JPEG", exif=b"Exif\0\0" + content)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damage, right_half", [("odd type", True), ("cut", False),
                                                ("none", False)])
def test_odd_exif_spoils_no_image(tree, damage, right_half):
    source = tree({"a/0.jpg": with_exif(6, damage)})   # 6: to be turned clockwise
    image = load(source, "train", image_size=32).images[0, ..., 0]
    white = image[:, 18:] if right_half else image[:14]
    assert white.min() > 200 and image.mean() < 140


def test_further_frames_are_left_out(tree):
    frames, file = [Image.new("L", (8, 8), 50 * k) for k in range(4)], io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    dataset = load(tree({"a/0.tif": file.getvalue(), "a/1.png": plain(9)}), "train", image_size=8)
    assert grey_levels(dataset) == [0, 9] and dataset.left_out == {"further frame{s}": 3}


# ---- captions ----------------------------------------------------------------------------------

def test_captions_come_with_their_images(tree):
    text = "one\u2028two\x85 \"three\"\n, très calme"   # a caption may hold any character
    source = tree({"b.png": plain(20), "sub/a.png": plain(10), "unnamed.png": plain(99),
                   "metadata.jsonl": metadata({"file_name": "b.png", "text": text},
                                              {"file_name": "sub/a.png", "text": "night"}) + b"\n"})
    dataset = load(source, "train", image_size=8)
    assert grey_levels(dataset) == [20, 10] and dataset.captions == [text, "night"]
    assert dataset.labels.tolist() == [0, 0] and dataset.classes == ["image"]
    assert dataset.left_out == {"image{s} that metadata.jsonl does not name": 1}
    with pytest.raises(ValueError, match="no images for test; it holds 2 train images"):
        load(source, "test", image_size=8)


@pytest.mark.parametrize("where", ["one file above", "a file in each"])
def test_captions_of_train_and_test(tree, where):
    names = ["train/0.png", "train/1.png", "test/0.png"]
    pictures = {name: plain(10 * k) for k, name in enumerate(names)}
    texts = {name: f"of {name}" for name in names}
    if where == "one file above":
        files = {"metadata.jsonl": metadata(*({"file_name": name, "text": text}
                                              for name, text in texts.items()))}
    else:
        files = {f"{split}/metadata.jsonl": metadata(*(
            {"file_name": name.split("/")[1], "text": text}
            for name, text in texts.items() if split in name)) for split in ("train", "test")}
    source = tree({**pictures, **files})
    train, test = (load(source, split, image_size=8) for split in ("train", "test"))
    assert train.captions == ["of train/0.png", "of train/1.png"]
    assert test.captions == ["of test/0.png"]
    assert grey_levels(train) == [0, 10] and grey_levels(test) == [20]


@pytest.mark.parametrize("labels, classes", [(["cat", "ant"], ["ant", "cat"]),
                                             ([2, 1], ["1", "2"])])
@pytest.mark.parametrize("text", [{"text": "x"}, {}])
def test_labels_with_and_without_captions(tree, labels, classes, text):
    entries = [{"file_name": f"{k}.png", "label": label, **text} for k, label in enumerate(labels)]
    files = {"0.png": plain(1), "1.png": plain(2), "metadata.jsonl": metadata(*entries)}
    dataset = load(tree(files), "train", image_size=8)
    assert dataset.classes == classes and dataset.labels.tolist() == [1, 0]
    assert dataset.captions == (["x", "x"] if text else None)


@pytest.mark.parametrize("line, complaint", [
    (b"not json", "line 2 of .*metadata.jsonl"),
    (b"[1]", "line 2 of"),
    (b"[" * 100_000, "line 2 of .*recursion"),
    (b'{"file_name": "\\u0000.png", "text": "x"}', "cannot read \0.png"),
    (b'{"text": "x"}', "line 2 of"),
    (b'{"file_name": 3}', "line 2 of"),
    (b'{"image": "0.png"}', "line 2 of .* no file_name"),
    (b'{"file_name": "1.png", "text": "half \\ud83d"}', "line 2 of .*surrogate"),
    (b'{"file_name": "0.png", "text": 4}', "line 2 of"),
    (b'{"file_name": "0.png", "text": "x", "label": -1}', "line 2 of"),
    (b"\xff\xfe", "cannot read metadata.jsonl"),
    (b'{"file_name": "1.png"}', "some lines have a text and some have none"),
    (b'{"file_name": "1.png", "text": "x", "label": 1}', "some lines have a label and some have"),
    (b'{"file_name": "../0.png", "text": "x"}', "line 2 of .*../0.png is outside its folder"),
    (b'{"file_name": "a/../../0.png", "text": "x"}', "line 2 of .*is outside its folder"),
    (b'{"file_name": "/0.png", "text": "x"}', "line 2 of .*/0.png is outside its folder"),
    (b'{"file_name": "1.png", "text": "x"}', "cannot read 1.png .*: there is none"),
])
def test_damaged_metadata_is_refused_by_line(tree, line, complaint):
    first = metadata({"file_name": "0.png", "text": "x"})
    with pytest.raises(ValueError, match=complaint):
        load(tree({"0.png": plain(1), "metadata.jsonl": first + line}), "train", image_size=8)


def labelled(*labels: object) -> dict[str, bytes]:
    """Images 0.png, 1.png, ... with these labels."""
    entries = [{"file_name": f"{k}.png", "label": label} for k, label in enumerate(labels)]
    return {**{f"{k}.png": plain(k) for k in range(len(labels))},
            "metadata.jsonl": metadata(*entries)}


def test_labels_with_gaps_are_refused(tree):
    with pytest.raises(ValueError, match="3 numbers from 0 to 255: count from 0 or 1"):
        load(tree(labelled(0, 1, 0, 255)), "train", image_size=8)


def test_one_accent_in_two_spellings_is_one_label(tree):
    dataset = load(tree(labelled("caf\u00e9", "cafe\u0301", "bar")), "train", image_size=8)
    assert dataset.classes == ["bar", "caf\u00e9"] and dataset.labels.tolist() == [1, 1, 0]


def test_keys_that_are_not_used_are_counted(tree):
    lines = metadata({"file_name": "0.png", "caption": "a cat"},
                     {"file_name": "1.png", "caption": "a dog", "class": 3})
    source = tree({"0.png": plain(1), "1.png": plain(2), "metadata.jsonl": lines})
    assert load(source, "train", image_size=8).left_out == {
        "'caption' of metadata.jsonl": 2, "'class' of metadata.jsonl": 1}


@pytest.mark.parametrize("spelling", ["0.png", "./0.png", "a/../0.png"])
def test_an_image_named_twice_is_refused_by_lines(tree, spelling):
    lines = metadata(*({"file_name": name} for name in ("1.png", "0.png", spelling)))
    files = {"0.png": plain(1), "1.png": plain(2), "a/0.png": plain(3), "metadata.jsonl": lines}
    with pytest.raises(ValueError, match="line 3 of .* names 0.png, as line 2 of .* does"):
        load(tree(files), "train", image_size=8)


def test_an_image_named_in_two_files_is_refused(tree):
    files = {"a/0.png": plain(1), "metadata.jsonl": metadata({"file_name": "a/0.png"}),
             "a/metadata.jsonl": metadata({"file_name": "0.png"})}
    with pytest.raises(ValueError, match="names a/0.png, as line 1 of .*a/metadata.jsonl does"):
        load(tree(files), "train", image_size=8)


def test_damaged_captions_in_a_zip_are_named(tmp_path):
    content = zipped({"0.png": plain(1),
                      "metadata.jsonl": metadata({"file_name": "0.png", "text": "a sofa"})})
    (tmp_path / "images.zip").write_bytes(content.replace(b"sofa", b"soda"))
    with pytest.raises(ValueError, match="cannot read metadata.jsonl of .*images.zip"):
        load(str(tmp_path / "images.zip"), "train", image_size=8)
