"""The large networks whose feedback is counted: AlexNet, VGG-16, ResNet-50, ViT-B/16 and GPT-2, with their usual sizes.

On the meta device none of them takes memory. VGG-16 also comes narrower, for tests that compute with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG16_CHANNELS = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def alexnet(classes: int = 1000) -> nn.Sequential:
    """Krizhevsky's network in the one-column form of 2014, for 224 x 224 images."""
    return nn.Sequential(
        *_convolution(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *_convolution(64, 192, 5, padding=2),
        nn.MaxPool2d(3, 2),
        *_convolution(192, 384, 3, padding=1),
        *_convolution(384, 256, 3, padding=1),
        *_convolution(256, 256, 3, padding=1),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        *_classifier(256 * 6 * 6, 4096, classes, dropout_first=True),
    )


def vgg16(classes: int = 1000, side: int = 224, narrower: int = 1) -> nn.Sequential:
    """VGG-16 (configuration D) for side x side images, side a multiple of 32; every width divided by `narrower`."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in VGG16_CHANNELS:
        for channels in stage:
            layers += _convolution(inputs, channels // narrower, 3, padding=1)
            inputs = channels // narrower
        layers.append(nn.MaxPool2d(2))
    features = inputs * (side // 32) ** 2
    return nn.Sequential(*layers, nn.Flatten(), *_classifier(features, 4096 // narrower, classes, dropout_first=False))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU(inplace=True)]


def _classifier(features: int, units: int, classes: int, dropout_first: bool) -> list[nn.Module]:
    layers = [nn.Linear(features, units), nn.ReLU(inplace=True)], [nn.Linear(units, units), nn.ReLU(inplace=True)]
    ordered = [
        part for layer in layers for part in ([nn.Dropout(), *layer] if dropout_first else [*layer, nn.Dropout()])
    ]
    return [*ordered, nn.Linear(units, classes)]


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1 x 1, 3 x 3 with the stride, 1 x 1, and what it adds to."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.first = _normed(inputs, width, 1)
        self.second = _normed(width, width, 3, stride)
        self.third = _normed(width, outputs, 1)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else _normed(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.second(F.relu(self.first(x))))
        return F.relu(self.third(h) + self.shortcut(x))


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """ResNet-50 for 224 x 224 images, with the stride in the 3 x 3 convolutions."""
    blocks: list[nn.Module] = []
    inputs = 64
    for stage, (width, count) in enumerate(RESNET50_STAGES):
        for i in range(count):
            blocks.append(Bottleneck(inputs, width, 2 if stage and not i else 1))
            inputs = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(_normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks, *head)


class Attention(nn.Module):
    """Self-attention with one Linear for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return result


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, causal: bool, gelu: nn.GELU, eps: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class VisionTransformer(nn.Module):
    """ViT-B/16 for 224 x 224 images: [b, 3, 224, 224] to [b, classes]."""

    def __init__(self, classes: int = 1000, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + 14 * 14, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, False, nn.GELU(), 1e-6) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1) + self.positions
        result: Tensor = self.head(self.norm(self.blocks(h))[:, 0])
        return result


class GPT2(nn.Module):
    """GPT-2 124M: tokens [b, T] to logits [b, T, vocabulary], whose layer shares its weight with the embedding."""

    def __init__(
        self, vocabulary: int = 50257, context: int = 1024, width: int = 768, depth: int = 12, heads: int = 12
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, True, nn.GELU("tanh"), 1e-5) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.norm(self.blocks(h)), self.tokens.weight)


@dataclass(frozen=True)
class LargeNetwork:
    """A network, what one row of its input looks like, and how many components its error has."""

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    error_size: int
    parameters: int

    def on_meta(self) -> tuple[nn.Module, Tensor]:
        """The network and a batch of one, without memory."""
        with torch.device("meta"):
            tokens = len(self.input_shape) == 1
            shape = (1, *self.input_shape)
            x = torch.zeros(shape, dtype=torch.long) if tokens else torch.zeros(shape)
            return self.make(), x


IMAGE = (3, 224, 224)
LARGE_NETWORKS = (
    LargeNetwork("AlexNet", alexnet, IMAGE, 1000, 61_100_840),
    LargeNetwork("VGG-16", vgg16, IMAGE, 1000, 138_357_544),
    LargeNetwork("ResNet-50", resnet50, IMAGE, 1000, 25_557_032),
    LargeNetwork("ViT-B/16", VisionTransformer, IMAGE, 1000, 86_567_656),
    LargeNetwork("GPT-2 124M", GPT2, (1024,), 50_257, 124_439_808),
)
