import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlnlab import Ensemble

AXES = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.lists(st.floats(1e-6, 10), min_size=1, max_size=4, unique=True),
        "batch_size": st.lists(st.sampled_from([1, 5, "full"]), min_size=1, max_size=3, unique=True),
        "seed": st.lists(st.integers(0, 2**62), min_size=1, max_size=4, unique=True),
        "sparsity": st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    },
)


@given(AXES, st.randoms())
def test_members_are_the_product_of_the_axes_with_the_last_written_varying_fastest(axes, random):
    names = list(axes)
    random.shuffle(names)
    ensemble = Ensemble(**{name: axes[name] for name in names})
    combinations = list(product(*(axes[name] for name in names)))
    assert ensemble.num_members == len(combinations) == math.prod(ensemble.shape)
    assert ensemble.labels == [dict(zip(names, combination, strict=True)) for combination in combinations]
    for place, name in enumerate(names):
        found = getattr(ensemble, name)
        assert (found if isinstance(found, list) else found.tolist()) == [c[place] for c in combinations]


@given(AXES)
def test_members_of_one_seed_and_equal_data_axes_share_one_problem(axes):
    ensemble = Ensemble(**axes)
    for data_axes in ((), ("sparsity",)):
        ensemble.data_axes = data_axes
        index = ensemble.data_index.tolist()
        keys = [tuple(label.get(name) for name in ("seed", *data_axes)) for label in ensemble.labels]
        for i, j in product(range(len(keys)), repeat=2):
            assert (index[i] == index[j]) == (keys[i] == keys[j])
        assert sorted(set(index)) == list(range(len(set(keys))))  # numbered without gaps


def test_groups_are_numbered_as_they_first_appear():
    ensemble = Ensemble(lr=[0.1, 0.2], seed=[7, 3, 5])
    index, combinations = ensemble.group(("seed", "nothing"))
    assert index.tolist() == [0, 1, 2, 0, 1, 2]
    assert combinations == [{"seed": 7}, {"seed": 3}, {"seed": 5}]


def test_an_ensemble_without_axes_is_one_member_of_seed_zero():
    ensemble = Ensemble()
    assert ensemble.num_members == 1
    assert ensemble.seed.tolist() == [0]
    assert ensemble.data_index.tolist() == [0]
    assert ensemble.label(0) == "the only member"


def test_an_integer_seed_is_a_number_of_seeds_and_a_list_the_seeds():
    assert Ensemble(seed=3).axes["seed"] == [0, 1, 2]
    assert Ensemble(seed=[3]).axes["seed"] == [3]
    assert Ensemble(seed={"range": [2, 4]}).axes["seed"] == [2, 3]


def test_an_integer_on_any_other_axis_is_that_number():
    assert Ensemble(batch_size=3).axes["batch_size"] == [3]


def test_axes_are_tensors_of_their_kind_and_texts_lists():
    ensemble = Ensemble(lr=[1, 2], sparsity=[1, 2, 3], batch_size=[1, "full"], seed=[2**40])
    assert ensemble.lr.dtype == torch.float64
    assert ensemble.sparsity.dtype == ensemble.seed.dtype == torch.int64
    assert ensemble.batch_size == [1, "full"] * 6
    assert ensemble.seed.unique().tolist() == [2**40]


def test_every_form_of_the_grammar_makes_an_axis():
    ensemble = Ensemble(lr={"log10": [-2, 0, 3]}, init_scale={"linear": [1, 2, 2]}, sparsity=np.array([1, 4]))
    assert ensemble.axes == {"lr": pytest.approx([0.01, 0.1, 1]), "init_scale": [1, 2], "sparsity": [1, 4]}


def test_a_members_label_names_its_values():
    assert Ensemble(lr=[0.1, 0.25], batch_size=["full"], seed=2).label(3) == "lr=0.25, batch_size=full, seed=1"


def test_an_axis_that_does_not_exist_lists_those_that_do():
    with pytest.raises(AttributeError, match="no axis 'momentum'; its axes are lr, seed"):
        _ = Ensemble(lr=[0.1], seed=2).momentum


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"lr": [0.1, 0.2, 0.3, -0.1]}, r"^ensemble\.lr\[3\] = -0\.1: a step size must be positive and finite$"),
        ({"lr": 0}, r"^ensemble\.lr\[0\] = 0: a step size must be positive and finite$"),
        ({"lr": [math.inf]}, r"^ensemble\.lr\[0\] = inf: a step size"),
        ({"lr": [math.nan]}, r"^ensemble\.lr\[0\] = nan: a step size"),
        ({"lr": [True]}, r"^ensemble\.lr\[0\] = True: a step size"),
        ({"lr": ["fast"]}, r"^ensemble\.lr\[0\] = 'fast': a step size"),
        ({"lr": None}, r"^ensemble\.lr\[0\] = None: a step size"),
        ({"lr": [0.1, 0.2, 0.1]}, r"^ensemble\.lr\[2\] = 0\.1 repeats ensemble\.lr\[0\]: give it once$"),
        ({"batch_size": ["full", 1, "full"]}, r"^ensemble\.batch_size\[2\] = 'full' repeats ensemble\.batch_size\[0\]"),
        ({"lr": []}, r"^ensemble\.lr is empty: it needs at least one value$"),
        ({"lr": {"log10": [0, 1]}}, r"^ensemble\.lr\.log10 = \[0, 1\]: must be \[lo, hi, n\]"),
        ({"seed": 0}, r"^ensemble\.seed = 0: must be at least 1$"),
        ({"seed": [-1]}, r"^ensemble\.seed\[0\] = -1: must be at least 0$"),
        ({"seed": [2**62 + 1]}, r"^ensemble\.seed\[0\] = \d+: must be at most \d+$"),
        ({"seed": [0.5]}, r"^ensemble\.seed\[0\] = 0\.5: must be a whole number$"),
        ({"seed": [True]}, r"^ensemble\.seed\[0\] = True: must be a whole number$"),
        ({"noise_std": [0, math.nan]}, r"^ensemble\.noise_std\[1\] = nan: must be a finite number or a text$"),
        ({"noise_std": [[0]]}, r"^ensemble\.noise_std\[0\] = \[0\]: must be a finite number or a text$"),
    ],
)
def test_a_mistake_in_an_axis_is_named_with_its_place_and_value(axes, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(**axes)


def test_the_root_of_the_streams_is_a_32_bit_word():
    assert Ensemble(root=2**32 - 1).root == 2**32 - 1
    with pytest.raises(ValueError, match=r"^seed = 4294967296: must be at most 4294967295$"):
        Ensemble(root=2**32)
