"""Words for messages."""

from runtime.wording import first_of


def test_of_many_names_the_first_are_listed_and_the_others_counted() -> None:
    assert first_of(["a"]) == "a" and first_of([]) == ""
    assert first_of("abcde") == "a, b, c, d, e"
    assert first_of("abcdef") == "a, b, c, d, e and 1 more"
    assert first_of([str(number) for number in range(2_000)], most=2) == "0, 1 and 1,998 more"
