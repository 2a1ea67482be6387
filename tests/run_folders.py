"""A run folder made for a test."""

import yaml


def written(folder, config):
    """Make `folder`, a run of the settings `config`."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def quick(tmp_path, data_dir, **more):
    """Make a run folder of few digits and one epoch, with more settings by their section."""
    config = {
        "data": {"dir": str(data_dir), "num_train": 200, "num_test": 60},
        "train": {"epochs": 1, "optimizer": "adam", "estimator": "local"},
        "predict": {"num_samples": 4},
    }
    return written(tmp_path / "tiny", config | more)
