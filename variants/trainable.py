"""Which parameters the private stage trains: choices beside dp_sgd.private_parameter_names."""

from torch import nn

import dp_sgd
from unet import AttentionBlock, ResBlock, SpatialTransformer, UNet


def private_parameter_names(model: nn.Module, context_tokens: int = 1,
                            trainable: str = "attention") -> list[str]:
    """Names of the parameters of `model`, with parts `unet` and `embedder`, that are trained.

    The embedder always is. Of the U-Net, `trainable` chooses:
        attention         the attention modules, as dp_sgd.private_parameter_names does
        last:K, from:K    the last K attention modules, or module K and all after it, counted from 0
                          at the input (DP-LDM's ablation)
        resblocks, all    the residual blocks, or everything
        lora              LoRA's additions to the attention modules; lora:last:K, lora:from:K

    What has no effect with one context token stays frozen. ValueError for any other choice.
    """
    every = dp_sgd.private_parameter_names(model, context_tokens=2)
    without_effect = {*every} - {*dp_sgd.private_parameter_names(model, context_tokens)}
    only_lora = trainable.split(":")[0] == "lora"
    modules = tuple(f"{name}." for name in chosen_modules(model, trainable))

    def is_trained(name: str) -> bool:
        chosen = name.startswith(modules) and (".lora." in name or not only_lora)
        return (chosen or name.startswith("embedder.")) and name not in without_effect

    return [name for name, _ in model.named_parameters() if is_trained(name)]


def chosen_modules(model: nn.Module, trainable: str) -> list[str]:
    """Names of the modules that `trainable` chooses. ValueError if it chooses none that exist."""
    def named(*kinds: type) -> list[str]:
        return [name for name, module in model.named_modules() if isinstance(module, kinds)]

    attention = named(AttentionBlock, SpatialTransformer)
    match trainable.removeprefix("lora:").split(":"):
        case ["attention" | "lora"] if not trainable.startswith("lora:"):
            return attention
        case ["last", K] if K.isdecimal() and int(K) <= len(attention):
            return attention[len(attention) - int(K):]
        case ["from", K] if K.isdecimal() and int(K) <= len(attention):
            return attention[int(K):]
        case ["resblocks"] if trainable == "resblocks":
            return named(ResBlock)
        case ["all"] if trainable == "all":
            return named(UNet)
    raise ValueError(f"{trainable!r} names nothing that can be trained: give attention, last:K, "
                     "from:K, lora, lora:last:K, lora:from:K, resblocks or all, with K from 0 to "
                     f"the number of attention modules, {len(attention)}")
