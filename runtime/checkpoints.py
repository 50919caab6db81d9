"""Models on disk: a checkpoint holds the architecture, the weights and what is known of them.

A file from elsewhere may hold anything. It is checked before anything is built of it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from dp_sgd import PrivacyPlan, Tensors
from ldm import ClassEmbedder, LatentDiffusion, make_alphas_cumprod
from runtime import ledger
from runtime.config import MODEL_TABLES
from runtime.files import atomic_write
from runtime.weights import changed, check_tensors, digest, in_half, lacking, read_content
from unet import UNet
from vae import AutoencoderKL
from variants import official
from variants.lora import add_lora
from variants.text import TextEmbedder
from variants.unconditional import NoEmbedder
from variants.vq import AutoencoderVQ

MOST_PIXELS = 4_096   # how wide images may be
# In an architecture, what counts or measures nothing; and sizes that may be None.
NO_SIZES = {"vae", "unet", "text", "linear_start", "linear_end", "use_scale_shift_norm",
            "resblock_updown"}
OPTIONAL = {"num_head_channels", "context_dim"}
PRIVATE = {"ledger", "plan", "public_config", "training"}   # what private runs save


def build_model(architecture: dict) -> LatentDiffusion:
    """The model of plain numbers, which `model.architecture` keeps.

    vae: the arguments of AutoencoderKL, or with n_embed of AutoencoderVQ. unet: those of UNet.
    num_classes, linear_start, linear_end. Captions have text: {length, layers} too. lora_rank: the
    rank of the attention's low-rank additions. ValueError for a schedule without noise or signal.
    """
    if not all(0 < architecture[end] < 1 for end in ("linear_start", "linear_end")):
        raise ValueError("schedule.linear_start and schedule.linear_end must be between 0 and 1")
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
                    on_commit: Callable[[], None] = lambda: None, half: bool = False,
                    base: dict[str, str] | None = None, **metadata: object) -> None:
    """Write model and metadata (plain values) atomically. on_commit: see files.atomic_write.

    half: in 16 bits. base: weights.digests of another model, whose weights are left out.
    """
    weights = model.state_dict()
    if base:
        weights, metadata = changed(weights, base), {**metadata, "base": digest(base)}
    weights = in_half(model, weights) if half else weights
    content = {"architecture": model.architecture, "model": weights, **metadata}
    with atomic_write(path, on_commit) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, part: str = "") -> tuple[LatentDiffusion, dict]:
    """The model in `path`, and all that is stored beside it. ValueError if it is no checkpoint.

    part: "autoencoder" for a file in which only that is trained; other parts are refused.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist; train it first with train.py")
    with one_reason(path):
        metadata = read_content(Path(path))
        check_metadata(metadata)
    public = lacking(Path(path), str(metadata["base"])) if "base" in metadata else {}
    with one_reason(path):
        weights = {**public, **metadata.pop("model")}
        model = rebuilt(metadata["architecture"], weights, metadata["classes"])
    if metadata.get("part", part) != part:
        raise ValueError(f"{path} holds a trained autoencoder only: "
                         "give the public.pt beside it")
    if PRIVATE & metadata.keys() and not metadata.get("ledger"):
        raise ValueError(f"{path} is of a private run, but its ledger is gone: what it has spent "
                         "is unknown")
    check_scale(model, path)
    return model.eval(), metadata


@contextmanager
def one_reason(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is one line: ValueError."""
    try:
        yield
    except Exception as error:   # damaged bytes can fail anywhere in torch's reader
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(
            f"checkpoint {path} is damaged or of another program ({reason})") from error


def check_scale(model: LatentDiffusion, path: Path) -> None:
    """ValueError if all latents of a model that was read from `path` would be 0, or not finite."""
    if not 0 < model.latent_scale < math.inf:
        raise ValueError(f"{path} is refused: its latent scale is {model.latent_scale:g}, which is "
                         "not positive and finite")


def rebuilt(architecture: dict, weights: Tensors, classes: list[str]) -> LatentDiffusion:
    """The model with these weights. ValueError unless they are all that it has, and finite.

    So it takes no more memory than the file, whatever numbers the architecture has.
    """
    check_layers(architecture, len(weights))
    check_sizes(architecture)
    with shapes_only():
        model = build_model(architecture)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError("its weights are not those of its architecture")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("a weight is not finite")
    schedule = make_alphas_cumprod(architecture["linear_start"], architecture["linear_end"])
    if not torch.allclose(weights["alphas_cumprod"].double(), schedule, rtol=1e-3):
        raise ValueError("its noise schedule is not that of its architecture")
    copies = {name: torch.empty(w.shape).copy_(w) for name, w in weights.items()}
    model.load_state_dict(copies, assign=True)
    if isinstance(model.embedder, ClassEmbedder) and len(classes) != model.embedder.null_class:
        raise ValueError(f"it names {len(classes)} of {model.embedder.null_class} classes")
    return model


class WithoutNumbers(TorchFunctionMode):
    """Inside, weights are not initialised: on the meta device that would import a compiler."""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, models have shapes and take no memory."""
    with torch.device("meta"), WithoutNumbers():
        yield


def check_layers(architecture: dict, weights: int) -> None:
    """ValueError unless every size is a positive integer, and each layer can have a weight."""
    tables = [architecture[part] for part in ("vae", "unet", "text") if part in architecture]
    for key, value in [item for table in (architecture, *tables) for item in table.items()]:
        for number in value if isinstance(value, list | tuple) else [value]:
            if key in NO_SIZES or number is None and key in OPTIONAL:
                continue
            if type(number) is not int or number < 1:
                raise ValueError(f"its {key} is no positive integer")
    vae, unet, text = (architecture.get(part, {}) for part in ("vae", "unet", "text"))
    layers = (len(vae["ch_mult"]) * vae["num_res_blocks"], text.get("layers", 0),
              len(unet["channel_mult"]) * unet["num_res_blocks"] * unet.get("transformer_depth", 1))
    if max(layers) > weights:
        raise ValueError("its architecture has more layers than weights")


def check_sizes(architecture: dict) -> None:
    """ValueError for sizes that no weight shows, but that the networks cannot have together."""
    vae, unet = architecture["vae"], architecture["unet"]
    halvings = len(vae["ch_mult"]) + len(unet["channel_mult"]) - 2
    if not 1 <= vae["resolution"] <= MOST_PIXELS or vae["resolution"] % 2**halvings:
        raise ValueError(f"its images are not from 1 to {MOST_PIXELS:,} pixels wide, or cannot be "
                         f"halved {halvings} times")
    if not unet["in_channels"] == unet["out_channels"] == vae["embed_dim"]:
        raise ValueError("its U-Net does not fit to its latents")
    heads = unet.get("num_head_channels") or unet["num_heads"]
    if any(unet["model_channels"] * width % heads for width in unet["channel_mult"]):
        raise ValueError("its heads do not divide its channels")


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
        check_tensors(tensors)
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
    check_scale(model, path)
    return model.eval(), {"classes": [], "config": {"data": {"public": str(path)}}}
