"""Whole models of the kinds that people train, tiny: one class each.

``forward`` takes a callback ``tap(h, name, rows)`` and calls it where the documentation puts a tap under
taps="nonlinearity". By default it does nothing, so that a wrapped model finds its taps by itself;
`reference_dfa.reference_gradients` cuts the network there. ``name`` is what the tap has to be called, and ``rows``
tells which dimension of h goes with each leading dimension of the output.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa


def untapped(h: Tensor, name: str, rows: tuple[int, ...] = (0,)) -> Tensor:
    return h


def new_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def glu(h: Tensor) -> Tensor:
    a, gate = h.chunk(2, -1)
    return a * torch.sigmoid(gate)


FORMULAS = {
    "swish": lambda h: h * torch.sigmoid(h),
    "swish_method": lambda h: h.sigmoid().mul(h),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "new_gelu": new_gelu,
    "mish": lambda h: h * torch.tanh(F.softplus(h)),
    "glu": glu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sine": lambda h: torch.sin(3 * h),
    "relu as a clamp": lambda h: h.clamp(min=0),
    "relu as a clamp, in place": lambda h: h.clamp_min_(0),
    "relu6 as a clip": lambda h: torch.clip(h, 0, 6),
    "hardtanh as a clamp": lambda h: torch.clamp(input=h, min=-1, max=1),
    "expit": torch.special.expit,
}
"""Activations written out. The tap is at the result of each."""


class FormulaMLP(nn.Module):
    """[b, 6] -> [b, 3] through two hidden layers with an activation written as a formula."""

    def __init__(self, formula="swish"):
        super().__init__()
        self.formula = FORMULAS[formula]
        wide = 2 if formula == "glu" else 1
        self.first, self.second, self.last = nn.Linear(6, 8 * wide), nn.Linear(8, 7 * wide), nn.Linear(7, 3)

    def forward(self, x, tap=untapped):
        h = tap(self.formula(self.first(x)), "first")
        h = tap(self.formula(self.second(h)), "second")
        return self.last(h)


class GatedMLP(nn.Module):
    """[b, 6] -> [b, 3]; SwiGLU as in LLaMA: a layer without an activation multiplies one with; both have one tap."""

    def __init__(self, gate=F.silu):
        super().__init__()
        self.gate = gate
        self.first, self.first_up, self.first_down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 7)
        self.second, self.second_up, self.last = nn.Linear(7, 9), nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x, tap=untapped):
        h = tap(self.gate(self.first(x)) * self.first_up(x), "first")
        x = self.first_down(h)
        h = tap(self.second_up(x).mul(self.gate(self.second(x))), "second")
        return self.last(h)


class SquaredReLU(nn.Module):
    """[b, 6] -> [b, 3]. Nothing carries the layer's output around relu, so the tap is at relu and the square behind."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x, tap=untapped):
        h = tap(F.relu(self.first(x)), "first") ** 2
        h = tap(F.relu(self.second(h)), "second").square()
        return self.last(h)


PRODUCTS = {
    "matmul": lambda x, W: x @ W,
    "matmul_of_a_view": lambda x, W: torch.matmul(x, W.view(-1).view(W.shape)),
    "einsum": lambda x, W: torch.einsum("bi,io->bo", x, W),
    "einsum_of_a_view": lambda x, W: torch.einsum("bi,oi->bo", x, W.t()),
    "mm": lambda x, W: torch.mm(x, W),
    "addmm": lambda x, W: torch.addmm(W[0], x, W),
    "parameter_first": lambda x, W: (W.t() @ x.t()).t(),
    "bmm": lambda x, W: torch.bmm(x[:, None], W.expand(x.shape[0], *W.shape))[:, 0],
    "linear": lambda x, W: F.linear(x, W.t()),
}


class ProductMLP(nn.Module):
    """[b, 6] -> [b, 3] from bare parameters, the output layer included."""

    def __init__(self, product="matmul"):
        super().__init__()
        self.product = PRODUCTS[product]
        self.first, self.last = Matrix(6, 8), Matrix(8, 3)

    def forward(self, x, tap=untapped):
        h = tap(torch.tanh(self.product(x, self.first.W)), "first")
        return self.product(h, self.last.W)


class Matrix(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.W = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))


class NeRF(nn.Module):
    """Positions [n, 9] and directions [n, 4] -> colour and density [n, 4], with a skip that concatenates the input."""

    def __init__(self):
        super().__init__()
        self.enter, self.hidden, self.skip = nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(17, 8)
        self.density, self.feature = nn.Linear(8, 1), nn.Linear(8, 8)
        self.view, self.colour = nn.Linear(12, 5), nn.Linear(5, 3)

    def forward(self, x, direction, tap=untapped):
        h = tap(F.relu(self.enter(x)), "enter")
        h = tap(F.relu(self.hidden(h)), "hidden")
        h = tap(F.relu(self.skip(torch.cat([x, h], -1))), "skip")
        density, feature = self.density(h), self.feature(h)
        v = tap(F.relu(self.view(torch.cat([feature, direction], -1))), "view")
        return torch.cat([self.colour(v), density], -1)


class DeepFM(nn.Module):
    """Categorical fields [b, 4] -> a click's logit [b]. The embeddings go around the deep part's taps."""

    def __init__(self):
        super().__init__()
        self.linear, self.embedding = nn.Embedding(20, 1), nn.Embedding(20, 3)
        self.deep1, self.deep2, self.deep3 = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, fields, tap=untapped):
        v = self.embedding(fields)
        fm = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True)
        h = tap(F.relu(self.deep1(v.flatten(1))), "deep1")
        h = tap(F.relu(self.deep2(h)), "deep2")
        return (self.linear(fields).sum(1) + fm + self.deep3(h)).squeeze(1)


class GraphConvolution(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x, adjacency):
        return adjacency @ (x @ self.weight) + self.bias


class GCN(nn.Module):
    """Nodes [n, 6] and their adjacency [n, n] -> classes of the nodes [n, 3] (Kipf and Welling)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = GraphConvolution(6, 8), GraphConvolution(8, 5), GraphConvolution(5, 3)

    def forward(self, x, adjacency, tap=untapped):
        h = tap(F.relu(self.conv1(x, adjacency)), "conv1")
        h = tap(F.relu(self.conv2(h, adjacency)), "conv2")
        return self.conv3(h, adjacency)


class GPTBlock(nn.Module):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.project = linear(8, 24), linear(8, 8)
        self.enlarge, self.reduce = linear(8, 10), linear(10, 8)

    def forward(self, x, name, tap):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(b, t, 8))
        h = tap(new_gelu(self.enlarge(self.norm2(x))), f"{name}.enlarge", (0, 1))
        return x + self.reduce(h)


class Conv1D(nn.Module):
    """GPT-2's layer: a Linear with its weight the other way round, by addmm over all positions at once."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], y.size(-1))


class GPT(nn.Module):
    """Tokens [b, T] -> logits of the next ones [b, T, 11]; GPT-2 is its form with Conv1D and tied embeddings."""

    def __init__(self, linear=nn.Linear, tied=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([GPTBlock(linear) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens, tap=untapped):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for i, block in enumerate(self.blocks):
            x = block(x, f"blocks.{i}", tap)
        return self.head(self.norm(x))


class EncoderLayer(nn.TransformerEncoderLayer):
    """PyTorch's own, with places for the callback behind its attention and its feed-forward part's activation."""

    name, tap, tap_rows = "", staticmethod(untapped), (1,)

    def _ff_block(self, x):
        x = self.tap(x, f"{self.name}.self_attn", self.tap_rows)
        h = self.tap(self.activation(self.linear1(x)), f"{self.name}.linear1", self.tap_rows)
        return self.dropout2(self.linear2(h))


class Bert(nn.Module):
    """Tokens [b, T] -> labels of the tokens [b, T, 5], or of the whole [b, 5]; its encoder has the sequence first."""

    def __init__(self, pooled=False):
        super().__init__()
        self.pooled, self.tokens, self.norm = pooled, nn.Embedding(11, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList([EncoderLayer(8, 2, 10, dropout=0.0) for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, tokens, tap=untapped):
        x = self.norm(self.tokens(tokens)).transpose(0, 1)
        for i, layer in enumerate(self.layers):
            layer.name, layer.tap, layer.tap_rows = f"layers.{i}", tap, (1,) if self.pooled else (1, 0)
            x = layer(x)
        x = x.transpose(0, 1)
        return self.head(x.mean(1) if self.pooled else x)


class SequenceFirst(nn.Module):
    """[b, T, 6] -> [b, T, 4], or [b, 4] from the mean; its hidden layers see [T, b, …]."""

    def __init__(self, pooled=False):
        super().__init__()
        self.pooled = pooled
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x, tap=untapped):
        rows = (1,) if self.pooled else (1, 0)
        h = tap(torch.tanh(self.first(x.transpose(0, 1))), "first", rows)
        h = tap(F.gelu(self.second(h)), "second", rows).transpose(0, 1)
        return self.last(h.mean(1) if self.pooled else h)


class UNet(nn.Module):
    """Noisy images [b, 2, 6, 6] and times [b, 1] -> the noise [b, 2, 6, 6]."""

    def __init__(self):
        super().__init__()
        self.time1, self.time2 = nn.Linear(1, 4), nn.Linear(4, 5)
        self.down, self.middle = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.up, self.last = nn.Conv2d(9, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.norm = nn.GroupNorm(1, 4)

    def forward(self, x, t, tap=untapped):
        time = self.time2(tap(F.silu(self.time1(t)), "time1"))
        skip = tap(F.silu(self.norm(self.down(x))), "down")
        h = self.middle(F.avg_pool2d(skip, 2)) + time[:, :, None, None]
        h = F.interpolate(tap(F.silu(h), "middle"), scale_factor=2)
        h = tap(F.silu(self.up(torch.cat([h, skip], 1))), "up")
        return self.last(h)


class Segmentation(nn.Module):
    """Images [b, 3, 6, 6] -> one logit a pixel [b, 6, 6]."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1, stride=2)
        self.last = nn.ConvTranspose2d(5, 1, 2, stride=2)

    def forward(self, x, tap=untapped):
        h = tap(F.relu(self.first(x)), "first")
        h = tap(F.relu(self.second(h)), "second")
        return self.last(h).squeeze(1)


class BiLSTMTagger(nn.Module):
    """Tokens [b, T] -> tags [b, T, 5]. The tap is where the LSTM's states, activated or not, enter the Linear."""

    def __init__(self, activation=lambda h: h):
        super().__init__()
        self.activation = activation
        self.tokens, self.last = nn.Embedding(11, 6), nn.Linear(8, 5)
        self.lstm = nn.LSTM(6, 4, batch_first=True, bidirectional=True)

    def forward(self, tokens, tap=untapped):
        h, _ = self.lstm(self.tokens(tokens))
        return self.last(tap(self.activation(h), "lstm", (0, 1)))


class GRUClassifier(nn.Module):
    """[b, T, 6] -> [b, 3] from the last state of two GRUs (or RNNs), sequence first."""

    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.first, self.second, self.last = kind(6, 5), kind(5, 4), nn.Linear(4, 3)

    def forward(self, x, tap=untapped):
        h, _ = self.first(x.transpose(0, 1))
        h, _ = self.second(tap(h, "first", (1,)))
        return self.last(tap(h[-1], "second"))


class AttentionPooling(nn.Module):
    """A set [b, T, 8] -> [b, 3]: attention between its elements, their mean, a Linear."""

    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, tap=untapped):
        h, _ = self.attention(x, x, x, need_weights=False)
        return self.last(tap(h.mean(1), "attention"))


class Discriminator(nn.Module):
    """Images [b, 3, 8, 8] -> a logit each [b] (DCGAN)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.Conv2d(4, 5, 4, 2, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(5), nn.Conv2d(5, 1, 2, bias=False)

    def forward(self, x, tap=untapped):
        h = tap(F.leaky_relu(self.first(x), 0.2), "first")
        h = tap(F.leaky_relu(self.norm(self.second(h)), 0.2), "second")
        return self.last(h).flatten()


class VAE(nn.Module):
    """[b, 9] and noise [b, 2] -> its reconstruction [b, 9]; keeps mu and logvar [b, 2] for the KL term."""

    def __init__(self):
        super().__init__()
        self.encode, self.moments = nn.Linear(9, 7), nn.Linear(7, 4)
        self.decode, self.last = nn.Linear(2, 6), nn.Linear(6, 9)

    def forward(self, x, noise, tap=untapped):
        h = tap(F.relu(self.encode(x)), "encode")
        self.mu, self.logvar = self.moments(h).chunk(2, -1)
        z = self.mu + torch.exp(0.5 * self.logvar) * noise
        return self.last(tap(F.relu(self.decode(z)), "decode"))


def l1(h: Tensor) -> Tensor:
    return 0.1 * h.abs().sum(1).mean()


class SparseAutoencoder(nn.Module):
    """[b, 9] -> its reconstruction [b, 9]; keeps its code h [b, 12], and what l1 makes of it if ``inside``."""

    def __init__(self, inside=False, inplace=False):
        super().__init__()
        self.inside, self.inplace = inside, inplace
        self.first, self.encode, self.decode = nn.Linear(9, 8), nn.Linear(8, 12), nn.Linear(12, 9)

    def forward(self, x, tap=untapped):
        h = tap(torch.tanh(self.first(x)), "first")
        self.h = F.relu(self.encode(h), inplace=self.inplace)
        if self.inside and tap is untapped:
            self.penalty = dfa.side_loss(self.h, l1)
        return self.decode(tap(self.h, "encode"))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x, name, tap):
        around = self.shortcut(x)
        h = tap(F.relu(self.bn1(self.conv1(x))), f"{name}.conv1")
        return tap(F.relu(self.bn2(self.conv2(h)) + around), f"{name}.conv2")


class ResNet(nn.Module):
    """Images [b, 3, 6, 6] -> [b, 4]. Every stream is cut where it is added, so nothing flows past a tap."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.block1, self.block2, self.fc = BasicBlock(4, 4, 1), BasicBlock(4, 6, 2), nn.Linear(6, 4)

    def forward(self, x, tap=untapped):
        h = tap(F.relu(self.bn(self.stem(x))), "stem")
        h = self.block2(self.block1(h, "block1", tap), "block2", tap)
        return self.fc(h.mean((2, 3)))


class LoRALinear(nn.Module):
    """A frozen Linear and a trained product of two narrow matrices beside it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, inputs) / math.sqrt(inputs))
        self.B = nn.Parameter(torch.randn(outputs, 2) / math.sqrt(2))

    def forward(self, x):
        return self.base(x) + 0.5 * (x @ self.A.t()) @ self.B.t()


class LoRA(nn.Module):
    """[b, 6] -> [b, 3]."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = LoRALinear(6, 8), LoRALinear(8, 7), LoRALinear(7, 3)

    def forward(self, x, tap=untapped):
        h = tap(F.relu(self.first(x)), "first")
        return self.last(tap(F.relu(self.second(h)), "second"))


class MLPMixer(nn.Module):
    """Patches [b, 5, 6] -> classes [b, 3], or of every patch [b, 5, 3]; tokens are mixed in between."""

    def __init__(self, dense=False):
        super().__init__()
        self.dense, self.norm1, self.norm2 = dense, nn.LayerNorm(6), nn.LayerNorm(6)
        self.token1, self.token2 = nn.Linear(5, 7), nn.Linear(7, 5)
        self.channel1, self.channel2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x, tap=untapped):
        h = tap(F.gelu(self.token1(self.norm1(x).transpose(1, 2))), "token1")
        x = x + self.token2(h).transpose(1, 2)
        x = x + self.channel2(tap(F.gelu(self.channel1(self.norm2(x))), "channel1"))
        return self.head(x if self.dense else x.mean(1))


class ConvTagger(nn.Module):
    """Tokens [b, T] -> tags [b, T, 3] by convolutions over time: taps [b, C, T], of which T goes with the output's."""

    def __init__(self, channels):
        super().__init__()
        self.tokens, self.last = nn.Embedding(11, 6), nn.Linear(channels, 3)
        self.conv1, self.conv2 = nn.Conv1d(6, channels, 3, padding=1), nn.Conv1d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, tokens, tap=untapped):
        h = self.tokens(tokens).transpose(1, 2)
        h = tap(F.relu(self.norm(self.conv1(h))), "conv1", (0, 2))
        h = tap(torch.tanh(self.conv2(h)), "conv2", (0, 2))
        return self.last(h.transpose(1, 2))


class MultiHead(nn.Module):
    """[b, 6] -> {"label": [b, 3], "place": [b, 2]} from one trunk."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 7)
        self.label, self.place = nn.Linear(7, 3), nn.Linear(7, 2)

    def forward(self, x, tap=untapped):
        h = tap(F.relu(self.first(x)), "first")
        h = tap(F.relu(self.second(h)), "second")
        return {"label": self.label(h), "place": self.place(h)}


class Pairs(nn.Module):
    """Two things [b, 6] and [b, 5] -> [b, 3], through a Bilinear in the middle and one at the end."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(5, 3)
        self.middle, self.last = nn.Bilinear(4, 3, 7), nn.Bilinear(7, 3, 3)

    def forward(self, x, y, tap=untapped):
        u, v = tap(torch.tanh(self.left(x)), "left"), tap(torch.tanh(self.right(y)), "right")
        return self.last(tap(F.relu(self.middle(u, v)), "middle"), v)
