"""Scores to merges: exact, or refused."""

import pytest
from gguf import TokenType

from optrot_edge.errors import InputError
from optrot_edge.exporters.spm_merges import merges_of_scores, sentencepiece_scores


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    return merges_of_scores(list(scores), [TokenType.NORMAL] * len(scores), list(scores.values()))


def runs(*lengths: int, score: float = -9.0) -> dict[str, float]:
    return {"u": 0.0} | {"u" * length: score for length in lengths}


def test_undoes_sentencepiece_scores():
    tokens, types = ["a", "b", "c", "ab", "bc", "abc"], [1] * 6
    listed = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    found = merges_of_scores(tokens, types, sentencepiece_scores(tokens, types, listed))
    assert found[:2] == listed[:2] and sorted(found) == sorted(listed)


def test_runs_of_one_score():
    found = merges(runs(2, 3, 4))
    assert found[:2] == [("u", "u"), ("uu", "uu")] and set(found[2:]) == {("u", "uu"), ("uu", "u"), ("u", "uuu"),
                                                                        ("uuu", "u")}
    assert merges(runs(*range(2, 15), 16))  # Mistral's runs of spaces


@pytest.mark.parametrize(("scores", "message"), [
    (runs(2, 3), "'uu' and 'uuu' have the same score"),  # four are uuu·u, and uu·uu by rank
    (runs(2, 3, 4) | {"x": 0, "uux": -9.0}, "have the same score"),
    ({"a": 0, "b": 0, "c": 0, "ab": -1000, "bc": -1000}, "'ab' and 'bc' have the same score"),
    # the next pair of "aa" makes "aaaa" as soon as there are two, before "bbaa"
    ({"a": 0, "b": 0, "bb": -1, "aaaa": -4, "aa": -6, "bbaa": -6}, "'aa' and 'bbaa' have the same score"),
    (runs(*range(2, 70)), "have the same score"),  # longer than what is tried
    ({"a": 0, "ab": -1}, "'ab' holds a character that is not a token"),
])
def test_what_merges_cannot_express_is_refused(scores, message):
    with pytest.raises(InputError, match=message):
        merges(scores)


def test_equal_scores_that_do_not_compete_are_kept():
    assert merges({"a": 0, "b": 0, "c": 0, "d": 0, "ab": -1, "cd": -1}) == [("a", "b"), ("c", "d")]


def test_added_tokens_are_not_merged():
    tokens, types = ["a", "b", "ab", "▁", "▁a"], [1, 1, TokenType.USER_DEFINED, 1, TokenType.USER_DEFINED]
    assert merges_of_scores(tokens, types, [0.0] * 5) == [("▁", "a")]
