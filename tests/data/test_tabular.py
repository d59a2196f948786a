import json
import math
import re
import sys
import warnings
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import dlnlab
from dlnlab import Ensemble
from dlnlab.cli import main
from dlnlab.data import TabularRegression
from dlnlab.data.tabular import monomials
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.tables import TableWarning

ROWS, NAMES = 40, ["age", "bmi", "bp", "outcome"]


@pytest.fixture
def values():
    rng = np.random.default_rng(3)
    table = rng.normal(size=(ROWS, 4)) * [1.0, 5.0, 0.1, 30.0] + [50.0, 20.0, 0.0, 150.0]
    table[:, 0] = np.arange(ROWS)  # tells rows apart
    return table


@pytest.fixture
def csv(tmp_path, values):
    return write_csv(tmp_path / "my.csv", values)


def write_csv(path, values, names=NAMES):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in ([names] if names else []) + values.tolist()))
    return str(path)


def ready(path, seeds=1, **options):
    data = TabularRegression(path, **options)
    data.ensemble = Ensemble(seed=seeds)
    data.setup()
    return data


def raw(path, **options):
    """The rows as they are in the file."""
    return ready(path, standardize=False, **options)


def refusal(path, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        ready(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Which columns --------------------------------------------------------------------------------------------------------


def test_the_last_column_is_the_target_and_all_others_are_features(csv, values):
    data = raw(csv, test_fraction=0.0)
    rows = data.problems.x[0, :, 0].long()
    assert np.array_equal(data.problems.x[0], values[rows, :3])
    assert np.array_equal(data.problems.y[0], values[rows, 3])
    assert data.problems.teacher is None
    assert data.problems.x_test is None


@pytest.mark.parametrize("target", ["bmi", 1, -3])
@pytest.mark.parametrize("features", [["bp", "age"], [2, 0], ["bp", 0]])
def test_target_and_features_are_chosen_by_name_or_number(csv, values, target, features):
    problems = raw(csv, target=target, features=features, test_fraction=0.0).problems
    rows = problems.x[0, :, 1].long()
    assert np.array_equal(problems.x[0], values[rows][:, [2, 0]])
    assert np.array_equal(problems.y[0], values[rows, 1])


def test_a_table_without_header_is_chosen_from_by_number(tmp_path, values):
    problems = raw(write_csv(tmp_path / "my.csv", values, names=None), target=1).problems
    rows = problems.x[0, :, 0].long()
    assert np.array_equal(problems.x[0], values[rows][:, [0, 2, 3]])
    assert np.array_equal(problems.y[0], values[rows, 1])


def test_every_format_gives_the_same_problem(tmp_path, csv, values):
    np.savez(tmp_path / "my.npz", y=values[:, 3], X=values[:, :3], note=np.array("anything"))
    torch.save({"X": torch.from_numpy(values[:, :3]), "y": torch.from_numpy(values[:, 3:])}, tmp_path / "my.pt")
    suffixes = ["npz", "pt"]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        pass
    else:
        suffixes.append("parquet")
        table = pyarrow.table(dict(zip(NAMES, values.T, strict=True)))
        pyarrow.parquet.write_table(table, tmp_path / "my.parquet")
    expected = ready(csv, seeds=2).problems
    for suffix in suffixes:
        problems = ready(str(tmp_path / f"my.{suffix}"), seeds=2).problems
        assert torch.equal(problems.x, expected.x)
        assert torch.equal(problems.y, expected.y)
        assert torch.equal(problems.x_test, expected.x_test)


def test_features_of_an_archive_are_counted_within_x(tmp_path, values):
    np.savez(tmp_path / "my.npz", y=values[:, 3], X=values[:, :3])
    problems = raw(str(tmp_path / "my.npz"), features=[0, -1]).problems
    assert np.array_equal(problems.x[0], values[problems.x[0, :, 0].long()][:, [0, 2]])


def test_an_archive_may_hold_single_columns_and_another_target(tmp_path, values):
    np.savez(tmp_path / "my.npz", age=values[:, 0], bmi=values[:, 1], outcome=values[:, 3], id=np.array("none"))
    problems = raw(str(tmp_path / "my.npz"), target="outcome", features=["age", "bmi"]).problems
    rows = problems.x[0, :, 0].long()
    assert np.array_equal(problems.x[0], values[rows, :2])
    assert np.array_equal(problems.y[0], values[rows, 3])


def test_a_matrix_of_targets_stays_a_matrix(tmp_path, values):
    np.savez(tmp_path / "my.npz", X=values[:, :2], y=values[:, 2:])
    problems = ready(str(tmp_path / "my.npz")).problems
    assert problems.y.shape == (1, 30, 2)
    assert torch.allclose(problems.y[0].mean(0), torch.zeros(2).double(), atol=1e-12)  # rounding of 30 terms of size 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target": "weight"}, ["my.csv", '"weight"', "age, bmi, bp, outcome"]),
        ({"features": ["age", "weight"]}, ["my.csv", '"weight"', "age, bmi, bp, outcome"]),
        ({"features": [4]}, ["my.csv", '"4"', "age, bmi, bp, outcome"]),
        ({"features": ["age", 0]}, ["features", '"age"', "twice"]),
        ({"features": ["age", "outcome"]}, ["features", '"outcome"', "is the target"]),
        ({"features": []}, ["my.csv", "at least one feature"]),
    ],
)
def test_a_choice_of_columns_that_cannot_be_is_refused(csv, options, parts):
    message = refusal(csv, **options)
    assert all(part in message for part in parts)


def test_a_single_column_is_refused(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("age\n1\n2\n")
    assert "it was read as one column: none of tab ; , | :: spaces divides its rows" in refusal(str(path))


CARS = [
    (18.0, 8, 307.0, 1, "car a"),
    (15.0, 8, 350.0, 1, "car b"),
    (24.0, 4, 113.0, 3, "car c"),
    (27.0, 4, 97.0, 3, "NA"),
]


def cars(path, options=None, columns=slice(0, 5), separator=",", first=""):
    path.write_text(first + "".join(separator.join(map(str, row[columns])) + "\n" for row in CARS))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        data = raw(str(path), test_fraction=0.0, **(options or {}))
    rows = {(*x, y) for x, y in zip(data.problems.x[0].tolist(), data.problems.y[0].tolist(), strict=True)}
    return rows, " | ".join(str(warning.message) for warning in heard)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"target": 0, "features": [1, 2]}, (1, 2, 0)),
        ({"target": "0", "features": ["2", 1]}, (2, 1, 0)),
        ({"target": -5, "exclude": [4]}, (1, 2, 3, 0)),
        ({"target": 3, "exclude": ["4", -4]}, (0, 2, 3)),
        ({"target": 0, "features": [1, 2, 4], "exclude": [4]}, (1, 2, 0)),
    ],
)
def test_numbers_count_columns_where_the_first_row_is_data(tmp_path, options, chosen):
    rows, said = cars(tmp_path / "cars.csv", options)
    assert rows == {tuple(float(row[i]) for i in chosen) for row in CARS}
    assert "cars.csv, line 1: the first row (18.0, 8, 307.0, 1, car a) was taken for data" in said
    assert "give `header: true`" in said
    assert cars(tmp_path / "cars.csv", {**options, "header": False}) == (rows, "")


def test_a_run_says_what_was_guessed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cars(tmp_path / "target.csv", {"target": 0, "exclude": [4]})
    options = {"path": "target.csv", "target": '"0"', "exclude": [4]}
    config = {
        "model": {"class_path": "DiagonalLinearNetwork"},
        "data": {"class_path": "TabularRegression", "init_args": options},
        "trainer": {"max_steps": 1, "enable_progress_bar": False},
    }
    (tmp_path / "target.yaml").write_text(json.dumps(config))
    said = "target.csv, line 1: the first row (18.0, 8, 307.0, 1, car a) was taken for data"
    assert main(["fit", "--config", "target.yaml"]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"dlnlab fit: {said}")
    assert err.count("\n") == 1
    with pytest.warns(TableWarning, match=re.escape(said)):
        dlnlab.run(config)
    options["header"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", TableWarning)
        dlnlab.run(config)


def test_columns_without_a_name_are_left_out_and_said_unless_they_are_asked_for(tmp_path):
    path = tmp_path / "cars.csv"
    header = ",a,b,c,\n"
    rows, said = cars(path, {}, first=header)
    assert rows == {tuple(map(float, row[1:4])) for row in CARS}
    assert "columns 0, 4 have no name and are left out" in said
    assert cars(path, {"features": [0, "a"], "target": "b"}, first=header) == ({row[:3] for row in CARS}, "")
    assert cars(path, {"exclude": [0, 4], "target": "b"}, first=header) == ({(*row[1:4:2], row[2]) for row in CARS}, "")


def test_texts_among_all_features_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"column \"4\": 'car a': .*; `exclude` leaves columns out of the features"):
        cars(tmp_path / "cars.csv", {"target": 0})
    with pytest.raises(ValueError, match=r"exclude: column \"0\" is the target"):
        cars(tmp_path / "cars.csv", {"target": 0, "exclude": [0]})
    with pytest.raises(ValueError, match=r'exclude: .*cars.csv has no column "5"'):
        cars(tmp_path / "cars.csv", {"exclude": [5]})
    with pytest.raises(ValueError, match="header: only a text table has a header"):
        TabularRegression(header=True)


def test_an_archive_without_y_lists_what_it_has(tmp_path, values):
    np.savez(tmp_path / "my.npz", X=values, labels=values[:, 0])
    assert 'no array "y"; it has X, labels' in refusal(str(tmp_path / "my.npz"))


def test_x_and_y_of_different_lengths_are_refused(tmp_path, values):
    np.savez(tmp_path / "my.npz", X=values, y=values[1:, 0])
    assert '"X[0]" has 40 rows and "y" has 39' in refusal(str(tmp_path / "my.npz"))


def test_a_bad_entry_in_a_column_that_is_left_out_does_no_harm(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("name,age,y\n" + "".join(f"Anna,{i},{i * i}\n" for i in range(8)))
    assert "line 2 (row 1), column \"name\": 'Anna'" in refusal(str(path))
    assert ready(str(path), features=["age"]).problems.x.shape == (1, 6, 1)


# When errors come -----------------------------------------------------------------------------------------------------


def test_the_constructor_reads_nothing_and_setup_reads_once(csv, tmp_path):
    TabularRegression(str(tmp_path / "none.csv"))
    data = ready(csv)
    problems = data.problems
    (tmp_path / "my.csv").unlink()
    data.setup()
    assert data.problems is problems
    assert "there is no such file" in refusal(csv)


@pytest.mark.parametrize(
    "options",
    [
        {"test_fraction": 1.0},
        {"test_fraction": -0.1},
        {"test_fraction": math.nan},
        {"num_samples": 1},
        {"num_samples": 2.5},
        {"expansion": "fourier"},
        {"degree": 0},
        {"num_features": 0},
    ],
)
def test_an_argument_out_of_range_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TabularRegression(**options)


def test_more_training_rows_than_there_are_is_refused(csv):
    message = refusal(csv, num_samples=31)
    assert "my.csv has 40 rows, of which test_fraction = 0.25 takes 10: 30 are left" in message
    assert "num_samples = 31" in message


def test_a_table_too_short_to_train_on_is_refused(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    assert "1 are left to train on, and there must be at least 2" in refusal(str(path), test_fraction=0.5)


@pytest.mark.parametrize(("column", "advice"), [("bp", "leave it out with `features`"), ("outcome", "another target")])
def test_a_constant_column_is_named_if_it_must_be_standardized(tmp_path, values, column, advice):
    values[:, NAMES.index(column)] = 0.1
    path = write_csv(tmp_path / "my.csv", values)
    message = refusal(path)
    assert f'my.csv, column "{column}": must vary' in message
    assert advice in message
    raw(path)


def test_an_expansion_beyond_memory_is_refused_before_it_is_made(csv):
    assert "bytes" in refusal(csv, expansion="polynomial", degree=20000)


def test_a_missing_scikit_learn_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = refusal(None)
    assert "pip install 'dlnlab[examples]'" in message
    assert "path" in message


# Which rows -----------------------------------------------------------------------------------------------------------


def rows_of(problems, seed):
    return problems.x[seed, :, 0].long().tolist(), problems.x_test[seed, :, 0].long().tolist()


def test_training_and_test_rows_are_disjoint_and_together_all(csv):
    problems = raw(csv, seeds=5).problems
    for seed in range(5):
        train, test = rows_of(problems, seed)
        assert (len(train), len(test)) == (30, 10)
        assert sorted(train + test) == list(range(ROWS))


def test_each_seed_divides_the_rows_its_own_way_and_always_the_same(csv):
    first, again = raw(csv, seeds=5).problems, raw(csv, seeds=5).problems
    assert torch.equal(first.x, again.x)
    assert len({frozenset(rows_of(first, seed)[1]) for seed in range(5)}) == 5


def test_every_row_is_a_test_row_equally_often(csv):
    seeds, count = 400, torch.zeros(ROWS)
    problems = raw(csv, seeds=seeds).problems
    for seed in range(seeds):
        count[rows_of(problems, seed)[1]] += 1
    spread = (seeds * 0.25 * 0.75) ** 0.5
    assert (count - seeds * 0.25).abs().max() < 5 * spread


def test_members_of_one_seed_share_its_problem(csv):
    data = TabularRegression(csv)
    data.ensemble = Ensemble(lr=[0.1, 0.2], seed=[4, 7], batch_size=[1, "full"])
    data.setup()
    assert data.problems.x.shape[0] == 2
    assert data.data_index.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    alone = TabularRegression(csv)
    alone.ensemble = Ensemble(seed=[7])
    alone.setup()
    assert torch.equal(alone.problems.x[0], data.problems.x[1])


def test_fewer_training_rows_are_some_of_the_many_and_the_test_rows_stay(csv):
    many, few = raw(csv, seeds=3).problems, raw(csv, seeds=3, num_samples=7).problems
    assert torch.equal(few.x, many.x[:, :7])
    assert torch.equal(few.y, many.y[:, :7])
    assert torch.equal(few.x_test, many.x_test)


def test_columns_of_a_row_stay_together(csv, values):
    problems = raw(csv, seeds=3).problems
    for part, target in ((problems.x, problems.y), (problems.x_test, problems.y_test)):
        rows = part[..., 0].long()
        assert np.array_equal(part, values[rows, :3])
        assert np.array_equal(target, values[rows, 3])


# Standardization ------------------------------------------------------------------------------------------------------


def test_standardization_is_by_the_training_rows_alone(csv, values):
    plain, scaled = raw(csv, seeds=3).problems, ready(csv, seeds=3).problems
    for seed in range(3):
        train, test = (values[rows] for rows in rows_of(plain, seed))
        mean, std = train.mean(0), np.sqrt(((train - train.mean(0)) ** 2).mean(0))
        for part, x, y in ((train, scaled.x, scaled.y), (test, scaled.x_test, scaled.y_test)):
            expected = (part - mean) / std
            # two orders of summing 30 numbers, whose mean is up to 50 times their spread
            assert np.allclose(x[seed], expected[:, :3], rtol=0, atol=1e-12)
            assert np.allclose(y[seed], expected[:, 3], rtol=0, atol=1e-12)


def test_the_test_rows_do_not_move_the_training_rows(csv, values, tmp_path):
    before = ready(csv).problems
    test = rows_of(raw(csv).problems, 0)[1]
    values[test, 1:] *= 100
    after = ready(write_csv(tmp_path / "other.csv", values)).problems
    assert torch.equal(before.x, after.x)
    assert torch.equal(before.y, after.y)
    assert not torch.equal(before.x_test, after.x_test)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_feature_constant_over_the_training_rows_alone_becomes_zero_there(tmp_path, values, value):
    path = write_csv(tmp_path / "my.csv", values)
    test = rows_of(raw(path).problems, 0)[1]
    values[:, 1] = value
    values[test[0], 1] += 1
    problems = ready(write_csv(tmp_path / "my.csv", values)).problems
    assert problems.x[0, :, 1].abs().max() <= 1e-9  # the mean of equal numbers is off by rounding, at 1e6 by 1e-10
    assert torch.allclose(problems.x_test[0, 0, 1], torch.ones(()).double())


# Expansions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_monomials_are_all_products_of_up_to_degree_features(degree):
    x = np.random.default_rng(0).normal(size=(5, 3))
    expected = [
        np.prod([x[:, j] for j in chosen], axis=0)
        for count in range(1, degree + 1)
        for chosen in combinations_with_replacement(range(3), count)
    ]
    found = monomials(torch.from_numpy(x), degree)
    assert found.shape == (5, math.comb(3 + degree, degree) - 1)
    assert np.allclose(found, np.stack(expected, axis=1))


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_monomials_agree_with_scikit_learn(degree):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x = np.random.default_rng(0).normal(size=(5, 3))
    expected = preprocessing.PolynomialFeatures(degree, include_bias=False).fit_transform(x)
    assert np.allclose(monomials(torch.from_numpy(x), degree), expected)


def standardized(train, part):
    mean = train.mean(0)
    return (part - mean) / np.sqrt(((train - mean) ** 2).mean(0))


def test_the_polynomial_is_of_standardized_features_and_standardized_again(csv):
    plain, expanded = ready(csv, seeds=2).problems, ready(csv, seeds=2, expansion="polynomial").problems
    assert expanded.x.shape == (2, 30, 9)
    for seed in range(2):
        train = monomials(plain.x[seed], 2).numpy()
        test = monomials(plain.x_test[seed], 2).numpy()
        assert np.allclose(expanded.x[seed], standardized(train, train))
        assert np.allclose(expanded.x_test[seed], standardized(train, test))
    assert torch.equal(expanded.y, plain.y)


def test_random_features_are_rectified_projections_drawn_by_the_seed(csv):
    options = {"seeds": 2, "expansion": "random_features", "num_features": 50}
    plain, expanded = raw(csv, seeds=2).problems, raw(csv, **options).problems
    assert expanded.x.shape == (2, 30, 50)
    assert (expanded.x >= 0).all()
    weights = []
    for seed in range(2):
        # A feature that is positive on enough rows tells its weights.
        x, z = plain.x[seed], expanded.x[seed]
        chosen = [j for j in range(50) if (z[:, j] > 0).sum() >= 4]
        found = torch.stack([torch.linalg.lstsq(x[z[:, j] > 0], z[z[:, j] > 0, j]).solution for j in chosen])
        weights.append(found)
        expected = torch.relu(plain.x_test[seed] @ found.T)
        assert torch.allclose(expanded.x_test[seed][:, chosen], expected, atol=1e-8)  # condition of x, some thousand
    assert not torch.allclose(weights[0][:5], weights[1][:5])
    assert 0.4 < torch.cat(weights).std() * 3**0.5 < 1.6  # N(0, 1/D) with D = 3, seen on the active half


def test_random_features_are_standardized_and_more_than_samples_if_wanted(csv):
    problems = ready(csv, expansion="random_features", num_features=70, num_samples=12).problems
    assert problems.x.shape == (1, 12, 70)
    std = problems.x[0].std(0, correction=0)
    assert ((std - 1).abs() < 1e-9).logical_or(std == 0).all()  # a feature may be zero on all 12 rows
    assert (std > 0).sum() > 50
    assert torch.isfinite(problems.x_test).all()


def test_more_random_features_leave_the_test_rows_and_targets(csv):
    few = ready(csv, expansion="random_features", num_features=5).problems
    many = ready(csv, expansion="random_features", num_features=9).problems
    assert torch.equal(few.y, many.y)
    assert torch.equal(few.y_test, many.y_test)


def test_expanded_columns_that_are_constant_do_no_harm(tmp_path, values):
    values[:, 1] = np.resize([1.0, -1.0], ROWS)  # its square is constant
    problems = ready(write_csv(tmp_path / "my.csv", values), expansion="polynomial", test_fraction=0.0).problems
    assert torch.isfinite(problems.x).all()
    assert problems.x[0].abs().amax(0).min() < 1e-9


# In a fit -------------------------------------------------------------------------------------------------------------


def fit(data, max_steps, folder=None, ckpt_path=None):
    model = DiagonalLinearNetwork(ensemble=Ensemble(lr=[0.01, 0.02], seed=2, batch_size=[1, "full"]))
    trainer = Trainer(
        max_steps=max_steps,
        logger=False,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=5)] if folder else [],
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_network_learns_and_has_no_distance(csv):
    model = fit(TabularRegression(csv), 30)
    assert "no teacher" in model.variables()["distance"]
    assert model.measure(["test_loss"])["test_loss"].shape == (8,)
    half = model.problems.y.square().mean(1)[model.problem_index] / 2
    assert (model.full_losses() < half).all()


@pytest.mark.filterwarnings("ignore")
def test_a_resume_goes_on_with_the_same_numbers_and_refuses_others(csv, values, tmp_path):
    whole = fit(TabularRegression(csv), 10)
    fit(TabularRegression(csv), 5, tmp_path / "checkpoints")
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    resumed = fit(TabularRegression(csv), 10, tmp_path / "more", ckpt_path=last)
    assert torch.equal(resumed.w_plus, whole.w_plus)
    values[3, 2] += 1
    write_csv(tmp_path / "my.csv", values)
    with pytest.raises(ValueError, match=r"my.csv has changed since the checkpoint"):
        fit(TabularRegression(csv), 10, tmp_path / "more", ckpt_path=last)


def test_the_built_in_table_is_scikit_learns_as_measured():
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_diabetes(scaled=False)
    problems = raw(None, test_fraction=0.0).problems
    assert problems.x.shape == (1, 442, 10)
    expected = {(*row, y) for row, y in zip(found.data.tolist(), found.target.tolist(), strict=True)}
    assert {(*row, y) for row, y in zip(problems.x[0].tolist(), problems.y[0].tolist(), strict=True)} == expected
