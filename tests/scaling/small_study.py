"""What trainings of a study leave, written by hand."""

import json

import numpy as np
import yaml

BYTES = {"bnn": 2 * 4e6, "cnn": 4e6}


def setting(run, *, batch=64, ranks=1, mbit=0.0, **others):
    own = {"run": str(run), "device": "cpu", "batch": batch, "ranks": ranks, "mbit": mbit, "latency_ms": 0.0}
    return {**own, "estimator": "", "cycle_ms": None, "fusion_mb": None, "repeat": 0, **others}


def configuration(*, deterministic, epochs, num_train=None, network="bnn-fc", data="mnist"):
    return {
        "model": {"name": network, "deterministic": deterministic},
        "data": {"name": data, "num_train": num_train, "holdout": 0},
        "train": {"epochs": epochs, "estimator": "flipout"},
    }


def write_point(folder, *, deterministic, ranks, seconds, still, bytes_, network="bnn-fc", data="mnist", **others):
    """A training of 64 images a rank and 3 epochs: its first step is slow, then `seconds` of each."""
    folder.mkdir(parents=True)
    count = len(seconds) + 1
    calls = {
        "gradients": {"count": 2 * count, "bytes": bytes_ * count, "seconds": still},
        "step": {"count": count, "bytes": 48 * count, "seconds": 0.1},
        "broadcast": {"count": 9, "bytes": 9000, "seconds": 0.3},
    }
    content = {
        "ranks": ranks, "backend": "Gloo", "threads": 1, "first_step": 1, "starts": [0], "rows": [64 * ranks] * count,
        "seconds": [5.0, *seconds], "accuracy": [0.1] * count, "calls": calls if ranks > 1 else {}, **others,
    }  # fmt: skip
    (folder / "performance.json").write_text(json.dumps(content))
    own = configuration(deterministic=deterministic, epochs=10, network=network, data=data)
    (folder / "point.json").write_text(json.dumps({"identity": {"settings": own}, "elapsed_seconds": 20.0}))
    trained = configuration(deterministic=deterministic, epochs=3, num_train=64, network=network, data=data)
    (folder / "config.yaml").write_text(yaml.safe_dump(trained))


def study(tmp_path, *, mbit=(0.0,), batch=64, ranks=(1, 2), networks=("bnn-fc",)):
    """Points with compute of 0.2 s; the wire's ring is bytes / bandwidth, of which 2/3 of compute hides a part."""
    found = []
    random = np.random.default_rng(0)
    for network in networks:
        for kind, bytes_ in BYTES.items():
            run = tmp_path / (kind if len(networks) == 1 else f"{network}-{kind}")
            for count, link in [(1, 0.0)] * (1 in ranks) + [(n, link) for n in ranks if n > 1 for link in mbit]:
                wire = 2 * (count - 1) * bytes_ / count / (link * 1e6 / 8 or 1e9)
                exact = 0.2 + max(0.3 * wire, wire - 0.2 * 2 / 3)
                seconds = (exact * np.exp(random.normal(0, 0.01, 12))).tolist()
                folder = tmp_path / "points" / f"{run.name}-{batch}-{count}-{link}"
                write_point(folder, deterministic=kind == "cnn", ranks=count, seconds=seconds, still=0.6,
                            bytes_=bytes_, network=network)  # fmt: skip
                found.append((setting(run, batch=batch, ranks=count, mbit=link), folder))
    return found
