"""A run folder made for a test, and where the real digits are."""

import os
from pathlib import Path

import yaml

DATA = Path(os.environ.get("PPL_BNN_DATA", Path(__file__).parent.parent / "data"))


def written(folder, config):
    """Make `folder`, a run of the settings `config`."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def few_digits(tmp_path, data_dir):
    """Make a run folder of 600 training and 200 test digits and two epochs."""
    config = {
        "data": {"dir": str(data_dir), "num_train": 600, "num_test": 200},
        "model": {"prior": "normal(0, 0.1)"},
        "train": {"epochs": 2, "optimizer": "adam", "estimator": "local", "kl_weight": 0.1},
        "predict": {"num_samples": 5},
        "pruning": {"num_samples": 3, "threshold": [0.5, 10.0], "fractions": [0.0, 0.5, 0.9]},
    }
    return written(tmp_path / "tiny", config)


def quick(tmp_path, data_dir, **more):
    """Make a run folder of few digits and one epoch, with more settings by their section."""
    config = {
        "data": {"dir": str(data_dir), "num_train": 200, "num_test": 60},
        "train": {"epochs": 1, "optimizer": "adam", "estimator": "local"},
        "predict": {"num_samples": 4},
    }
    return written(tmp_path / "tiny", config | more)
