"""The split of ratings: what is held out, who is dropped, and the negatives."""

import numpy as np
import pytest

from tasks.data.leave_one_out import Ratings, split
from tests.ratings import ratings_of, together


def test_the_last_rating_in_time_is_held_out_and_the_largest_id_of_equal_times() -> None:
    times = np.arange(20)
    first = Ratings(np.repeat(0, 20), np.arange(20), np.where(times == 7, 99, times))  # item 7 is last
    second = Ratings(np.repeat(1, 20), np.arange(10, 30), np.repeat(5, 20))  # all at once, so item 29
    blocks = [Ratings(np.repeat(2 + b, 20), np.arange(20 * b, 20 * b + 20), times) for b in range(8)]
    found = split(together(first, second, *blocks))
    assert found.test_items[:, 0].tolist() == [7, 29, 19, 39, 59, 79, 99, 119, 139, 159]
    assert found.items[found.users == 0].tolist() == [i for i in range(20) if i != 7]
    assert found.items[found.users == 1].tolist() == list(range(10, 29))


def test_a_user_who_rated_nearly_all_items_is_an_error() -> None:
    greedy = Ratings(np.repeat(0, 150), np.arange(150), np.arange(150))
    other = Ratings(np.repeat(1, 20), np.arange(160, 180), np.arange(20))
    with pytest.raises(
        ValueError, match=r"100 items that each user never rated; a user rated 150 of the 170 items"
    ):
        split(together(greedy, other))


def test_the_split_does_not_depend_on_the_order_of_lines() -> None:
    ratings = ratings_of(30, 25, 200)
    shuffled = ratings[np.random.default_rng(1).permutation(len(ratings.users))]
    one, other = vars(split(ratings)), vars(split(shuffled))
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_users_with_few_ratings_are_dropped_and_a_pair_rated_twice_counts_once_the_last_time() -> None:
    ratings = ratings_of(30, 20, 200)
    again = Ratings(ratings.users[:1], ratings.items[:1], np.array([10**6]))  # now the user's last
    one_less = Ratings(np.repeat(999, 20), 3 * np.minimum(np.arange(20), 18), np.arange(20))  # 19 distinct
    single = Ratings(np.array([5]), np.array([3]), np.array([1]))
    found = split(together(ratings, again, one_less, single))
    assert found.num_users == 30
    assert np.bincount(found.users).tolist() == [19] * 30
    kept = np.unique(ratings.items)
    assert kept[found.test_items[ratings.users[0] // 10, 0]] == ratings.items[0]


def test_no_user_with_twenty_ratings_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a user with 20 ratings or more, found none"):
        split(ratings_of(30, 19, 200))


def test_negatives_are_100_distinct_items_that_the_user_never_rated() -> None:
    ratings = ratings_of(60, 40, 145)  # 105 are left: repeats and rated ones are common
    found = split(ratings)
    assert found.num_items == 145
    assert {array.dtype for array in (found.users, found.items, found.test_items)} == {np.dtype(np.int32)}
    for user in range(60):
        rated = set(ratings.items[ratings.users == 10 * user] // 3)
        held_out, *negatives = found.test_items[user].tolist()
        assert held_out in rated
        assert len(set(negatives)) == 100
        assert not rated & set(negatives)
        assert rated == {held_out, *found.items[found.users == user].tolist()}


def test_every_unrated_item_is_as_likely_a_negative() -> None:
    ratings = Ratings(np.repeat(np.arange(2000), 20), np.tile(np.arange(20), 2000), np.zeros(40_000))
    others = Ratings(np.repeat(2000 + np.arange(10), 20), 20 + np.arange(200), np.zeros(200))
    counts = np.bincount(split(together(ratings, others)).test_items[:2000, 1:].reshape(-1), minlength=220)
    assert counts[:20].sum() == 0
    # 100 of 200 without replacement, 2,000 times: mean 1,000, deviation 22.4; 5 of them over 200 items: 1e-4.
    assert np.abs(counts[20:] - 1000).max() <= 5 * 22.4
