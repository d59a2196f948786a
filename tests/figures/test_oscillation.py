import numpy as np
import pytest
import xarray as xr

from dlnlab.figures import OscillationFigure

STEPS = [0, 1, 2, 10, 11, 50]


def results(amplitude, status="running"):
    """beta swings by +-amplitude (sparsity, seed, coordinate) with period 2 about 1; supports of 1 and 2 of 3."""
    swing = (-1.0) ** np.array(STEPS)[:, None]
    beta = 1 + swing * np.asarray(amplitude)[:, :, None]
    teacher = np.broadcast_to(np.array([[1, 0, 0], [0, 1, 1]])[:, None, None], beta.shape)
    dims = ("sparsity", "seed", "step")
    return xr.Dataset(
        {
            "beta": ((*dims, "coordinate"), beta),
            "teacher": ((*dims, "coordinate"), teacher),
            "status": (dims, np.broadcast_to(status, beta.shape[:3])),
        },
        {"sparsity": [1, 2], "seed": range(beta.shape[1]), "step": STEPS},
    )


AMPLITUDE = [[[3.0, 1.0, 1.0]] * 3, [[0.5, 3.0, 4.0]] * 3]


def test_the_half_difference_of_two_steps_is_the_amplitude_of_an_oscillation_of_period_two():
    table = OscillationFigure(rows="sparsity").table(results(AMPLITUDE))
    assert table["step"].tolist() == [1, 10] * 2  # pairs of consecutive steps, without step 0
    np.testing.assert_allclose(table["support"], [3, 3, np.sqrt(12.5), np.sqrt(12.5)])
    np.testing.assert_allclose(table["rest"], [1, 1, 0.5, 0.5])


def test_it_is_the_median_over_seeds_that_still_run():
    amplitude = np.array([[1.0, 1, 1], [2, 1, 1], [9, 1, 1]])
    status = np.full((2, 3, 6), "running", dtype="<U9")
    status[:, 2, 3:] = "converged"
    table = OscillationFigure(rows="sparsity").table(results([amplitude, amplitude], status))
    assert table["running"].tolist() == [3, 2] * 2
    np.testing.assert_allclose(table["support"][:2], [2, 1.5])
    np.testing.assert_allclose(table["support_p90"][1], 1.9)


def test_where_nothing_runs_nothing_is_drawn():
    figure = OscillationFigure(rows="sparsity")
    data = results(AMPLITUDE, "diverged")
    assert np.isnan(figure.table(data)["support"]).all()
    figure.draw(data)


def test_axes_become_rows_and_columns():
    figure = OscillationFigure(columns="sparsity").draw(results(AMPLITUDE))
    assert [panel.get_title() for panel in figure.axes] == ["sparsity 1", "sparsity 2"]
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [np.sqrt(12.5)] * 2)
    assert len(OscillationFigure(rows="sparsity").draw(results(AMPLITUDE)).axes) == 2


def test_without_pairs_of_steps_it_says_what_to_record():
    with pytest.raises(ValueError, match=r"no two consecutive steps were recorded; set record\.pairs: true"):
        OscillationFigure(rows="sparsity").draw(results(AMPLITUDE).isel(step=[0, 1, 3, 5]))


def test_what_cannot_be_drawn_is_said_before_a_fit():
    axes = {"lr": [0.1], "sparsity": [1, 2], "seed": [0, 1]}
    OscillationFigure(rows="sparsity").check({"beta", "teacher"}, axes)
    with pytest.raises(ValueError, match=r"needs 'beta' in record\.variables; recorded: teacher$"):
        OscillationFigure().check({"teacher"}, axes)
    with pytest.raises(ValueError, match=r"columns: no axis 'batch_size'; the axes are lr, sparsity, seed$"):
        OscillationFigure(columns="batch_size").check({"beta", "teacher"}, axes)
    with pytest.raises(ValueError, match=r"sparsity has 2 values; make it rows or columns"):
        OscillationFigure().check({"beta", "teacher"}, axes)
