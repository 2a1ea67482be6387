"""Times a training step and a predictive draw of an LSTM and a small Vision Transformer beside deterministic ones."""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from contenders import NUM_DATA, deterministic, ours
from ppl_bnn import Classifier, MeanFieldNormal, bayesian
from ppl_bnn.native.memory import keep_freed_memory
from ppl_bnn.prediction.draws import coherent
from ppl_bnn.prediction.plain import NotTraceable, plain
from turns import in_turns, ratios

_HELP = """
The LSTM has 64 units over 28 steps of 28 numbers. The transformer (torchvision's) has 2 layers, 4 heads and width 64,
on 28x28 images in patches of 7. `branch` is 784-512-10, and looks at its values. In a round each contender runs once,
in a new random order. Ratios are of times in one round: of steps to the deterministic step with fused Adam, of draws
to one forward pass of the deterministic network.
"""


class Series(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(28, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 28, 28] -> [N, 10]."""
        found: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return found


class Branch(nn.Module):
    """A network that torch.fx cannot trace, for it looks at its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(784, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 28, 28] -> [N, 10]."""
        x = self.hidden(x.flatten(1)).relu()
        found: Tensor = self.head(x if float(x.detach().sum()) > -1 else -x)
        return found


class Images(nn.Module):
    """torchvision's Vision Transformer for images without a channel."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"image_size": 28, "patch_size": 7, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
        self.net = VisionTransformer(**sizes, num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 28, 28] -> [N, 10]."""
        found: Tensor = self.net(x.unsqueeze(1).expand(-1, 3, -1, -1))
        return found


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lstm": Series, "vit": Images, "branch": Branch}
ESTIMATORS = ("plain", "flipout", "groups", "ivon")


def main(arguments: list[str] | None = None) -> None:
    """Time what the command line names and print median ratios with their quartiles."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    parser.add_argument("--networks", default="lstm,vit,branch", help="separated by commas (default: all)")
    parser.add_argument("--batch", type=int, default=64, help="examples a step (default: 64)")
    parser.add_argument("--images", type=int, default=1024, help="examples a draw (default: 1024)")
    parser.add_argument("--rounds", type=int, default=100, help="timed rounds, after 3 untimed ones (default: 100)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"torch {torch.__version__}, batch {options.batch}, threads {options.threads}, rounds {options.rounds}")
    for name in options.networks.split(","):
        torch.manual_seed(0)
        x, y = torch.rand(options.batch, 28, 28), torch.arange(options.batch) % 10
        net = NETWORKS[name]()
        steps = {"deterministic": deterministic(NETWORKS[name](), x, y, torch.contiguous_format).step}
        steps |= {kind: ours(net, x, y, torch.contiguous_format, name=kind).step for kind in ESTIMATORS}
        _print(f"{name}: step", _paired(steps, options.rounds))
        _print(f"{name}: draw, {_how(net)}", _paired(_draws(net, torch.rand(options.images, 28, 28)), options.rounds))


def _draws(net: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    bnn = bayesian(net)
    guide = MeanFieldNormal(Classifier(bnn, NUM_DATA), x[:1], torch.zeros(1).long())
    blocks, numbers = coherent(bnn, guide, x, batch_size=len(x)), iter(range(10**9))
    net.eval()

    def forward() -> Tensor:
        with torch.inference_mode():
            found: Tensor = net(x)
            return found

    return {"deterministic": forward, "draw": lambda: blocks.logits(next(numbers), 1.0)}


def _how(net: nn.Module) -> str:
    try:
        plain(bayesian(net))
    except NotTraceable:
        return "the network as it is"
    return "its graph"


def _paired(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    in_turns(contenders, 3)
    return in_turns(contenders, rounds)


def _print(what: str, seconds: dict[str, list[float]]) -> None:
    base = seconds["deterministic"]
    for name, own in seconds.items():
        ratio, quartiles = ratios(own, base)
        print(f"{what:32} {name:14} {1000 * statistics.median(own):9.3f} ms {ratio:>6}  quartiles {quartiles}")


if __name__ == "__main__":
    main()
