"""Fetch a published data set, or look at any.

    python data.py --get cifar10                # puts the published files into data/cifar10
    python data.py --show cifar10 --split test  # writes a grid of images, runs/cifar10-test.png
"""

if __name__ == "__main__":   # Ctrl-C while packages load
    import runtime.quiet  # noqa: F401

from pathlib import Path

import datasets
from datasets import download
from runtime.cli import Parser, one_line_errors
from runtime.outputs import check_outputs, check_suffix
from runtime.pictures import Panel, rows_by_class, save_grid


def show(source: str, split: str, data_dir: str, image_size: int, channels: int,
         columns: int = 10) -> Panel:
    """A panel for `save_grid`: images of up to ten classes or, with captions, ten images."""
    dataset = datasets.load(source, split, data_dir, image_size, channels, is_public=True)
    title = f"{Path(source).stem}, {split}: {len(dataset.images):,} images"
    if dataset.captions is None:
        return title, *rows_by_class(dataset, columns)
    return title, dataset.images[:10, None], dataset.captions[:10]


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says. ValueError or OSError for bad input."""
    parser = Parser(f"{__doc__}\n{datasets.__doc__}")
    parser.add_argument("--get", metavar="NAME", help="download the files of a published data set "
                        "into DATA_DIR/NAME")
    parser.add_argument("--show", metavar="SOURCE", help="write a PNG of images by class")
    parser.add_argument("--split", default="train", help="train (default) or test")
    parser.add_argument("--data-dir", default="data",
                        help="folder of the named data sets' folders (default data)")
    parser.add_argument("--image-size", type=int, default=32,
                        help="images are this high and wide (default 32)")
    parser.add_argument("--channels", type=int, help="1 for grey, 3 for colour (default: as a "
                        "named set has it, or 3)")
    parser.add_argument("--out", type=Path,
                        help="the PNG of --show (default runs/SOURCE-SPLIT.png)")
    args = parser.parse_args(argv)
    if not args.get and not args.show:
        raise ValueError("nothing to do: give --get NAME or --show SOURCE")
    if args.show:
        name = f"{Path(args.show).stem.replace(':', '-')}-{args.split}.png"
        out = args.out or Path("runs") / name
        check_suffix(out, ".png")
        check_outputs([out], [args.show])
    if args.get:
        print(f"{args.get} is in {download.get(args.get, args.data_dir)}")
    if args.show:
        channels = args.channels or (1 if args.show in datasets.GREY_28 else 3)
        save_grid(out, [show(args.show, args.split, args.data_dir, args.image_size, channels)])
        print(f"wrote {out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
