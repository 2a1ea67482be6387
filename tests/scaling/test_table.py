"""The table of the study, its predictions, its page of calls and its figures, from points written by hand."""

import json
import math

import numpy as np
import pytest
from matplotlib import image
from small_study import configuration, setting, study, write_point

from ppl_bnn.scaling.calls import calls_page
from ppl_bnn.scaling.figures import draw_scaling
from ppl_bnn.scaling.prediction import held_out, predictions
from ppl_bnn.scaling.table import flat, table


def test_the_table_says_what_the_trainings_did(tmp_path):
    found = study(tmp_path)
    seconds = np.array(json.loads((found[1][1] / "performance.json").read_text())["seconds"])
    rows = table(found, [0.7], whole=False)
    row = rows.sel(point="bnn, cpu, batch 64, 2 ranks")
    assert row["samples_per_second"] == pytest.approx((128 / seconds[1:]).mean())
    assert row["samples_per_second_std"] == pytest.approx((128 / seconds[1:]).std(ddof=1))
    assert row["fixed_epochs_seconds"] == pytest.approx(10 * 60_000 / row["samples_per_second"])
    assert not row["fixed_epochs_measured"]
    alone = rows.sel(point="bnn, cpu, batch 64, 1 ranks")
    assert row["efficiency"] == pytest.approx(float(alone["step_seconds"]) / np.median(seconds[1:]))
    assert (alone["efficiency"], alone["communication_share"], alone["efficiency_std"]) == (1.0, 0.0, 0.0)
    assert row["communication_share"] == pytest.approx(0.7 / seconds.sum())
    # All that rank 0 waited for, over the time from the launcher's start to its end.
    assert row["communication_efficiency"] == pytest.approx(1.0 / 20)
    gradients = row.sel(kind="gradients")
    assert (gradients["call_count"], gradients["call_mean_bytes"], gradients["call_seconds"]) == (26, 4e6, 0.6)
    assert (row["messages"], row["bytes"]) == (2.0, 8e6)
    assert (row["estimator"], rows["estimator"].sel(point="cnn, cpu, batch 64, 2 ranks")) == ("flipout", "none")
    assert np.isfinite(row["seconds"].values).sum() == 12
    assert rows["seconds_to_accuracy"].isnull().all()
    # Twice the same setting is one row with the steps of both, and the calls of one.
    twice = table([*found, found[1]], [0.7], whole=False)
    assert twice.sizes == {"point": 4, "kind": 5, "step": 24, "accuracy": 1}
    assert twice["call_count"].equals(rows["call_count"])


def test_the_efficiencys_sigma_is_that_of_repeated_studies(tmp_path):
    random = np.random.default_rng(1)
    found, stated = [], []
    for number in range(200):
        points = []
        for ranks in (1, 2):
            folder = tmp_path / f"{number}-{ranks}"
            seconds = (0.2 * np.exp(random.normal(0, 0.05, 30))).tolist()
            write_point(folder, deterministic=False, ranks=ranks, seconds=seconds, still=0.1, bytes_=1e6)
            points.append((setting("bnn", ranks=ranks), folder))
        row = table(points, [], whole=False).isel(point=1)
        found.append(float(row["efficiency"]))
        stated.append(float(row["efficiency_std"]))
    # The standard deviation of 200 is known to 5%, so 3 standard errors are 15%.
    assert np.mean(stated) == pytest.approx(np.std(found), rel=0.15)


def test_the_time_to_an_accuracy_is_that_of_the_first_step_whose_last_steps_reach_it(tmp_path):
    """Three epochs of 60 steps: the mean over the last 20 passes 0.5 when 10 of them have 1.0 and the others 0."""
    accuracy = [0.0] * 99 + [1.0] * 81
    seconds = [0.5] * 179
    write_point(tmp_path / "bnn", deterministic=False, ranks=1, seconds=seconds, still=0, bytes_=1, accuracy=accuracy)
    points = [(setting("bnn"), tmp_path / "bnn")]
    rows = table(points, [0.5, 0.95, 1.0], whole=True)
    # Step 109 is the 10th with 1.0; the first step took 5 s.
    assert rows["seconds_to_accuracy"].values.tolist() == [[5 + 108 * 0.5, 5 + 117 * 0.5, 5 + 118 * 0.5]]
    assert flat(rows)["seconds_to_accuracy_0.95"].tolist() == [5 + 117 * 0.5]
    assert math.isnan(table(points, [0.5], whole=False)["seconds_to_accuracy"][0, 0])


@pytest.mark.parametrize(
    ("others", "reached"),
    [
        # Two steps an epoch: the mean is over two steps, the last of 2 and 1 examples.
        ({"accuracy": [0.0, 0.0, 0.4, 1.0, 0.8, 0.8], "rows": [2, 1] * 3}, 5.0 + 3 * 0.25),
        ({"accuracy": [0.9] * 6, "first_step": 7}, math.nan),
        ({"accuracy": [None] * 6}, math.nan),
    ],
    ids=["short epochs", "first steps unknown", "no labels"],
)
def test_short_epochs_and_missing_accuracies(tmp_path, others, reached):
    folder = tmp_path / "bnn"
    write_point(folder, deterministic=False, ranks=1, seconds=[0.25] * 5, still=0, bytes_=1, **others)
    found = table([(setting("bnn"), folder)], [0.6], whole=True)["seconds_to_accuracy"]
    assert found.values[0, 0] == pytest.approx(reached, nan_ok=True)


def test_the_runs_own_epochs_are_told_as_measured(tmp_path):
    folder = tmp_path / "bnn"
    write_point(folder, deterministic=False, ranks=1, seconds=[0.25] * 29, still=0, bytes_=1)
    own = configuration(deterministic=False, epochs=3, num_train=64)
    (folder / "point.json").write_text(json.dumps({"identity": {"settings": own}, "elapsed_seconds": 20.0}))
    row = table([(setting("bnn"), folder)], [0.6], whole=True).isel(point=0)
    assert row["fixed_epochs_measured"]
    assert row["fixed_epochs_seconds"] == 5 + 29 * 0.25


def test_the_first_step_of_a_process_that_resumed_is_not_timed(tmp_path):
    folder = tmp_path / "bnn"
    seconds = [0.25, 0.25, 4.0, 0.25, 0.25]
    write_point(folder, deterministic=False, ranks=2, seconds=seconds, still=1.0, bytes_=1, starts=[0, 3])
    row = table([(setting("bnn", ranks=2), folder)], [0.6], whole=True).isel(point=0)
    assert row["seconds"].values.tolist() == [0.25] * 4
    # Messages are counted from there on.
    assert row["messages"] == 12 / 3
    assert row["communication_share"] == pytest.approx(1.1 / 4.5)


def test_a_speed_that_was_held_out_is_predicted(tmp_path):
    rows = table(study(tmp_path, mbit=(0.0, 50.0, 100.0, 400.0)), [0.6], whole=False)
    rows["held_out_step_seconds"] = held_out(rows, num_samples=200)
    low, middle, high = rows["held_out_step_seconds"].values.T
    measured = rows["step_seconds"].values
    limited = rows["mbit"].values > 0
    assert np.isnan(middle[~limited]).all()
    assert ((low < measured) & (measured < high))[limited].sum() >= 5
    # At 400 Mbit/s back-propagation hides the wire, which at the others it cannot: only the band knows of that.
    slow = limited & (rows["mbit"].values < 400)
    assert middle[slow] == pytest.approx(measured[slow], rel=0.1)
    predicted = predictions(rows, mbit=100.0, num_samples=30)
    assert predicted["samples_per_second"].dims == ("workload", "ranks", "quantile")
    assert predicted["ranks"].values.tolist()[-1] == 1024
    on_two = predicted["samples_per_second"].sel(workload="bnn, cpu, batch 64", ranks=2, quantile=0.5)
    measured = rows["samples_per_second"].sel(point="bnn, cpu, batch 64, 2 ranks at 100 Mbit/s")
    assert float(on_two) == pytest.approx(float(measured), rel=0.05)
    assert "time of bnn, cpu, batch 64 over cnn" in predicted.attrs["ratios"]
    draw_scaling(rows, predicted, tmp_path / "figures")
    assert (tmp_path / "figures" / "links.png").stat().st_size > 10_000


def test_what_was_not_measured_on_several_ranks_is_not_predicted(tmp_path):
    rows = table(study(tmp_path, ranks=(1,)), [0.6], whole=False)
    assert predictions(rows) is None
    rows["held_out_step_seconds"] = held_out(rows)
    assert draw_scaling(rows, None, tmp_path / "figures") == 3
    assert (tmp_path / "figures" / "efficiency.png").exists()
    # Without one rank there is no efficiency.
    two = table(study(tmp_path / "two", ranks=(2,)), [0.6], whole=False)
    assert two["efficiency"].isnull().all()
    assert draw_scaling(two, predictions(two, num_samples=3), tmp_path / "two figures") == 4
    # The other run's points on two ranks failed.
    alone = table(study(tmp_path / "more")[:3], [0.6], whole=False)
    assert predictions(alone, num_samples=3)["workload"].values.tolist() == ["bnn, cpu, batch 64"]


def test_predictions_use_one_cycle_time(tmp_path):
    found = study(tmp_path)
    swept = []
    for point, folder in found:
        for cycle, slower in ((5.0, 1), (30.0, 3)) if point["ranks"] > 1 else ((None, 1),):
            content = json.loads((folder / "performance.json").read_text())
            again = tmp_path / f"{folder.name}-{cycle}"
            write_point(again, deterministic="cnn" in folder.name, ranks=point["ranks"], still=0.6, bytes_=4e6,
                        seconds=[slower * second for second in content["seconds"][1:]])  # fmt: skip
            swept.append(({**point, "cycle_ms": cycle}, again))
    rows = table(swept, [0.6], whole=False)
    assert rows["cycle_ms"].values.tolist() == pytest.approx([math.nan, 5, 30] * 2, nan_ok=True)
    assert "bnn, cpu, batch 64, 2 ranks, cycle 30 ms" in rows["point"].values
    predicted = predictions(rows, num_samples=3)
    on_two = predicted["samples_per_second"].sel(workload="bnn, cpu, batch 64", ranks=2, quantile=0.5)
    measured = rows["samples_per_second"].sel(point="bnn, cpu, batch 64, 2 ranks, cycle 5 ms")
    assert float(on_two) == pytest.approx(float(measured), rel=0.1)
    rows["held_out_step_seconds"] = held_out(rows)
    draw_scaling(rows, predicted, tmp_path / "figures")
    assert (tmp_path / "figures" / "cycle_ms.png").exists()


def test_the_page_of_calls_has_networks_beside_their_twins(tmp_path):
    rows = table(study(tmp_path, ranks=(1, 2, 4), networks=("vgg16", "resnet18")), [0.6], whole=False)
    page = calls_page(rows)
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles == [
        f"## {name} (flipout), mnist, cpu, batch 64 a rank, 4 ranks over Gloo" for name in ("vgg16", "resnet18")
    ]
    table_lines = [line for line in page.split(titles[1])[0].splitlines() if line.startswith("|")]
    header, _, allreduce, gradients, *_, broadcast, efficiency = table_lines
    assert header == (
        "| routine | BNN calls | BNN average bytes | BNN seconds | twin calls | twin average bytes | twin seconds |"
    )
    # 13 steps of two buckets and a small message.
    assert allreduce == "| **Allreduce** | 39 | 2666683 | 0.7 | 39 | 1333349 | 0.7 |"
    assert gradients == "| of it: gradients, a bucket each | 26 | 4000000 | 0.6 | 26 | 2000000 | 0.6 |"
    assert broadcast == "| **Bcast** | 9 | 1000 | 0.3 | 9 | 1000 | 0.3 |"
    assert efficiency.count("1 / 20 = 5.0%") == 2
    assert "##" not in calls_page(table(study(tmp_path / "alone", ranks=(1,)), [0.6], whole=False))


def test_a_twin_that_learned_other_data_is_no_twin(tmp_path):
    points = [(kind, data, ranks) for kind, data in (("bnn", "cifar10"), ("cnn", "digits100k")) for ranks in (1, 2)]
    found = []
    for kind, data, ranks in points:
        folder = tmp_path / f"{kind}-{ranks}"
        write_point(folder, deterministic=kind == "cnn", ranks=ranks, seconds=[0.2, 0.21, 0.22], still=0.1,
                    bytes_=1e6, network="vgg16", data=data)  # fmt: skip
        found.append((setting(kind, ranks=ranks), folder))
    rows = table(found, [0.6], whole=False)
    assert flat(rows)["data"].tolist() == [data for _, data, _ in points]
    page = calls_page(rows)
    assert [line.split(",")[:2] for line in page.splitlines() if line.startswith("#")] == [
        ["## vgg16 (flipout)", " cifar10"],
        ["## vgg16", " digits100k"],
    ]
    assert "BNN seconds | twin" not in page
    assert predictions(rows, num_samples=3).attrs["ratios"] == ""


def test_every_figure_that_the_table_allows_is_drawn(tmp_path):
    networks = ("vgg16", "resnet18")
    found = [*study(tmp_path, networks=networks), *study(tmp_path, batch=32, networks=networks)]
    for point, folder in found:
        content = json.loads((folder / "performance.json").read_text())
        content["accuracy"] = [0.05 * (n + 1) for n in range(13)]
        (folder / "performance.json").write_text(json.dumps(content))
        assert point["batch"] in (32, 64)
    rows = table(found, [0.3, 0.5], whole=True)
    rows["held_out_step_seconds"] = held_out(rows)
    assert draw_scaling(rows, predictions(rows, num_samples=3), tmp_path / "figures") == 6
    figures = {path.stem: image.imread(path) for path in (tmp_path / "figures").iterdir()}
    assert set(figures) == {"throughput", "fixed_epochs", "efficiency", "prediction", "time_to_accuracy", "batch"}
    # A panel for each network.
    one = draw_scaling(table(found[:4], [0.3], whole=False), None, tmp_path / "one")
    assert one == 3
    assert figures["throughput"].shape[1] > 1.5 * image.imread(tmp_path / "one" / "throughput.png").shape[1]
