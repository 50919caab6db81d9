"""Private classes start from public ones: their namesakes, their lookalikes, or the mean of all."""

import copy
import string

import torch

from ldm import ClassEmbedder, LatentDiffusion

# The letter that each digit looks most like: public knowledge.
LOOKALIKES = dict(zip(string.digits, "OlZBASbTBq", strict=True))
SHAPES_ALIKE = {"hexagon": "circle", "heart": "triangle", "cross": "square", "star": "diamond"}
TURNED_LOOKALIKES = {"3": "E mirrored", "4": "h turned", "7": "L turned"}   # more alike still


def match_classes(private: list[str], public: list[str]) -> list[int] | None:
    """For each private class the public one that it starts from; None if a class has none."""
    known = {**LOOKALIKES, **SHAPES_ALIKE}

    def start(name: str) -> str | None:
        alike = known.get(name, "")   # some sets have no turned letters, some no small ones
        candidates = (name, TURNED_LOOKALIKES.get(name, ""), alike, alike.upper())
        return next((c for c in candidates if c in public), None)

    starts = [start(name) for name in private]
    return None if None in starts else [public.index(name) for name in starts]


def new_class_embedder(model: LatentDiffusion, init_from: list[int] | None,
                       num_classes: int) -> LatentDiffusion:
    """A copy of `model` for other classes: class k starts as public class init_from[k].

    Without init_from every class starts as the mean of the public ones. The null class is kept.
    Only public weights and public knowledge enter here. A model without classes keeps what it has.
    """
    new = copy.deepcopy(model)
    new.architecture = {**model.architecture, "num_classes": num_classes}
    if not isinstance(model.embedder, ClassEmbedder):
        return new
    old = model.embedder.scale * model.embedder.embedding.weight.detach()
    if init_from is None:
        rows = old[:-1].mean(0).expand(num_classes, -1)
    else:
        rows = old[init_from]
    new.embedder = ClassEmbedder(num_classes, old.shape[1]).to(old.device)
    new.embedder.embedding.weight.data.copy_(torch.cat([rows, old[-1:]]))
    return new
