"""Models on disk: a checkpoint holds the architecture, the weights and what is known of them.

A file from elsewhere may hold anything. It is checked before anything is built of it.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from dp_sgd import PrivacyPlan, Tensors
from ldm import ClassEmbedder, LatentDiffusion
from runtime import ledger
from runtime.config import MODEL_TABLES
from runtime.files import atomic_write
from unet import UNet
from vae import AutoencoderKL
from variants import official
from variants.lora import add_lora
from variants.text import TextEmbedder
from variants.unconditional import NoEmbedder
from variants.vq import AutoencoderVQ

MOST_PIXELS = 4_096   # how wide images may be
PRIVATE = {"ledger", "plan", "public_config", "training"}   # what private runs save


def build_model(architecture: dict) -> LatentDiffusion:
    """The model of plain numbers, which `model.architecture` keeps.

    vae: the arguments of AutoencoderKL, or with n_embed of AutoencoderVQ. unet: those of UNet.
    num_classes, linear_start, linear_end. Captions have text: {length, layers} too. lora_rank: the
    rank of the attention's low-rank additions.
    """
    vae, unet = architecture["vae"], architecture["unet"]
    autoencoder = AutoencoderVQ(**vae) if "n_embed" in vae else AutoencoderKL(**vae)
    network = UNet(**unet)
    if unet["context_dim"] is None:
        embedder = NoEmbedder()
    elif "text" in architecture:
        embedder = TextEmbedder(unet["context_dim"], **architecture["text"])
    else:
        embedder = ClassEmbedder(architecture["num_classes"], unet["context_dim"])
    model = LatentDiffusion(autoencoder, network, embedder, architecture["linear_start"],
                            architecture["linear_end"])
    if "lora_rank" in architecture:
        add_lora(model.unet, architecture["lora_rank"])
    model.architecture = architecture
    return model


def save_checkpoint(path: Path, model: LatentDiffusion,
                    on_commit: Callable[[], None] = lambda: None, **metadata: object) -> None:
    """Write model and metadata (plain values) atomically. on_commit: see files.atomic_write."""
    content = {"architecture": model.architecture, "model": model.state_dict(), **metadata}
    with atomic_write(path, on_commit) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, part: str = "") -> tuple[LatentDiffusion, dict]:
    """The model in `path`, and all that is stored beside it. ValueError if it is no checkpoint.

    part: "autoencoder" for a file in which only that is trained; other parts are refused.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist; train it first with train.py")
    try:
        metadata = read_content(Path(path))
        check_metadata(metadata)
        model = rebuilt(metadata["architecture"], metadata["model"], metadata["classes"])
    except Exception as error:   # damaged bytes can fail anywhere in torch's reader
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(
            f"checkpoint {path} is damaged or of another program ({reason})") from error
    if metadata.get("part", part) != part:
        raise ValueError(f"{path} holds a trained autoencoder only: "
                         "give the public.pt beside it")
    if PRIVATE & metadata.keys() and not metadata.get("ledger"):
        raise ValueError(f"{path} is of a private run, but its ledger is gone: what it has spent "
                         "is unknown")
    return model.eval(), metadata


def read_content(path: Path) -> dict:
    """What save_checkpoint wrote into `path`. ValueError if that is larger than the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as members:   # torch.save compresses nothing
        if sum(member.file_size for member in members.infolist()) > size:
            raise ValueError("it is compressed")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if sum(tensor.nbytes for tensor in content["model"].values()) > size:
        raise ValueError("its weights overlap")
    return content


def rebuilt(architecture: dict, weights: Tensors, classes: list[str]) -> LatentDiffusion:
    """The model with these weights. ValueError unless they are all that it has, and finite.

    So it takes no more memory than the file, whatever numbers the architecture has.
    """
    for part, widths in (("vae", "ch_mult"), ("unet", "channel_mult")):
        levels = len(architecture[part][widths])
        if levels * max(1, architecture[part]["num_res_blocks"]) > len(weights):
            raise ValueError("its architecture has more layers than weights")
    if architecture.get("text", {"layers": 0})["layers"] > len(weights):
        raise ValueError("its architecture has more layers than weights")
    if not 1 <= architecture["vae"]["resolution"] <= MOST_PIXELS:   # no weight depends on it
        raise ValueError(f"its images are not from 1 to {MOST_PIXELS:,} pixels wide")
    with torch.device("meta"):   # shapes without memory
        expected = build_model(architecture).state_dict()
    if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in weights.items()}:
        raise ValueError("its weights are not those of its architecture")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("a weight is not finite")
    model = build_model(architecture)
    model.load_state_dict(weights)
    if isinstance(model.embedder, ClassEmbedder) and len(classes) != model.embedder.null_class:
        raise ValueError(f"it names {len(classes)} of {model.embedder.null_class} classes")
    return model


def check_metadata(content: dict) -> None:
    """ValueError, or the error of a missing key, unless all is of the shape that is saved."""
    if missing := {"architecture", "model", "classes", "config"} - content.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for key in content.keys() - {"model", "training"}:
        if not is_plain(content[key]):
            raise ValueError(f"its {key} is of no plain values")
    if not isinstance(content["classes"], list) or not all(
            isinstance(name, str) for name in content["classes"]):
        raise ValueError("its classes are not a list of names")
    check_tables(content["config"], MODEL_TABLES)
    if content.get("ledger"):
        check_private(content)


def check_tables(config: dict, tables: tuple[str, ...]) -> None:
    """ValueError unless a saved Config has these tables, and says which data were public."""
    if not isinstance(config, dict) or not all(
            isinstance(config.get(table), dict) for table in tables):
        raise ValueError(f"its settings lack one of the tables {', '.join(tables)}")
    if not isinstance(config["data"].get("public"), str):
        raise ValueError("its settings do not name the public data")


def check_private(content: dict) -> None:
    """ValueError unless plan, ledger and training state of a private checkpoint can be used."""
    if missing := {"plan", "public_config"} - content.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    check_tables(content["public_config"], ("data",))
    if content["config"]["private"].get("accountant") not in ledger.ACCOUNTANTS:
        raise ValueError("its settings name no known accountant")
    if not isinstance(content["ledger"], list):
        raise ValueError("its ledger is no list")
    ledger.check(content["ledger"])
    ledger.check([content["plan"]])
    plan = PrivacyPlan(**content["plan"])
    if "training" in content:
        check_training(content["training"], content["model"], plan.steps)


def check_training(training: dict, weights: Tensors, steps: int) -> None:
    """ValueError unless runs.restore can go on with what runs.Saver kept."""
    if type(training["step"]) is not int or not 0 <= training["step"] <= steps:
        raise ValueError(f"its run is not after 0 to {steps} steps")
    parameters, ema = training["parameters"], training["ema"]
    expected = {name: weights[name].shape for name in parameters}
    states = training["optimizer"]["state"]
    moments = [{name: states[k][moment] for k, name in enumerate(parameters)}
               for moment in ("exp_avg", "exp_avg_sq") if states]
    for tensors in (parameters, ema, *moments):
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise ValueError("its training state is of other weights")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("its training state is not finite")
    if not all(0 <= float(state["step"]) <= steps for state in states.values()):
        raise ValueError("its training state is not of this run")


def is_plain(value: object, depth: int = 4) -> bool:
    """Whether `value` is a number, text or None, or of such in lists and tables, not too deep."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(key, str) and is_plain(inner, depth - 1)
                                 for key, inner in value.items())
    if isinstance(value, list | tuple):
        return depth > 0 and all(is_plain(inner, depth - 1) for inner in value)
    return value is None or isinstance(value, str | int | float)


def load_pretrained(path: Path, architecture: dict) -> tuple[LatentDiffusion, dict]:
    """The model in an official file, and what stands for a public checkpoint's metadata.

    The file says how many classes there are; their names are unknown. ValueError as of
    variants.official.
    """
    state = official.read_state_dict(path)
    model = build_model({**architecture, "num_classes": official.num_classes(state)})
    official.fill_official(model, state, path)
    return model.eval(), {"classes": [], "config": {"data": {"public": str(path)}}}
