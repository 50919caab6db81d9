"""What a configuration amounts to: parameters, trained ones, and memory of a private step."""

from collections.abc import Iterable

import torch
from torch import nn

from runtime.checkpoints import build_model, shapes_only
from runtime.config import Config
from variants.trainable import private_parameter_names

# LDM's BERTEmbedder of txt2img-1p4B, 32 layers of width 1280 (CompVis/latent-diffusion a506df5).
TEXT_ENCODER_PARAMETERS = 581_994_042


def num_parameters(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def summary(config: Config) -> str:
    """Tables of parameters and memory, as text. Nothing is allocated."""
    architecture = config.architecture(config.data.num_classes)
    if config.private.trainable.startswith("lora"):
        architecture["lora_rank"] = config.private.lora_rank
    with shapes_only():
        model = build_model(architecture).to("meta").requires_grad_(False)
    names = unet_names(model, config, config.context_tokens)
    trained = num_parameters(map(model.unet.get_parameter, names))
    idle = num_parameters(map(model.unet.get_parameter, unet_names(model, config, 2))) - trained
    kind, embedder = describe_embedder(model, config)
    lines = parameter_table(model, config, kind, embedder, trained)
    if idle:
        lines.append(f"{idle:,} more in the trained modules have no effect with one context token: "
                     "they stay frozen")
    return "\n".join(lines + memory_table(model, config, names, embedder, trained))


def unet_names(model: nn.Module, config: Config, context_tokens: int) -> list[str]:
    """Names inside the U-Net of what the private stage trains there."""
    names = private_parameter_names(model, context_tokens, config.private.trainable)
    return [name.removeprefix("unet.") for name in names if name.startswith("unet.")]


def describe_embedder(model: nn.Module, config: Config) -> tuple[str, int]:
    """(what the embedder is, its number of parameters)."""
    if config.has_captions and not config.text.layers:
        return "text encoder of txt2img-1p4B", TEXT_ENCODER_PARAMETERS
    embedder = num_parameters(model.embedder.parameters())
    if not embedder:
        return "no embedder", 0
    if config.has_captions:
        return f"text encoder, {config.text.layers} layers", embedder
    return f"class embedder, {config.data.num_classes} + 1 rows", embedder


def parameter_table(model: nn.Module, config: Config, kind: str, embedder: int,
                    trained: int) -> list[str]:
    unet, vae = (num_parameters(part.parameters()) for part in (model.unet, model.vae))
    channels, side, _ = model.vae.latent_shape
    size = config.data.image_size
    lines = [f"preset {config.preset}: images {size}x{size}x{config.data.channels}, latents "
             f"{side}x{side}x{channels}", f"{'':34}{'parameters':>15}{'trained':>15}{'share':>9}"]
    rows = [(f"autoencoder ({'VQ' if config.vae.n_embed else 'KL'})", vae, 0),
            ("U-Net", unet, trained), (kind, embedder, embedder),
            ("U-Net and embedder", unet + embedder, trained + embedder)]
    for part, total, learns in rows:
        lines.append(f"{part:34}{total:>15,}{learns:>15,}{learns / max(1, total):>9.2%}")
    return lines


def memory_table(model: nn.Module, config: Config, names: list[str], embedder: int,
                 trained: int) -> list[str]:
    learns = trained + embedder
    weights = num_parameters(model.unet.parameters()) + num_parameters(model.vae.parameters())
    physical = config.run.physical_batch
    examples = 1 if physical == "auto" else int(physical)
    kept = config.private.noise_multiplicity * kept_bytes(
        model.unet, names, (1, *model.vae.latent_shape), config.context_tokens,
        config.unet.context_dim)
    gradients = 4 * learns if config.run.clipping == "vmap" else 0
    per_example = (f"{examples} examples at a time (--physical-batch), {kept / 2**20:,.1f} MiB "
                   "each: what autograd keeps of the U-Net's forward pass")
    if config.has_captions:
        per_example += " (not the text encoder)"
    if gradients:
        per_example += f", and {gradients / 2**20:,.1f} MiB: their gradients"
    memory = [
        (4 * (weights + embedder), "all weights, float32"),
        (28 * learns, "seven more per trained one: copy, average, Adam's moments (2), clipped sum, "
                      "noisy gradient, the last one"),
        (examples * (kept + gradients), per_example)]
    total = sum(size for size, _ in memory) / 2**30
    return [f"a private step needs about {total:.2f} GiB, an estimate:",
            *(f"{size / 2**30:9.2f} GiB  {what}" for size, what in memory)]


def kept_bytes(unet: nn.Module, names: list[str], shape: tuple[int, ...], tokens: int,
               context_dim: int) -> int:
    """Bytes that autograd keeps of the U-Net's forward pass, until the backward pass to `names`.

    The U-Net lies on the meta device; shape is z_t's. Weights do not count. The backward pass frees
    these bytes bit by bit. What it needs beside them, and what libraries take, is not counted.
    """
    context = torch.zeros(shape[0], tokens, context_dim, device="meta") if context_dim else None
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()   # views of one tensor share it
        storages[id(storage)] = storage
        return tensor

    for name in names:
        unet.get_parameter(name).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        t = torch.zeros(shape[0], device="meta")
        unet(torch.zeros(shape, device="meta"), t, context).square().mean()
    weights = {id(p.untyped_storage()) for p in unet.parameters()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)
