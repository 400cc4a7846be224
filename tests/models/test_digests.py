"""A digest tells a function by what it computes: layout, comments and annotations do not count, and code does."""

from ringflash.models.digests import digest, globals_of


def plain(x):
    return x + 1


def commented(x: int) -> int:
    """The same."""
    return (  # on two lines
        x + 1
    )


def annotated(x: int) -> int:
    """The same."""
    # one more than x

    return x + 1  # there


def other(x):
    return x + 2


def test_layout_comments_docstrings_and_annotations_do_not_count():
    assert digest(annotated) == digest(plain)


def test_other_code_has_another_digest():
    assert len({digest(plain), digest(other), digest(commented)}) == 3  # brackets are tokens


def test_what_has_no_source_has_no_digest():
    assert digest(len) == ""


def test_the_names_of_a_function_are_those_of_its_module():
    assert globals_of(plain)["other"] is other
    assert globals_of(len) == {}
