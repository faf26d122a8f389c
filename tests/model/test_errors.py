"""The tree of errors, and what is none of it."""

from __future__ import annotations

import pytest

from layerkit.model import errors


def test_every_error_has_a_code_of_its_own_kind() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, BaseException)]
    assert {each.exit_code for each in kinds if issubclass(each, errors.LayerkitError)} <= {1, 2, 3, 4, 5}
    assert [each for each in kinds if not issubclass(each, errors.LayerkitError)] == [errors.Cancelled]


def test_nothing_that_catches_errors_catches_an_interruption() -> None:
    with pytest.raises(errors.Cancelled) as stopped:
        try:
            raise errors.Cancelled("enough")
        except (errors.LayerkitError, Exception):
            pass
    assert stopped.value.exit_code == 130
