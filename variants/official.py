"""Official weights: a checkpoint of CompVis/latent-diffusion, or of the authors' DP-LDM code.

    state = read_state_dict(path)            # then build a model with num_classes(state) classes
    fill_official(model, state, path)

Such a file is a pickle, and a pickle may ask for any function to be called while it is read.
torch.load with weights_only=True grants tensors and plain values only. PyTorch Lightning writes a
few more names into its files. ALLOWED lists them: they mean a class that does nothing. A file that
asks for anything else is refused.
"""

import re
from pathlib import Path

import torch

from ldm import LatentDiffusion

State = dict[str, torch.Tensor]

# Where the parts of LatentDiffusion lie in the official one.
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "embedder": "cond_stage_model."}
CLASS_TABLE = "cond_stage_model.embedding.weight"
# All of them follow from the betas; `alphas_cumprod` is compared.
SCHEDULE = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
            "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}


class Ignored:
    """Stands in for what a file remembers of its training, callbacks and scores: not needed."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED = [(Ignored, name) for name in (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]


def read_state_dict(path: str | Path) -> State:
    """The `state_dict` of a Lightning checkpoint.

    ValueError, in one line, for any other file and for one that asks for code.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # damaged bytes can fail anywhere in torch's reader
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it asks for {asked[1]}, which may run code, where only weights may be"
        else:
            detail = f"{type(error).__name__}: {str(error)[:100]}".replace("\n", " ")
            reason = f"it is damaged or of another kind ({detail})"
        raise ValueError(f"{path} is refused: {reason}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(map(is_table, state.values())):
        raise ValueError(f"{path} is refused: it has no state_dict of tensors of real "
                         "numbers, so it is no checkpoint of latent-diffusion")
    return state


def is_table(value: object) -> bool:
    """Whether `value` is a tensor of real numbers that all lie in memory."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided
            and value.device.type == "cpu" and not value.is_complex())


def class_table(state: State) -> torch.Tensor | None:
    """Embeddings [classes + 1, dim], the null class last; None if the file has none.

    Of 1001 embeddings the last one is ImageNet's null class. Other tables have none: it is the mean
    of their rows.
    """
    table = state.get(CLASS_TABLE)
    if table is None or table.dim() != 2 or len(table) == 1001:
        return table
    return torch.cat([table, table.mean(0, keepdim=True)])


def num_classes(state: State) -> int:
    """How many classes the model must have that `state` can fill: 1 if the file has none."""
    table = class_table(state)
    return 1 if table is None else max(1, len(table) - 1)


def fill_official(model: LatentDiffusion, state: State, path: str | Path) -> None:
    """Put the weights of `state`, which was read from `path`, into `model`.

    The U-Net's weights are their moving averages where the file has them. A conditioner of another
    kind is left behind: the embedder keeps what it has. Prints every missing and unexpected key.
    ValueError if the file has another noise schedule or numbers that are not finite, or if its
    U-Net and autoencoder are not exactly the model's.
    """
    check_schedule(model, state, path)
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
            found[name] = class_table(state) if key == CLASS_TABLE else state[key]
        else:
            missing.append(key)
    if broken := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} is refused: {broken[0]} has numbers that are not finite")
    losses = [key for key in state if key.startswith("first_stage_model.loss.")]
    unexpected = [key for key in state if key not in used and key not in losses]
    for line in [*(f"missing: {k}" for k in missing), *(f"unexpected: {k}" for k in unexpected)]:
        print(line)
    check_fit(model, path, found, missing, unexpected)
    model.load_state_dict(found, strict=False)
    print(f"{path}: took {len(found)} tensors ({averages} moving averages), left out {len(losses)} "
          f"of the autoencoder's loss; latent scale {model.latent_scale.item():g}")


def check_schedule(model: LatentDiffusion, state: State, path: str | Path) -> None:
    """ValueError if the file says that it was trained with another noise schedule."""
    def described(alphas_cumprod: torch.Tensor) -> str:
        betas = 1 - alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]])
        ends = " to ".join(f"{beta:.4g}" for beta in (*betas[:1], *betas[-1:]))
        return f"betas {ends} in {len(betas)} steps"

    ours = model.alphas_cumprod
    theirs = state.get("alphas_cumprod", ours).float().flatten()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3):
        raise ValueError(f"{path} is refused: its noise schedule has {described(theirs)}, "
                         f"the model's has {described(ours)}")


def check_fit(model: LatentDiffusion, path: str | Path, found: State, missing: list[str],
              unexpected: list[str]) -> None:
    """ValueError unless U-Net and autoencoder are the model's, nothing less and nothing more."""
    own = model.state_dict()
    misfits = [f"{name} has the shape {[*tensor.shape]}, not {[*own[name].shape]}"
               for name, tensor in found.items() if tensor.shape != own[name].shape]
    parts = PREFIXES["unet"], PREFIXES["vae"]
    misfits += [f"{key} is missing" for key in missing if key.startswith(parts)]
    misfits += [f"{key} is unexpected" for key in unexpected if key.startswith(parts)]
    if misfits:
        raise ValueError(f"{path} is refused: its architecture is not the model's "
                         f"({len(misfits)} differences; the first: {misfits[0]})")
