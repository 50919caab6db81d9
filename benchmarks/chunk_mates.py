"""How far can one example more move the clipped sum beyond its own part, by rounding alone?

    python benchmarks/chunk_mates.py

Matrix products may round an example's gradient in another way beside other examples. One example
more, in front, gives all the others new neighbours in their chunks. The table shows what is left of
the sum's change after the example's own part is taken out, in units of C: the accountant knows of
none of it. The U-Net is the preset mnist's, the examples are made up and C clips all of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from dp_step import CLIPPING, made_up_batch, make_model, setting

from dp_sgd import in_chunks, private_parameter_names
from runtime.precision import bfloat16


def excess(engine: str, examples: int, chunk: int, bf16: bool) -> float:
    """||S(all) - S(all but the first) - S(the first)|| / C."""
    arguments, size, *_ = setting("mnist", "cpu")
    model = make_model(arguments, "cpu").requires_grad_(False)
    for p in model.unet.parameters():   # layers that start at zero would hide the rounding
        torch.nn.init.normal_(p, std=0.05)
    batch = made_up_batch(examples, 1, arguments["in_channels"], size, "cpu")
    parameters = {name: model.get_parameter(name) for name in private_parameter_names(model)}
    clipped_sum, C = in_chunks(CLIPPING[engine], chunk), 1e-3
    with bfloat16(model.unet, model.embedder, enabled=bf16):
        everyone, others, one = (clipped_sum(model, parameters, tuple(x[i] for x in batch), C)
                                 for i in (slice(None), slice(1, None), slice(1)))
    return sum((everyone[name] - others[name] - one[name]).square().sum()
               for name in everyone).sqrt().item() / C


def main() -> None:
    print("| engine | networks in | 256 examples | 1,024 examples |\n|---|---|---|---|")
    for engine, bf16 in (("vmap", False), ("ghost", False), ("ghost", True)):
        cells = " | ".join(f"{excess(engine, examples, 100, bf16):.1e}"
                           for examples in (256, 1024))
        print(f"| {engine} | {'bfloat16' if bf16 else 'float32'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
