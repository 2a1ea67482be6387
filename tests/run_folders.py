"""A run folder made for a test."""

import yaml


def written(folder, config):
    """Make `folder`, a run of the settings `config`."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
