"""Rows of the table of coverage: the kinds of layers that torch has."""

import torch
from coverage_rows import CLASSES, Row, numbers, tokens
from torch import nn

PADDINGS = ("zeros", "reflect", "replicate", "circular")


class Recurrent(nn.Module):
    """A recurrent layer, and the classes from the mean of its states."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.layer = kind(3, 5, batch_first=True, **settings)
        self.head = nn.Linear((2 if self.layer.bidirectional else 1) * (self.layer.proj_size or 5), CLASSES)

    def forward(self, x):
        return self.head(self.layer(x)[0].mean(1))


class Packed(Recurrent):
    """Sequences of several lengths."""

    def forward(self, x):
        lengths = torch.arange(len(x), 0, -1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(states.sum(1))


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(3, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(2, 3, CLASSES)

    def forward(self, x):
        return self.layer(x[:, :2], x[:, 2:])


class Attention(nn.Module):
    """Self-attention, or with keys and values of other sizes, whose projections are parameters of their own."""

    def __init__(self, **sizes):
        super().__init__()
        self.sizes = sizes
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True, **sizes), nn.Linear(8, CLASSES)

    def forward(self, x):
        others = (x[..., : self.sizes[name]] if name in self.sizes else x for name in ("kdim", "vdim"))
        return self.head(self.attention(x, *others, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    def __init__(self, norm_first=False):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)).mean(1))


class Decoder(nn.Module):
    """Attention to another sequence, under a causal mask."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layer(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True).mean(1))


def _convolution(kind, dimensions, **settings):
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
    layer = kind(2, 4, 3, stride=2, groups=2, **settings)
    return nn.Sequential(layer, nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(4, CLASSES))


def _paddings(kind, dimensions):
    layers = [kind(2, 2, 3, padding=1, padding_mode=mode) for mode in PADDINGS]
    layers += [kind(2, 2, 3, padding="same"), kind(2, 2, 3, padding="valid")]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * 3**dimensions, CLASSES))


def _normed(norm):
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def _layer(name, build, inputs, sites, parameters, own_noise, **more):
    return Row("Layers", name, build, inputs, sites, parameters, own_noise, **more)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SEQUENCE, IMAGE, WORDS = numbers(5, 3), numbers(1, 6, 6), tokens(6, 7)

ROWS = [
    _layer("Linear", lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES)), numbers(4), 2, 56, 2),
    *(
        _layer(
            kind.__name__, lambda kind=kind, d=d: _convolution(kind, d, dilation=2), numbers(2, *[7] * d),
            2, 4 * 3**d + 12, 2,
        )
        for d, kind in enumerate(CONVOLUTIONS, 1)
    ),
    *(
        _layer(
            kind.__name__, lambda kind=kind, d=d: _convolution(kind, d, output_padding=1), numbers(2, *[3] * d),
            2, 4 * 3**d + 12, 2,
        )
        for d, kind in enumerate(TRANSPOSED, 1)
    ),
    *(
        _layer(
            f"{kind.__name__}, every padding", lambda kind=kind, d=d: _paddings(kind, d), numbers(2, *[5] * d),
            7, 6 * 4 * 3**d + 6 * 3**d, 7,
        )
        for d, kind in enumerate(CONVOLUTIONS, 1)
    ),
    _layer("Embedding", lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(24, CLASSES)),
           WORDS, 2, 100, 1),
    _layer("EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(7, 4, mode="mean"), nn.Linear(4, CLASSES)),
           WORDS, 2, 40, 1),
    _layer("Bilinear", Bilinear, numbers(5), 1, 18, 0),
    _layer("RNN", lambda: Recurrent(nn.RNN), SEQUENCE, 3, 55, 1),
    _layer("LSTM", lambda: Recurrent(nn.LSTM), SEQUENCE, 3, 175, 1),
    _layer("LSTM, two layers, both directions, projected",
           lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=2, dropout=0.1),
           SEQUENCE, 13, 492, 1),
    _layer("LSTM of packed sequences", lambda: Packed(nn.LSTM), SEQUENCE, 3, 175, 1),
    _layer("GRU", lambda: Recurrent(nn.GRU), SEQUENCE, 3, 135, 1),
    _layer("RNNCell", lambda: Cell(nn.RNNCell), SEQUENCE, 3, 55, 1),
    _layer("LSTMCell", lambda: Cell(nn.LSTMCell), SEQUENCE, 3, 175, 1),
    _layer("GRUCell", lambda: Cell(nn.GRUCell), SEQUENCE, 3, 135, 1),
    _layer("MultiheadAttention", Attention, numbers(6, 8), 3, 280, 1),
    _layer("MultiheadAttention with kdim and vdim", lambda: Attention(kdim=4, vdim=6), numbers(6, 8), 5, 232, 1),
    _layer("TransformerEncoderLayer", Transformer, WORDS, 6, 592, 3),
    _layer("TransformerEncoderLayer, norm_first", lambda: Transformer(norm_first=True), WORDS, 6, 592, 3),
    _layer("TransformerDecoderLayer", Decoder, numbers(6, 8), 7, 792, 3),
    _layer("BatchNorm by select", lambda: _normed(nn.BatchNorm2d(4)), IMAGE, 2, 8, 0, select=nn.BatchNorm2d),
    _layer("GroupNorm by select", lambda: _normed(nn.GroupNorm(2, 4)), IMAGE, 2, 8, 0, select=nn.GroupNorm),
    _layer("LayerNorm by select", lambda: _normed(nn.LayerNorm([4, 4, 4])), IMAGE, 2, 128, 0, select=nn.LayerNorm),
    _layer("BatchNorm and all weights and biases", lambda: _normed(nn.BatchNorm2d(4)), IMAGE, 6, 243, 2, select="*"),
]  # fmt: skip
