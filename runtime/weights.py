"""Weights in files: all that a model has, or only those that its private run has changed.

A private model is published beside its public one, whose weights its file lacks. The file knows
them by their digest. So it is found whatever its public model is called.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from dp_sgd import Tensors
from variants.official import is_table

LARGEST_HALF = 65_504.0   # the largest number of 16 bits


def read_content(path: Path) -> dict:
    """What checkpoints.save_checkpoint wrote. ValueError if that is larger than the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as members:   # torch.save compresses nothing
        if sum(member.file_size for member in members.infolist()) > size:
            raise ValueError("it is compressed")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it has no table of weights")
    check_tensors(content["model"])
    if sum(tensor.nbytes for tensor in content["model"].values()) > size:
        raise ValueError("its weights overlap")
    return content


def check_tensors(values: dict) -> None:
    """ValueError unless all values are tensors of real floating-point numbers in memory."""
    for name, value in values.items():
        if not (is_table(value) and value.is_floating_point()):
            raise ValueError(f"{name} is no tensor of floating-point numbers")


def in_half(model: torch.nn.Module, weights: Tensors) -> Tensors:
    """`weights` of the model with its parameters in 16 bits, but those that are too large."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: w.half() if name in parameters and w.abs().max() <= LARGEST_HALF else w
            for name, w in weights.items()}


# ---- what a private file lacks -----------------------------------------------------------------

def digests(weights: Tensors) -> dict[str, str]:
    """The SHA-256 of each tensor, in whatever precision it is stored."""
    return {name: hashlib.sha256(w.detach().cpu().float().contiguous().numpy()).hexdigest()
            for name, w in weights.items()}


def digest(each: dict[str, str]) -> str:
    """One SHA-256 of all `digests`."""
    return hashlib.sha256(repr(sorted(each.items())).encode()).hexdigest()


def changed(weights: Tensors, base: dict[str, str]) -> Tensors:
    """Those weights that are not among the `digests` base."""
    return {name: weights[name] for name, its in digests(weights).items() if base.get(name) != its}


def base_digests(path: Path) -> dict[str, str]:
    """`digests` of the whole model that the model in `path` is, or stems from."""
    content = read_content(path)
    whole = lacking(path, content["base"]) if "base" in content else content["model"]
    return digests(whole)


def lacking(path: Path, base: str) -> Tensors:
    """The weights, of digest `base`, of the public model of a private file `path`.

    It lies beside that, or where the run began, or an earlier one. ValueError if it does not.
    """
    folders = [path.parent]   # grows below
    for folder in folders:
        for _, content in checkpoints_in(folder):
            if "base" not in content and digest(digests(content["model"])) == base:
                return content["model"]
            if content.get("base") == base and (
                    began := began_in(content, folder)) not in folders:
                folders.append(began)
    raise ValueError(f"{path} holds only what its private run has changed: put its public model "
                     f"into the same folder (weights of digest {base[:16]})")


def began_in(content: dict, folder: Path) -> Path:
    """Where the model lay that the private run of a file in `folder` began with."""
    with suppress(Exception):   # anything may stand there
        if elsewhere := content["config"]["run"]["public_checkpoint"]:
            return Path(elsewhere).parent
    return folder


def checkpoints_in(folder: Path) -> Iterator[tuple[Path, dict]]:
    """(path, content) of the checkpoints in a folder. Other files are passed over."""
    for path in sorted(folder.glob("*.pt")):
        with suppress(Exception):   # damaged bytes can fail anywhere in torch's reader
            yield path, read_content(path)


def check_not_needed(path: Path) -> None:
    """ValueError if `path` must not be replaced: a private file beside it lacks its weights."""
    own = ""
    with suppress(Exception):   # nothing lacks the weights of a damaged file
        own = digest(digests(read_content(path)["model"]))
    for other, content in checkpoints_in(path.parent):
        if content.get("base") == own:
            raise ValueError(f"{other} needs the weights in {path}: move both to another folder, "
                             "or give another --out")
