"""The config.yaml that a new run begins with: settings that fit its data, each with a comment."""

import math
from typing import Any, NamedTuple

import yaml

from ppl_bnn.data import Split
from ppl_bnn.data.settings import TABLES, TEST_FRACTION
from ppl_bnn.errors import UserError
from ppl_bnn.models import build
from ppl_bnn.models.likelihoods.parse import num_outputs, parse_likelihood

# Updates of a training: with fewer a posterior stays near its start, and more take long.
_STEPS_OF_TABLES, _STEPS_OF_IMAGES = 4000, 3000
_MOST_EPOCHS, _LEAST_STEPS_AN_EPOCH = 500, 20
# From here a deep network has enough images to learn from.
_MANY_IMAGES = 10_000
# On 1,000 digits it reaches 94%, and 1 / sqrt(fan_in) 91%, with a fifth of the KL.
_PRIORS = {"lenet": ("normal(0, 0.1)", "of the weights"), "resnet18": ("normal(0, 0.316)", "of the weights")}
# A share of the KL for images, of which there are far fewer than weights.
_KL_WEIGHT_OF_IMAGES = 0.1
# Column of the comments.
_WIDTH = 40

_DATA_COMMENTS = {
    "name": "kind of the file",
    "file": "a relative path is looked for in the working directory, then in this folder",
    "test_file": "the test data",
    "target": "what to predict",
    "features": "the inputs; without this line all others",
    "missing": "missing values: median of the training rows, mean, drop (those rows) or refuse",
    "unknown_categories": "a category that only test rows have counts as none of those known",
    "image_size": "pixels of a side; images are scaled to it",
    "options": "of pandas' reader",
}


class Source(NamedTuple):
    """The data of a new run.

    Attributes:
        settings: of the section ``data``.
        train: the training examples.
        num_test: number of test examples.
        likelihood: that is asked for; None for the usual one.
    """

    settings: dict[str, Any]
    train: Split
    num_test: int
    likelihood: str | None


class _Line(NamedTuple):
    name: str
    value: Any
    comment: str = ""


def starting_config(source: Source, folder: str) -> str:
    """The text of a config.yaml for some data.

    Args:
        folder: the run folder, for the comments.

    Raises:
        UserError: inputs that no network of the library takes, or targets that the likelihood does not take.
    """
    train = source.train
    likelihood = source.likelihood or ("categorical" if train.classes else "normal")
    outputs = num_outputs(parse_likelihood(likelihood), len(train.classes))
    sections = {
        "data": _data(source),
        "model": _model(train, likelihood, outputs),
        "guide": [
            _Line("init_loc", "he", "start of the weights' means: Normal(0, sqrt(2 / fan_in))"),
            _Line("init_scale", 0.02, "start of the weights' standard deviations"),
        ],
        "train": _train(train),
        "predict": [_Line("num_samples", 100, "networks drawn from the posterior for each prediction")],
        "pruning": [
            _Line("threshold", 1.0, "prune weights whose |mean| / standard deviation is below this, and"),
            _Line("fractions", [0.0, 0.5, 0.8, 0.9, 0.95], "these shares of the weights"),
            _Line("num_samples", 50, "networks drawn at each level of pruning"),
        ],
    }
    lines = _head(source, folder)
    for name, settings in sections.items():
        lines += [f"{name}:", *(text for line in settings for text in _rendered(line))]
    lines += [_commented("device: cpu", "cuda for a GPU")]
    return "\n".join(lines) + "\n"


def _head(source: Source, folder: str) -> list[str]:
    train = source.train
    classes = f" of {len(train.classes)} classes" if train.classes else ""
    return [
        f"# {train.title}: {len(train)} training and {source.num_test} test examples{classes}, inputs of shape "
        f"{list(train.shape)}.",
        "#",
        *(
            _commented(f"#   ppl_bnn run {command}", about)
            for command, about in (
                (folder, f"train, predict, prune and report, into {folder}/out"),
                (f"{folder} --stages summary", "the network's layers"),
                (f"{folder} --train.lr 0.01 --out {folder}/lr", "another setting, with results of its own"),
                ("--help", "all settings"),
            )
        ),
    ]


def _data(source: Source) -> list[_Line]:
    lines = [_Line(name, value, _DATA_COMMENTS[name]) for name, value in source.settings.items()]
    # Other files may have a test set of their own, which leaves no choice.
    if "test_file" not in source.settings and source.settings["name"] in TABLES:
        lines.append(_Line("test_fraction", TEST_FRACTION, "rows kept out of training, by a fixed permutation"))
    return lines


def _model(train: Split, likelihood: str, outputs: int) -> list[_Line]:
    name, about = _network(train)
    told = (
        "class labels" if train.classes
        else "numbers, with a noise scale that is learnt" if likelihood == "normal"
        else "the distribution of the target"
    )  # fmt: skip
    return [
        _Line("name", name, f"{about}; or your own: nets:Net, with nets.py in this folder"),
        _Line("likelihood", likelihood, told),
        _Line("prior", *_PRIORS.get(name) or _by_fan_in(name, train.shape, outputs, bool(train.classes))),
    ]


def _by_fan_in(name: str, shape: Any, outputs: int, of_classes: bool) -> tuple[dict[str, str], str]:
    """A prior for each layer: networks drawn from it have outputs about as large as standardized targets.

    Logits are larger. With twice the scale the test nll of three of scikit-learn's tables fell: wine from 0.40 to 0.11,
    digits from 0.30 to 0.17, breast cancer from 0.14 to 0.09.
    """
    net = build(name, image_shape=shape, num_outputs=outputs, deterministic=True)
    weights = {path.removesuffix(".weight"): value for path, value in net.named_parameters() if value.dim() > 1}
    times = 2 if of_classes else 1
    return {
        f"{layer}*": f"normal(0, {times * math.prod(weight.shape[1:]) ** -0.5:.2g})"
        for layer, weight in weights.items()
    }, f"of the weights: scale {times} / sqrt(fan_in); for a network of your own: normal(0, 0.1)"


def _network(train: Split) -> tuple[str, str]:
    if not _is_one_tensor(train.shape):
        raise UserError(
            f"init writes runs for one tensor of inputs, and these are of shapes {train.shape}: write a network of "
            "your own, and a config.yaml with model.name nets:Net"
        )
    if not _are_images(train):
        return "mlp", "two hidden layers of 50 units"
    if len(train) >= _MANY_IMAGES and tuple(train.shape[1:]) in ((32, 32), (28, 28)) and train.shape[0] == 3:
        return "resnet18", "a residual network"
    return "lenet", "two convolutions and two dense layers"


def _train(train: Split) -> list[_Line]:
    images, num = _are_images(train), len(train)
    # A power of two, with enough steps an epoch.
    batch = 2 ** max(4, min(7, round(math.log2(max(1, num / _LEAST_STEPS_AN_EPOCH)))))
    steps = _STEPS_OF_IMAGES if images else _STEPS_OF_TABLES
    epochs = max(1, min(_MOST_EPOCHS, round(steps / math.ceil(num / batch))))
    return [
        _Line("epochs", epochs, f"passes over the data; {epochs * math.ceil(num / batch)} updates in all"),
        _Line("batch_size", batch, "examples an update"),
        _Line("optimizer", "adam", "or rmsprop, ivon, or torch's own: torch.optim:SGD"),
        _Line("lr", 2e-3 if images else 5e-3, "learning rate"),
        _Line("lr_schedule", "cosine", "it falls to 0 over the training; or constant"),
        _Line("estimator", "local", "local reparameterization: little noise in the gradients"),
        _Line("kl_weight", _KL_WEIGHT_OF_IMAGES if images else 1.0,
              "below 1 a colder posterior, which fits better where weights outnumber images" if images
              else "1 is the Bayesian posterior; below 1 a colder one"),
        _Line("checkpoint_every", max(1, epochs // 5), "epochs between checkpoints"),
    ]  # fmt: skip


def _is_one_tensor(shape: Any) -> bool:
    return isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)


def _are_images(train: Split) -> bool:
    shape = train.shape
    return len(shape) == 3 and shape[0] in (1, 2, 3, 4) and min(shape[1:]) >= 16


def _rendered(line: _Line) -> list[str]:
    if isinstance(line.value, dict):
        inner = [f"    {_yaml(name)}: {_yaml(value)}" for name, value in line.value.items()]
        return [_commented(f"  {line.name}:", line.comment), *inner]
    return [_commented(f"  {line.name}: {_yaml(line.value)}", line.comment)]


def _commented(text: str, comment: str) -> str:
    return f"{text:<{_WIDTH}}  # {comment}"


def _yaml(value: Any) -> str:
    # A plain scalar is ended by a line of dots.
    return (
        yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
        .removesuffix("\n...\n")
        .strip()
    )
