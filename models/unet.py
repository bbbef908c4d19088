"""What the U-Nets share: making the entries of a layout, running them, label dropout, the choice of attention."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ipfm.models.attention import AttentionBackend, check_attention_backend
from ipfm.models.blocks import Entering, UNetBlock, enter_together
from ipfm.models.embeddings import FourierEmbedding, PositionalEmbedding
from ipfm.models.layers import Linear, is_watched, residual, stored_weight, without_bias
from ipfm.models.unet_layout import Entry, Layout
from ipfm.models.whole_block import is_plain_eager

# What a U-Net gives beside F: nothing, the logits of its encoder too, or these alone, without the decoder.
Logits = Literal["none", "too", "alone"]


def encoder_logits(innermost: Tensor) -> Tensor:
    """The mean over the channels (B, H, W) of what the encoder's last block gives, (B, C, H, W); of at least float32.

    As logits they make a discriminator of an encoder, without a parameter of their own (Zhou et al. 2024, SiDA).
    """
    wide = innermost if innermost.dtype == torch.float64 else innermost.float()
    return wide.mean(dim=1)


class BlockFactory(Protocol):
    """Makes the residual block of an entry."""

    def __call__(self, in_channels: int, out_channels: int, *, up: bool, down: bool, attention: bool) -> UNetBlock: ...


class Attending(Protocol):
    """What is asked of the residual blocks of every U-Net."""

    out_channels: int
    num_heads: int
    """0: it does not attend."""
    attention_backend: AttentionBackend

    @property
    def is_plain(self) -> bool: ...


class Backbone(nn.Module, ABC):
    """A U-Net F(x; noise label, class label, augment label) with an encoder `enc` and a decoder `dec`.

    `activation_checkpointing` may be set at any time: while a graph is made, of each residual block only what goes in
    is kept, and the backward pass runs the block once more, with the same dropout. So may `channels_last`: activations
    then have the channels of a pixel side by side in memory.

    Args:
        layout: the entries of the encoder and the decoder.
    """

    activation_checkpointing = False
    channels_last = False
    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    @property
    @abstractmethod
    def blocks(self) -> Iterator[Attending]:
        """Every residual block, in order of evaluation."""

    @property
    @abstractmethod
    def first_weight(self) -> Tensor:
        """The weight that the embedding of the noise label meets first; it says where and in what dtype all are."""

    @property
    def attention_backend(self) -> AttentionBackend:
        """How the attention layers compute (see `attention`); may be set at any time."""
        return next(self.blocks).attention_backend

    @attention_backend.setter
    def attention_backend(self, backend: AttentionBackend) -> None:
        check_attention_backend(backend)
        for block in self.blocks:
            block.attention_backend = backend

    def _checkpointed(
        self,
        run: Callable[..., Tensor],
        block: nn.Module,
        dropout: float,
        *given: Any,
        tensors: Sequence[Tensor | None],
    ) -> Tensor:
        """`run(*given)`, which calls `block`; its activations are kept, or not, see `activation_checkpointing`.

        Args:
            run: the function.
            block: whose parameters may need gradients.
            dropout: its probability.
            *given: what `run` takes.
            tensors: those in `given`.
        """
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return run(*given)
        sources = itertools.chain((tensor for tensor in tensors if tensor is not None), block.parameters())
        if not any(s.requires_grad for s in sources):
            return run(*given)
        random = block.training and dropout > 0
        again: Tensor = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=random)
        return again


class UNet(Backbone):
    """A U-Net of residual blocks with group normalisation.

    A subclass makes its layers in the order of the state dict, the entries among them by
    `_make`, and says how labels become an embedding and what follows the decoder.

    Args:
        layout: the entries of the encoder and the decoder.
        label_dropout: probability of dropping a class label, while training.
    """

    map_noise: PositionalEmbedding | FourierEmbedding
    map_label: Linear | None
    map_augment: Linear | None
    map_layer0: Linear
    map_layer1: Linear

    def __init__(self, layout: Layout, label_dropout: float) -> None:
        super().__init__(layout)
        self.label_dropout = label_dropout

    @property
    def blocks(self) -> Iterator[UNetBlock]:
        """Every residual block, in order of evaluation."""
        return (module for module in (*self.enc.values(), *self.dec.values()) if isinstance(module, UNetBlock))

    @property
    def encoder_blocks(self) -> Iterator[UNetBlock]:
        """Those of the encoder."""
        return (module for module in self.enc.values() if isinstance(module, UNetBlock))

    @property
    def first_weight(self) -> Tensor:
        """See `Backbone.first_weight`."""
        return stored_weight(self.map_layer0)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        logits: Logits = "none",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """F (B, out_channels, R, R) in the dtype of x.

        The labels have one dtype of at least float32, in which the mapping network computes. Labels of None add nothing
        to the embedding.

        Args:
            x: (B, in_channels, R, R), in the compute dtype.
            noise_labels: (B,) or (1,).
            class_labels: (B or 1, label_dim).
            augment_labels: (B or 1, augment_dim).
            logits: "too": (F, `encoder_logits`); "alone": these, for which no decoder is run.
        """
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        emb = self._embed(noise_labels, class_labels, augment_labels)
        blocks = list(self.encoder_blocks if logits == "alone" else self.blocks)
        entering = iter(enter_together(blocks, emb, x))
        x, skips = self._encode(x, emb, entering)
        seen = None if logits == "none" else encoder_logits(x)
        if seen is not None and logits == "alone":
            return seen
        out = self._finish(*self._decode(x, emb, entering, skips))
        return out if seen is None else (out, seen)

    @abstractmethod
    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The embedding (B or 1, emb_channels) that enters every block."""

    @abstractmethod
    def _finish(self, x: Tensor, image: Tensor | None) -> Tensor:
        """F, from the last activation and the image of the auxiliary entries, if there are any."""

    @abstractmethod
    def _make_other(self, entry: Entry) -> nn.Module:
        """The module of an entry that is no residual block."""

    def _make(self, make_block: BlockFactory) -> None:
        def make(entry: Entry) -> nn.Module:
            if entry.kind != "block":
                return self._make_other(entry)
            return make_block(
                entry.in_channels, entry.out_channels, up=entry.up, down=entry.down, attention=entry.attention
            )

        def make_all(entries: Sequence[Entry]) -> nn.ModuleDict:
            return nn.ModuleDict({entry.name: make(entry) for entry in entries})

        self.enc = make_all(self.layout.encoder)
        self.dec = make_all(self.layout.decoder)

    def _dropped(self, class_labels: Tensor) -> Tensor:
        """While training, whole rows become zero with probability `label_dropout`."""
        if not (self.training and self.label_dropout):
            return class_labels
        kept = torch.rand(class_labels.shape[0], 1, device=class_labels.device) >= self.label_dropout
        return class_labels * kept.to(class_labels.dtype)

    def _encode(self, x: Tensor, emb: Tensor, entering: Iterator[Entering]) -> tuple[Tensor, list[Tensor]]:
        """The innermost activation and those that the decoder takes up again, the newest last."""
        skips: list[Tensor] = []
        aux = x
        for entry, module in zip(self.layout.encoder, self.enc.values(), strict=True):
            if entry.kind == "aux_down":
                aux = module(aux)
            elif entry.kind == "aux_skip":
                x = skips[-1] = _joined(x, module, aux)
            elif entry.kind == "aux_residual":
                x = skips[-1] = aux = _joined(x, module, aux, divisor=math.sqrt(2))
            else:
                x = self._run(module, emb, next(entering), x) if entry.kind == "block" else module(x)
                skips.append(x)
        return x, skips

    def _decode(
        self, x: Tensor, emb: Tensor, entering: Iterator[Entering], skips: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The last activation, and the sum of the images that auxiliary entries made (None where there are none)."""
        image: Tensor | None = None
        normed = x
        for entry, module in zip(self.layout.decoder, self.dec.values(), strict=True):
            if entry.kind == "aux_up":
                image = module(image)
            elif entry.kind == "aux_norm":
                normed = module(x, silu=True)
            elif entry.kind == "aux_conv":
                part = module(normed)
                image = part if image is None else image + part
            else:
                parts = (x, skips.pop()) if entry.skip_channels else (x,)
                x = self._run(module, emb, next(entering), *parts)
        return x, image

    def _run(self, block: nn.Module, emb: Tensor, entering: Entering, *parts: Tensor) -> Tensor:
        """A residual block of the concatenated `parts`."""
        assert isinstance(block, UNetBlock)
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return _of_parts(block, emb, entering, *parts)
        # The concatenation is made again too: its parts are the outputs of other blocks, which are kept anyway.
        tensors = (emb, entering.projected, entering.bias, *parts)
        # And layer by layer: what is made again ends before the last one, but as one function with it.
        given = block, emb, entering._replace(layers=None), *parts
        return self._checkpointed(_of_parts, block, block.dropout, *given, tensors=tensors)


def _of_parts(block: UNetBlock, emb: Tensor, entering: Entering, *parts: Tensor) -> Tensor:
    x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    out: Tensor
    # Where its own layers may be bypassed, so may what PyTorch asks before it calls a module that nobody looks at.
    if entering.layers is None or type(block) is not UNetBlock or is_watched(block) or not is_plain_eager():
        out = block(x, emb, entering)
    else:
        out = block.forward(x, emb, entering)
    return out


def _joined(x: Tensor, module: nn.Module, aux: Tensor, *, divisor: float = 1.0) -> Tensor:
    """(x + module(aux)) / divisor."""
    part, bias = without_bias(module, aux)
    if bias is not None:
        return residual(x, part, bias, scale=1 / divisor)
    return x + part if divisor == 1 else (x + part) / divisor
