"""Captions instead of classes: a text encoder, a drop-in for ldm.ClassEmbedder."""

from collections.abc import Iterable

import torch
from torch import nn

from unet import CrossAttention, FeedForward

PADDING = 256   # the token after a caption's last byte


def tokenise(captions: list[str], length: int) -> torch.Tensor:
    """UTF-8 bytes of each caption, cut off or padded to `length`: int [N, length].

    ValueError if a caption is not valid text.
    """
    tokens = torch.full((len(captions), length), PADDING)
    for i, caption in enumerate(captions):
        try:
            content = caption.encode()[:length]
        except UnicodeEncodeError as error:   # half a surrogate pair, or bytes of a command line
            raise ValueError(f"caption number {i + 1} is not valid UTF-8 text") from error
        tokens[i, :len(content)] = torch.tensor(list(content), dtype=torch.long)
    return tokens


def check_prompts(prompts: Iterable[str], length: int) -> None:
    """ValueError naming the first prompt that a model of `length` bytes would not see as it is."""
    for prompt in prompts:
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {prompt!a} is not UTF-8") from error
        if not prompt.strip() or size > length:
            raise ValueError(f"the prompt {prompt!r} has {size} bytes: give from 1 to {length}, "
                             "and not only blanks")


class TextBlock(nn.Module):
    """Self-attention and feed-forward with pre-norms and residual connections: [B, L, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        heads = max(1, dim // 32)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.ff = CrossAttention(dim, dim, heads, dim // heads), FeedForward(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class TextEmbedder(nn.Module):
    """Captions int [B, L] from `tokenise` -> context [B, L, dim], by a transformer.

    Rombach et al. 2022, section 3.3. As in LDM's BERTEmbedder, attention does not skip padding. The
    null condition is the empty caption, which is all padding.
    """
    null_class = PADDING

    def __init__(self, dim: int, length: int, layers: int):
        super().__init__()
        self.length = length
        self.tokens = nn.Embedding(PADDING + 1, dim)
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(TextBlock(dim) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
        x = self.scale * self.tokens(tokens) + self.positions(places)
        return self.norm(self.blocks(x))

    def conditions(self, names: list[str]) -> torch.Tensor:
        """What `forward` takes for these captions: int [N, L]. ValueError as of `tokenise`."""
        return tokenise(names, self.length)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """The same for the table of tokens as ClassEmbedder.rescale; the transformer's units stay.

        Layer normalisation makes its gradients depend little on the scale of its input.
        """
        self.tokens.weight.mul_(self.scale / scale)
        self.scale.fill_(scale)

    @torch.no_grad()
    def init_unseen_bytes(self, captions: list[str], lookalikes: dict[str, str]) -> None:
        """Start a character that no public caption has as its lookalike, {character: character}.

        Only public captions and public knowledge enter here.
        """
        seen = set("".join(captions))
        for character, alike in lookalikes.items():
            if character not in seen and alike in seen:
                self.tokens.weight[ord(character)] = self.tokens.weight[ord(alike)]
