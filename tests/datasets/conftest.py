"""Rendered sets of few images, and folders and zips of pictures."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_files import write, zipped

from datasets import rendered
from runtime.distributed import log_once


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """Every test hears what is said once."""
    log_once.cache_clear()


@pytest.fixture
def small_cache(tmp_path: Path) -> Iterator[Path]:
    """30 images of every rendered set and split, cached in a folder that is still empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendered, "CACHE", tmp_path / "cache")
        counts = {source: {"train": 30, "test": 30} for source in rendered.COUNTS}
        patch.setattr(rendered, "COUNTS", counts)
        yield tmp_path / "cache"


@pytest.fixture(params=["folder", "zip"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], str]:
    """A function that makes a folder or a zip of the given files and returns its path."""
    def make(files: dict[str, bytes]) -> str:
        if request.param == "zip":
            write({"images.zip": zipped(files)}, tmp_path)
            return str(tmp_path / "images.zip")
        write(files, tmp_path / "images")
        return str(tmp_path / "images")
    return make
