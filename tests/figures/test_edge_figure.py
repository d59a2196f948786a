import numpy as np
import pytest
import xarray as xr

from dlnlab.figures import EdgeFigure


def run(lr, steps=10):
    step = np.arange(steps)
    sharpness = 1.0 + step
    return xr.Dataset(
        {"train_loss": ("step", 0.5**step), "sharpness": ("step", sharpness),
         "effective_sharpness": ("step", lr * sharpness)}, {"step": step},
    )  # fmt: skip


def test_each_run_is_a_line_beside_its_own_edge():
    figure, data = EdgeFigure(), run(0.1)
    table = figure.table(data, slow=run(0.02))
    assert set(table["line"]) == {"main", "slow"}
    np.testing.assert_allclose(table["sharpness_edge"][table["line"] == "main"], 20)
    np.testing.assert_allclose(table["sharpness_edge"][table["line"] == "slow"], 100)
    loss, curvature = figure.draw(data, slow=run(0.02)).axes
    assert loss.get_yscale() == "log"
    assert [line.get_ydata()[0] for line in curvature.lines] == pytest.approx([1, 20, 1, 100])


def test_a_run_and_its_variants_are_called_what_their_labels_say():
    figure = EdgeFigure(labels={"main": "lr 0.1", "slow": "lr 0.02"})
    assert set(figure.table(run(0.1), slow=run(0.02))["line"]) == {"lr 0.1", "lr 0.02"}
    drawn = figure.draw(run(0.1), slow=run(0.02))
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["lr 0.1", "lr 0.02", "edge of stability"]
    with pytest.raises(ValueError, match=r"EdgeFigure.labels: no variant is called 'fast'; there are slow"):
        EdgeFigure(labels={"fast": "lr 1"}).table(run(0.1), slow=run(0.02))


def test_beside_the_preconditioned_sharpness_the_plain_one_has_no_edge():
    data = run(0.1).assign(preconditioned_sharpness=("step", 30 * (1.0 + np.arange(10))))
    table = EdgeFigure(["preconditioned_sharpness", "sharpness"]).table(data)
    np.testing.assert_allclose(table["preconditioned_sharpness_edge"], 600)
    assert np.isnan(table["sharpness_edge"]).all()


def test_members_that_diverge_are_no_part_of_a_median_and_lost_combinations_no_line():
    values = np.array([[[1.0, 1.0], [3.0, 3.0], [1e9, 1e9]], [[5.0, 5.0], [1e9, 1e9], [1e9, 1e9]]])
    status = np.where(values > 1e6, "diverged", "running")
    dims = ("lr", "seed", "step")
    data = xr.Dataset({"train_loss": (dims, values), "effective_sharpness": (dims, values), "status": (dims, status)},
                      {"lr": [0.1, 0.2], "seed": [0, 1, 2], "step": [0, 1]})  # fmt: skip
    table = EdgeFigure(["effective_sharpness"]).table(data)
    assert table["line"].tolist() == ["lr 0.1", "lr 0.1"]
    assert table["effective_sharpness"].tolist() == [2, 2]


def test_a_quantity_that_is_not_recorded_is_refused():
    with pytest.raises(ValueError, match=r"EdgeFigure.quantities: 'sharpness' is not recorded; recorded: train_loss"):
        EdgeFigure().check({"train_loss"}, {})
    with pytest.raises(ValueError, match=r"EdgeFigure.quantities = \[\]"):
        EdgeFigure([])
