import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dlnlab import streams

ROOTS = st.integers(0, 2**32 - 1)
SEEDS = st.one_of(st.integers(0, 50), st.integers(2**32 - 2, 2**32 + 2), st.integers(0, 2**62))
STEPS = st.one_of(st.integers(0, 200), st.integers(2**32 - 2, 2**32 + 2), st.integers(0, 2**60))
PURPOSES = st.sampled_from(sorted(oracles.PURPOSES))


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def key_of(root, purpose, *seeds):
    return streams.keys(root, purpose, int64(*seeds))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_published_with_random123(device, counter, key, expected):
    tensors = [torch.tensor(value, dtype=torch.int64, device=device) for value in (*key, *counter)]
    found = streams.philox(tuple(tensors[:2]), tuple(tensors[2:]))
    assert tuple(int(word) for word in found) == expected
    assert oracles.philox(key, counter) == expected


@given(ROOTS, PURPOSES, st.lists(SEEDS, min_size=1, max_size=4))
def test_keys_are_the_oracles_for_every_root_purpose_and_seed(root, purpose, seeds):
    found = key_of(root, purpose, *seeds)
    assert [tuple(key) for key in found.tolist()] == [oracles.stream_key(root, purpose, seed) for seed in seeds]


@given(ROOTS, SEEDS, st.lists(STEPS, min_size=1, max_size=3), st.integers(1, 9))
def test_words_are_the_oracles_for_every_seed_and_step(device, root, seed, steps, count):
    found = streams.words(key_of(root, "flow", seed).to(device), int64(*steps), count)
    key = oracles.stream_key(root, "flow", seed)
    assert found[0].tolist() == [[oracles.word(key, step, j) for j in range(count)] for step in steps]


@given(SEEDS, STEPS, st.integers(1, 7), st.integers(1, 2**31 - 1))
def test_indices_are_the_oracles_for_every_size(seed, step, count, high):
    found = streams.indices(key_of(0, "sampling", seed), int64(step), count, high)
    key = oracles.stream_key(0, "sampling", seed)
    assert found[0, 0].tolist() == [oracles.index(key, step, j, high) for j in range(count)]
    assert 0 <= found.min() and found.max() < high


@given(SEEDS, STEPS, st.integers(1, 7))
def test_uniforms_are_the_oracles_to_the_last_bit(seed, step, count):
    found = streams.uniforms(key_of(3, "inputs", seed), int64(step), count)
    key = oracles.stream_key(3, "inputs", seed)
    assert found.dtype == torch.float64
    assert found[0, 0].tolist() == [oracles.uniform(key, step, j) for j in range(count)]


@given(SEEDS, STEPS, st.integers(1, 7))
def test_normals_are_the_oracles(seed, step, count):
    found = streams.normals(key_of(3, "noise", seed), int64(step), count)
    key = oracles.stream_key(3, "noise", seed)
    expected = [oracles.normal(key, step, j) for j in range(count)]
    # Two mathematical libraries: a unit in the last place of each of log1p, sqrt and cos, absolute where cos is zero.
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=1e-14, atol=1e-15)


@given(SEEDS, STEPS, st.data())
def test_subsets_are_the_oracles_and_their_indices_distinct(seed, step, data):
    size = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(1, size))
    found = streams.subsets(key_of(0, "sampling", seed), int64(step, step + 1), count, size)[0].tolist()
    key = oracles.stream_key(0, "sampling", seed)
    assert found == [oracles.subset(key, each, count, size) for each in (step, step + 1)]
    assert all(len(set(row)) == count and set(row) <= set(range(size)) for row in found)


@pytest.mark.parametrize("sampling", streams.SAMPLINGS)
@given(SEEDS, st.integers(0, 40), st.integers(1, 20), st.data())
def test_batches_of_any_steps_are_the_oracles(device, sampling, seed, start, length, data):
    size = data.draw(st.integers(1, 9))
    count = data.draw(st.integers(1, size))
    key = oracles.stream_key(0, "sampling", seed)
    found = streams.sample(sampling, key_of(0, "sampling", seed).to(device), start, start + length, count, size)[0]
    expected = [oracles.batch_rows(sampling, key, step, count, size) for step in range(start, start + length)]
    assert found.tolist() == expected


@given(SEEDS, st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4))
def test_an_epoch_holds_every_index_at_most_once_and_each_where_batches_fill_it(seed, epoch, count, batches, left_over):
    size = count * batches + min(left_over, count - 1)
    start = epoch * batches
    found = streams.sample("epochs", key_of(0, "sampling", seed), start, start + batches, count, size)[0]
    drawn = found.flatten().tolist()
    assert len(drawn) == len(set(drawn)) == count * batches
    assert set(drawn) <= set(range(size))
    if size == count * batches:
        assert sorted(drawn) == list(range(size))


def test_two_epochs_are_shuffled_differently():
    batches = streams.sample("epochs", key_of(0, "sampling", 4), 0, 4, 5, 10)[0].reshape(2, 10)
    assert sorted(batches[0].tolist()) == sorted(batches[1].tolist())
    assert batches[0].tolist() != batches[1].tolist()


@given(SEEDS, st.integers(0, 50), st.integers(0, 50))
def test_an_epochs_permutation_does_not_depend_on_where_one_starts_to_draw(seed, start, first):
    key = key_of(0, "sampling", seed)
    whole = streams.sample("epochs", key, 0, 110, 2, 7)
    window = streams.sample("epochs", key, start, start + first + 1, 2, 7)
    assert torch.equal(window, whole[:, start : start + first + 1])


def test_a_batch_with_replacement_is_uniform_over_the_rows():
    drawn = streams.sample("replacement", key_of(0, "sampling", 1), 0, 2000, 10, 7).flatten()
    counts = torch.bincount(drawn, minlength=7)
    assert stats.chisquare(counts).pvalue > 1e-4  # the false-alarm rate, were the seed not fixed


def test_a_batch_with_replacement_repeats_rows_as_often_as_it_should():
    drawn = streams.sample("replacement", key_of(0, "sampling", 1), 0, 20000, 2, 7)[0]
    repeats = int((drawn[:, 0] == drawn[:, 1]).sum())
    assert stats.binomtest(repeats, 20000, 1 / 7).pvalue > 1e-4  # the false-alarm rate, were the seed not fixed


def test_every_order_of_a_subset_is_equally_likely():
    drawn = streams.sample("subset", key_of(0, "sampling", 2), 0, 6000, 3, 4)[0]
    counts = torch.bincount((drawn * torch.tensor([16, 4, 1])).sum(-1))
    counts = counts[counts > 0]
    assert len(counts) == math.perm(4, 3)
    assert stats.chisquare(counts).pvalue > 1e-4  # the false-alarm rate, were the seed not fixed


@pytest.mark.parametrize(("draw", "law"), [(streams.uniforms, stats.uniform), (streams.normals, stats.norm)])
def test_floats_follow_their_law_across_positions_steps_and_seeds(draw, law):
    key = streams.keys(0, "inputs", torch.arange(5))
    drawn = draw(key, torch.arange(40), 51).numpy()
    assert stats.kstest(drawn.ravel(), law.cdf).pvalue > 1e-4  # the false-alarm rate, were the seeds not fixed
    for axis in range(3):  # neighbours along seeds, steps and positions are uncorrelated
        a, b = np.moveaxis(drawn, axis, 0)[:-1].ravel(), np.moveaxis(drawn, axis, 0)[1:].ravel()
        assert stats.pearsonr(a, b).pvalue > 1e-4  # likewise


@pytest.mark.parametrize("draw", [streams.words, streams.uniforms, streams.normals])
def test_a_longer_draw_begins_with_the_shorter_one(draw):
    key, steps = key_of(0, "inputs", 5), torch.arange(3)
    assert torch.equal(draw(key, steps, 4), draw(key, steps, 9)[..., :4])
    assert torch.equal(draw(key, steps, 3), draw(key, steps, 9)[..., :3])


@pytest.mark.parametrize("sampling", streams.SAMPLINGS)
def test_one_seed_alone_draws_what_it_draws_among_many(sampling):
    seeds = int64(4, 0, 2**33, 9)
    together = streams.sample(sampling, streams.keys(0, "sampling", seeds), 5, 30, 3, 7)
    for place, seed in enumerate(seeds):
        alone = streams.sample(sampling, streams.keys(0, "sampling", seed), 5, 30, 3, 7)
        assert torch.equal(alone, together[place])


def test_roots_purposes_seeds_and_steps_all_give_streams_of_their_own():
    draws = [
        streams.words(streams.keys(root, purpose, int64(seed)), int64(step), 4).flatten().tolist()
        for root in (0, 1)
        for purpose in oracles.PURPOSES
        for seed in (0, 1, 2**32)
        for step in (0, 1, 2**32)
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws) == 2 * 8 * 3 * 3


@pytest.mark.parametrize("root", [-1, 2**32, 0.5, True])
def test_a_root_that_is_no_32_bit_word_is_refused(root):
    with pytest.raises(ValueError, match=r"seed = .*: must be"):
        streams.keys(root, "inputs", int64(0))


def test_an_unknown_purpose_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"purpose = 'lunch': must be one of inputs, teacher"):
        streams.keys(0, "lunch", int64(0))


@given(ROOTS, SEEDS, st.integers(0, 100))
def test_a_stream_draws_what_the_functions_draw_for_its_seed(root, seed, step):
    stream = streams.Stream(root, seed)
    key = oracles.stream_key(root, "teacher", seed)
    assert stream.uniforms("teacher", (2, 3), step).flatten().tolist() == [
        oracles.uniform(key, step, j) for j in range(6)
    ]
    np.testing.assert_allclose(  # two mathematical libraries, as above
        stream.normals("teacher", (5,), step), [oracles.normal(key, step, j) for j in range(5)], rtol=1e-14, atol=1e-15
    )
    assert stream.signs("teacher", (3, 2), step).flatten().tolist() == [
        2.0 * oracles.index(key, step, j, 2) - 1 for j in range(6)
    ]
    assert {getattr(stream, kind)("teacher", (2,)).dtype for kind in ("uniforms", "normals", "signs")} == {
        torch.float64
    }
    assert stream.subset("teacher", 3, 5, step).tolist() == oracles.subset(key, step, 3, 5)


def test_a_stream_starts_anew_at_every_call_and_has_the_shape_asked_for():
    stream = streams.Stream(0, 7)
    first = stream.normals("inputs", (2, 5, 3))
    stream.uniforms("inputs", (4,))
    assert first.shape == (2, 5, 3)
    assert first.dtype == torch.float64
    assert torch.equal(stream.normals("inputs", (2, 5, 3)), first)
    assert not torch.equal(stream.normals("inputs", (2, 5, 3), step=1), first)
    assert torch.equal(stream.normals("inputs", (1, 5, 3))[0], first[0])
