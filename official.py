"""Official weights: a checkpoint of CompVis/latent-diffusion, or of the authors' DP-LDM code, as a public model.

Such a file is a pickle, and a pickle may ask for any function to be called while it is read. torch.load with
weights_only=True grants tensors and plain values only. PyTorch Lightning writes a few more names into its files:
they are listed in ALLOWED, and mean a class that does nothing. Whatever else a file asks for, it is refused.
"""

import re
from pathlib import Path

import torch

from ldm import LatentDiffusion

# Where the parts of LatentDiffusion lie in the official one.
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "embedder": "cond_stage_model."}
CLASS_TABLE = "cond_stage_model.embedding.weight"
# Follow from the betas, all of them; `alphas_cumprod` is compared.
SCHEDULE = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}


class Ignored:
    """Stands in for what a file remembers of its training (callbacks, scores), of which nothing is needed."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


ALLOWED = [(Ignored, name) for name in ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
                                        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The `state_dict` of a Lightning checkpoint. ValueError in one line for any other file, and for one with code."""
    if not path.is_file():
        raise ValueError(f"--init {path} does not exist")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # damaged bytes can fail anywhere in torch's reader
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (f"it asks for {asked[1]}, which may run code, where only weights may be" if asked else
                  f"it is damaged or of another kind ({type(error).__name__}: {str(error)[:100]})".replace("\n", " "))
        raise ValueError(f"--init {path} is refused: {reason}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"--init {path} has no state_dict of tensors: it is no checkpoint of latent-diffusion")
    return state


def load_official(path: str | Path, architecture: dict) -> tuple[LatentDiffusion, dict]:
    """The model in an official file, and what stands for the facts of load_checkpoint (ldm.py).

    `architecture` is LatentDiffusion's; its num_classes is replaced by the file's. The U-Net's weights are their
    moving averages where the file has them. Of 1001 class embeddings the last one is ImageNet's null class; other
    tables have none, and get the mean of their rows. A conditioner of another kind is left behind: the embedder
    is drawn anew, with one class. Prints every missing and unexpected key. ValueError where the file has another
    noise schedule, or U-Net and autoencoder are not exactly those of `architecture`.
    """
    path = Path(path)
    state = read_state_dict(path)
    table = state.get(CLASS_TABLE, torch.empty(0))
    if table.dim() == 2 and len(table) != 1001:
        table = torch.cat([table, table.mean(0, keepdim=True)])
    model = LatentDiffusion({**architecture, "num_classes": max(1, len(table) - 1)})
    check_schedule(path, state, model)
    found, missing, averages = {"latent_scale": state.get("scale_factor", torch.tensor(1.0))}, [], 0
    used = {*SCHEDULE, "scale_factor", "model_ema.decay", "model_ema.num_updates"}
    for name in model.state_dict():
        part, _, rest = name.partition(".")
        if part not in PREFIXES or name == "embedder.scale":
            continue
        key, average = PREFIXES[part] + rest, "model_ema.diffusion_model" + rest.replace(".", "")
        used.add(key)
        if part == "unet" and average in state:
            used.add(average)
            averages += 1
            key = average
        if key in state:
            found[name] = table if key == CLASS_TABLE else state[key]
        else:
            missing.append(key)
    losses = [key for key in state if key.startswith("first_stage_model.loss.")]
    unexpected = [key for key in state if key not in used and key not in losses]
    for line in [*(f"missing: {key}" for key in missing), *(f"unexpected: {key}" for key in unexpected)]:
        print(line)
    refuse_misfits(path, model, found, missing, unexpected)
    model.load_state_dict(found, strict=False)
    print(f"{path}: took {len(found)} tensors ({averages} moving averages), left out {len(losses)} of "
          f"the autoencoder's loss; latent scale {model.latent_scale.item():g}")
    return model.eval(), {"classes": [], "config": {"public_data": str(path)}}


def check_schedule(path: Path, state: dict, model: LatentDiffusion) -> None:
    """ValueError if the file says that it was trained with another noise schedule."""
    ours = model.alphas_cumprod
    theirs, betas = state.get("alphas_cumprod", ours).float(), state.get("betas", torch.zeros(1)).flatten()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3):
        raise ValueError(f"--init {path} has another noise schedule: {theirs.numel()} steps, betas {betas[0]:g} to "
                         f"{betas[-1]:g}; --linear-start and --linear-end say {model.architecture['linear_start']:g} "
                         f"and {model.architecture['linear_end']:g}, in 1000 steps")


def refuse_misfits(path: Path, model: LatentDiffusion, found: dict, missing: list[str], unexpected: list[str]) -> None:
    """ValueError unless the file has U-Net and autoencoder as they are in `model`, nothing less and nothing more."""
    own = model.state_dict()
    misfits = [f"{name} has the shape {[*tensor.shape]}, not {[*own[name].shape]}" for name, tensor in found.items()
               if tensor.shape != own[name].shape]
    parts = PREFIXES["unet"], PREFIXES["vae"]
    misfits += [f"{key} is missing" for key in missing if key.startswith(parts)]
    misfits += [f"{key} is unexpected" for key in unexpected if key.startswith(parts)]
    if misfits:
        raise ValueError(f"--init {path} has another architecture than the flags ask for ({len(misfits)} differences; "
                         f"the first: {misfits[0]})")
