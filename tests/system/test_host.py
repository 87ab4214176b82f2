"""What a run changes in the process that calls it is put back."""

import warnings

from mnist.system.host import restored_afterwards


def test_the_filters_of_warnings_are_the_callers_again() -> None:
    before = list(warnings.filters)
    with restored_afterwards():
        warnings.filterwarnings("ignore", message="anything")
    assert warnings.filters == before
