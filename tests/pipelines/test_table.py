"""The pipelines of docs/pipelines.md do what the page says."""

import pytest
from cases import PAGE, ROWS, page, verify


@pytest.mark.parametrize("name", ROWS)
def test_a_pipeline_of_the_table_passes_the_common_check(name):
    verify(ROWS[name])


def test_the_page_is_the_one_that_the_table_makes():
    assert PAGE.read_text(encoding="utf-8") == page()
