"""Rows of the table of coverage: ways in which a network uses its parameters."""

import warnings

import torch
import torch.nn.functional as F
from coverage_rows import CLASSES, EXAMPLES, STEPS, Pick, Row, no_tensor, numbers, tokens
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


class Graph(nn.Module):
    """Graph convolutions (Kipf and Welling 2017) on a ring of nodes: matrix products with parameters of its own."""

    def __init__(self, nodes=6):
        super().__init__()
        ring = torch.eye(nodes) + torch.eye(nodes).roll(1, 0) + torch.eye(nodes).roll(-1, 0)
        self.register_buffer("adjacency", ring / 3)
        self.first, self.second = nn.Parameter(torch.randn(4, 8) / 2), nn.Parameter(torch.randn(8, CLASSES) / 3)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        hidden = (self.adjacency @ x @ self.first + self.shift).relu()
        return (self.adjacency @ hidden @ self.second).mean(1)


class Listed(nn.Module):
    """Layers that the forward pass reaches through a Python list and a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, CLASSES)
        self.first, self.rest = [self.a], {"head": self.b}

    def forward(self, x):
        return self.rest["head"](self.first[0](x).relu())


class Functional(nn.Module):
    """Layers whose weights torch's functions get, one of them the wrong way round."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        hidden = F.linear(x, self.a.weight, self.a.bias).relu()
        return F.linear(input=F.linear(hidden, self.a.weight.t()) @ self.a.weight.t(), weight=self.b.weight)


class Twice(nn.Module):
    """A layer that a forward pass uses twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.b(self.a(self.a(x).relu())).relu() + self.b(x))


class Tied(nn.Module):
    """The next word: the output layer has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.hidden(self.embed(x)).tanh().mean(1))


class Autoencoder(nn.Module):
    """A decoder with the encoder's weight, transposed: a layer's weight that another function uses afterwards."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Linear(4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(F.linear(self.encode(x).tanh(), self.encode.weight.t()))


class InPlace(nn.Module):
    """Changes its own input, and what its layers give, in place."""

    def __init__(self):
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        x.mul_(2).clamp_(-3, 3)
        hidden = self.a(x)
        hidden[:, 0] = 0.5
        hidden += 1
        return self.b(self.relu(hidden))


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al. 2019): the convolution has a function of the weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Several(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, CLASSES)

    def forward(self, left, right):
        return self.head(torch.cat([self.a(left), self.b(right)], 1).relu())


class Split(nn.Module):
    """A network of two inputs, as one of a tensor that has both."""

    def __init__(self):
        super().__init__()
        self.net = Several()

    def forward(self, x):
        return self.net(x[:, :3], right=x[:, 3:])


class Branches(nn.Module):
    """A dict of outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.classes, self.value = nn.Linear(4, 8), nn.Linear(8, CLASSES), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.a(x).relu()
        return {"classes": self.classes(hidden), "value": self.value(hidden)}


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem, self.body = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1))
        self.recurrent, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        hidden = checkpoint(self.body, self.stem(x), use_reentrant=self.use_reentrant)
        states = checkpoint(self._twice, hidden, use_reentrant=self.use_reentrant)
        return self.head(states[:, -1])

    def _twice(self, hidden):
        return self.recurrent(hidden[:, None].expand(-1, 2, -1))[0]


def _hooks(norm, layer):
    with warnings.catch_warnings():
        # Their successors are rows, too.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(norm(layer), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def _both_outputs(outputs):
    return outputs["classes"] + outputs["value"]


def _use(name, build, inputs, sites, parameters, own_noise, **more):
    return Row("Uses of parameters", name, build, inputs, sites, parameters, own_noise, **more)


VECTOR, IMAGE = numbers(4), numbers(1, 6, 6)
NORMED = (3, 36 + 4 + 192)

ROWS = [
    _use("parameters of its own (a graph convolution)", Graph, numbers(6, 4), 2, 56, 0),
    _use("layers in a list and a dict", Listed, VECTOR, 2, 56, 2),
    _use("F.linear(x, layer.weight)", Functional, VECTOR, 2, 56, 1),
    _use("a layer used twice", Twice, VECTOR, 3, 44, 3),
    _use("a tied embedding and output", Tied, tokens(6, 7), 2, 44, 1),
    _use("a layer's weight, transposed later", Autoencoder, VECTOR, 2, 24, 1),
    _use("in-place operations", InPlace, VECTOR, 2, 56, 2),
    _use("weight standardization", lambda: _hooks(nn.Identity(), Standardized(1, 4, 3)), IMAGE, 2, 228, 1),
    _use("weight_norm, a parametrization", lambda: _hooks(parametrizations.weight_norm, nn.Conv2d(1, 4, 3)),
         IMAGE, *NORMED, 1),
    _use("weight_norm, a hook", lambda: _hooks(weight_norm, nn.Conv2d(1, 4, 3)), IMAGE, *NORMED, 1),
    _use("spectral_norm, a parametrization", lambda: _hooks(parametrizations.spectral_norm, nn.Conv2d(1, 4, 3)),
         IMAGE, 2, 228, 1),
    _use("spectral_norm, a hook", lambda: _hooks(spectral_norm, nn.Conv2d(1, 4, 3)), IMAGE, 2, 228, 1),
    _use("gradient checkpointing", lambda: Checkpointed(use_reentrant=False), VECTOR, 5, 504, 3),
    _use("gradient checkpointing, reentrant", lambda: Checkpointed(use_reentrant=True), VECTOR, 5, 504, 3,
         refused=dict.fromkeys((*STEPS, "save"), "the data would not train the random parameter")),
    _use("several inputs, of one tensor", Split, numbers(5), 3, 44, 3),
    _use("several inputs", Several, lambda: (torch.randn(EXAMPLES, 3), torch.randn(EXAMPLES, 2)), 3, 44, 3),
    _use("a dict of outputs, one picked", lambda: Pick(Branches(), _both_outputs), VECTOR, 3, 64, 3),
    _use("a dict of outputs", Branches, VECTOR, 3, 64, 3, refused=no_tensor("dict")),
]  # fmt: skip
