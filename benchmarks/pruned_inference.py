"""Times prediction against the pruned fraction: ours, the unpruned network, dense with zeros, and bayesian-torch.

python benchmarks/pruned_inference.py fc-one runs/mnist-fc/out --figure pruned.png
python benchmarks/pruned_inference.py fc-all runs/mnist-fc/out
python benchmarks/pruned_inference.py conv runs/mnist-conv/out

fc-one: one image, 400 draws by layer outputs. fc-all: a draw of the weights for all test images. conv: the same for 100
images.

The unpruned network runs on its fastest path: by layer outputs for one image; with the fastest batch size for draws of
weights; and with the fastest memory layout for convolutions. All threads make its noise (`normals`, and for one image
also `torch.randn`). "predictor" is `ppl_bnn.predictor` of the pruned and of the unpruned posterior, which keeps its
noise between requests. "zeros" is the pruned posterior computed on the unpruned path, as in BPrune. bayesian-torch
takes 20 of the 400 draws, and its time counts 20 times. The contenders take turns in one process. Ratios are medians of
the rounds' ratios.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from torch import Tensor, nn

from ppl_bnn import Classifier, MeanFieldNormal, build, predictor, prune
from ppl_bnn.data import load
from ppl_bnn.inference import checkpoint
from ppl_bnn.native.normals import normals
from ppl_bnn.prediction.compact.forms import choose_layers
from ppl_bnn.prediction.compact.layerwise import compact_draws
from ppl_bnn.prediction.compact.network import compact
from ppl_bnn.prediction.plain import plain

FRACTIONS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
DRAWS, FEWER = 400, 20
IMAGES = {"fc-one": 1, "fc-all": 10_000, "conv": 100}
BATCHES = {"fc-one": (1,), "fc-all": (500, 1000, 2000, 5000), "conv": (50, 100)}
RATIOS = (
    ("ours", "dense"), ("ours", "dense, torch noise"), ("predictor", "predictor, unpruned"), ("ours", "zeros"),
)  # fmt: skip
Step = Callable[[], object]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Print a table of seconds and ratios, and draw it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=IMAGES, help="what to time (above)")
    parser.add_argument("out", type=Path, help="out folder of a trained run of bnn-fc or bnn-conv")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--fractions", default=",".join(map(str, FRACTIONS)), help="pruned shares of the weights")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--figure", type=Path, help="PNG file for a figure of time against the pruned fraction")
    options = parser.parse_args(arguments)
    net, guide = _trained(options.out)
    x = load("mnist", options.data_dir)[1].inputs()[: IMAGES[options.task]]
    found: list[dict[str, float]] = []
    print(f"{options.task}: {len(x)} images, {torch.get_num_threads()} threads; milliseconds, then dense / ours\n")
    for fraction in map(float, options.fractions.split(",")):
        pruned = prune(guide, fraction=fraction).guide
        steps, chosen = _contenders(options.task, net, guide, pruned, x)
        rounds = list(_rounds(steps, options.rounds))
        row = {name: 1e3 * median(times[name] for times in rounds) for name in steps}
        if options.task == "fc-one" and "bayesian-torch" in row:
            row["bayesian-torch"] *= DRAWS / FEWER
        for name, rival in RATIOS:
            if name in steps and rival in steps:
                row[f"{rival} / {name}"] = median(times[rival] / times[name] for times in rounds)
        found.append({"fraction": fraction, **row})
        if fraction == float(options.fractions.split(",")[0]):
            print("| fraction | " + " | ".join(row) + " | layers |\n" + "| ---: " * (len(row) + 1) + "| --- |")
        values = " | ".join(f"{value:.3g}" for value in row.values())
        print(f"| {fraction:g} | {values} | {' '.join(chosen.values())} |", flush=True)
    if options.figure:
        _draw(options.task, found, options.figure)


def _trained(out: Path) -> tuple[nn.Module, MeanFieldNormal]:
    name = yaml.safe_load((out / "config.yaml").read_text())["model"]["name"]
    net = build(name)
    model = Classifier(net, 60_000)
    guide = MeanFieldNormal(model, torch.rand(1, 1, 28, 28), torch.zeros(1).long())
    state = checkpoint.load(checkpoint.find(out / "checkpoints"))
    guide.load_state_dict(state.part("guide"))
    model.load_state_dict(state.part("model"))
    return net.eval(), guide


def _contenders(
    task: str, net: nn.Module, guide: MeanFieldNormal, pruned: MeanFieldNormal, x: Tensor
) -> tuple[dict[str, Step], dict[str, str]]:
    small = compact(plain(net), pruned)
    inputs = small.select(x).contiguous()
    if task == "fc-one":
        function = compact_draws(small, len(inputs), DRAWS)
        answer, unpruned_answer = (predictor(net, each, x, num_samples=DRAWS) for each in (pruned, guide))
        shapes = [(DRAWS, len(guide.loc_scale(site)[0])) for site in guide.sites]

        def dense(guide: MeanFieldNormal) -> Callable[[list[Tensor]], Tensor]:
            return _dense_layerwise(net, guide, x)

        unpruned, zeros = dense(guide), dense(pruned)
        steps: dict[str, Step] = {
            "dense": lambda: unpruned(_noise(shapes)),
            "dense, torch noise": lambda: unpruned([torch.randn(shape) for shape in shapes]),
            "zeros": lambda: zeros(_noise(shapes)),
            "ours": lambda: function(inputs, DRAWS),
            "predictor, unpruned": lambda: unpruned_answer(x),
            "predictor": lambda: answer(x),
        }
        return steps | _bayesian_torch(pruned, x, FEWER), {}
    layout, batch_size = _fastest_pass(net, x, task)
    batches = list((inputs.contiguous(memory_format=layout) if task == "conv" else inputs).split(batch_size))
    chosen = choose_layers(small, len(batches[0]))

    def ours() -> None:
        small.draw(0)
        for batch in batches:
            small.net(batch)

    steps = {
        "dense": _dense_draw(net, guide, x, layout, batch_size),
        "zeros": _dense_draw(net, pruned, x, layout, batch_size),
        "ours": ours,
    }
    return steps | _bayesian_torch(pruned, x, 1), chosen


def _dense_draw(
    net: nn.Module, guide: MeanFieldNormal, x: Tensor, layout: torch.memory_format, batch_size: int
) -> Step:
    network = plain(net)
    network.net.to(memory_format=layout)
    placed = {site: network.place(site, *guide.loc_scale(site)) for site in guide.sites}
    batches = x.contiguous(memory_format=layout).split(batch_size)

    def step() -> None:
        for site, (loc, scale) in placed.items():
            network.parameter(site).copy_(torch.addcmul(loc, scale, normals(0, loc.numel(), loc).view_as(loc)))
        for batch in batches:
            network.net(batch)

    return step


def _dense_layerwise(net: nn.Module, guide: MeanFieldNormal, x: Tensor) -> Callable[[list[Tensor]], Tensor]:
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    moments = [(guide.loc_scale(site)[0], guide.loc_scale(site)[1].square()) for site in guide.sites]

    def step(noise: list[Tensor]) -> Tensor:
        h = x.flatten(1)
        for at, (layer, (loc, variance), eps) in enumerate(zip(layers, moments, noise, strict=True)):
            h = h.relu() if at else h
            mean, sd = F.linear(h, loc, layer.bias), F.linear(h.square(), variance).sqrt_()
            h = torch.addcmul(mean, sd, eps)
        return h

    return step


def _noise(shapes: list[tuple[int, int]]) -> list[Tensor]:
    sizes = [rows * units for rows, units in shapes]
    return [
        part.view(shape)
        for part, shape in zip(normals(0, sum(sizes), torch.empty(0)).split(sizes), shapes, strict=True)
    ]


def _fastest_pass(net: nn.Module, x: Tensor, task: str) -> tuple[torch.memory_format, int]:
    layouts = (torch.contiguous_format, torch.channels_last)[: 1 + (task == "conv")]
    choices = [(layout, size) for layout in layouts for size in BATCHES[task]]

    def passing(layout: torch.memory_format, size: int) -> Step:
        network, batches = plain(net).net.to(memory_format=layout), x.contiguous(memory_format=layout).split(size)
        return lambda: [network(batch) for batch in batches]

    rounds = list(_rounds({str(choice): passing(*choice) for choice in choices}, 5))
    return min(choices, key=lambda choice: median(times[str(choice)] for times in rounds))


def _bayesian_torch(guide: MeanFieldNormal, x: Tensor, draws: int) -> dict[str, Step]:
    if find_spec("bayesian_torch") is None:
        return {}
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -9.0}
    twin = build("bnn-conv" if len(x) == IMAGES["conv"] else "bnn-fc", deterministic=True)
    dnn_to_bnn(twin, {**settings, "type": "Reparameterization", "moped_enable": False, "moped_delta": 0.5})
    for site in guide.sites:
        layer = twin.get_submodule(site.removesuffix(".weight"))
        loc, scale = guide.loc_scale(site)
        name = "weight" if isinstance(layer, nn.Linear) or hasattr(layer, "mu_weight") else "kernel"
        getattr(layer, f"mu_{name}").data = loc.clone()
        getattr(layer, f"rho_{name}").data = torch.where(scale > 0, scale.expm1().log(), -torch.inf)

    def step() -> None:
        for _ in range(draws):
            for batch in x.split(50 if len(x) == IMAGES["conv"] else 2000):
                twin(batch)

    return {"bayesian-torch": step}


def _rounds(steps: dict[str, Step], count: int) -> Iterator[dict[str, float]]:
    # The first round warms up. A call too short for the clock is repeated, and a slow one is a round by itself.
    repeats: dict[str, int] = {}
    for at in range(count + 1):
        times = {}
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(repeats.get(name, 1)):
                step()
            times[name] = (time.perf_counter() - started) / repeats.get(name, 1)
        if at:
            yield times
        else:
            repeats = {name: max(1, min(100, int(0.05 / seconds))) for name, seconds in times.items()}


def _draw(task: str, rows: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name in rows[0]:
        if name != "fraction" and " / " not in name:
            axis.plot([row["fraction"] for row in rows], [row[name] for row in rows], "o-", label=name)
    axis.set(xlabel="pruned fraction", ylabel="milliseconds", yscale="log", title=f"{task}: {IMAGES[task]} images")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
