"""Models on disk: a checkpoint holds the architecture, the weights and what is known of them."""

from collections.abc import Callable
from pathlib import Path

import torch

from ldm import ClassEmbedder, LatentDiffusion
from runtime.files import atomic_write
from unet import UNet
from vae import AutoencoderKL
from variants import official
from variants.lora import add_lora
from variants.text import TextEmbedder
from variants.unconditional import NoEmbedder
from variants.vq import AutoencoderVQ


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
        metadata = torch.load(path, map_location="cpu", weights_only=True)
        model = build_model(metadata["architecture"])
        model.load_state_dict(metadata["model"])
        if missing := {"classes", "config"} - metadata.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except Exception as error:   # damaged bytes can fail anywhere in torch's reader
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(
            f"checkpoint {path} is damaged or of another program ({reason})") from error
    if metadata.get("part", part) != part:
        raise ValueError(f"{path} holds a trained {metadata['part']} only: "
                         "give the public.pt beside it")
    if {"ledger", "plan", "public_config"} & metadata.keys() and not metadata.get("ledger"):
        raise ValueError(f"{path} is of a private run, but its ledger is gone: what it has spent "
                         "is unknown")
    return model.eval(), metadata


def load_pretrained(path: Path, architecture: dict) -> tuple[LatentDiffusion, dict]:
    """The model in an official file, and what stands for a public checkpoint's metadata.

    The file says how many classes there are; their names are unknown. ValueError as of
    variants.official.
    """
    state = official.read_state_dict(path)
    model = build_model({**architecture, "num_classes": official.num_classes(state)})
    official.fill_official(model, state, path)
    return model.eval(), {"classes": [], "config": {"data": {"public": str(path)}}}
