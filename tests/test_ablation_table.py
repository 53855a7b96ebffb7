"""The method page's table is the one that the checked-in results make."""

from pathlib import Path

import pytest
from made_up import row, rows

from compare.ablation_table import ablation_markdown, main
from compare.pages import ResultsError

ROOT = Path(__file__).parents[1]
RESULTS = str(ROOT / "bench" / "results" / "flux_tiny.json")


def test_the_method_page_is_generated_from_the_results():
    assert main([RESULTS, "--into", str(ROOT / "docs" / "method.md"), "--check"]) == 0, "run: make figures"


def test_a_method_page_that_differs_is_noticed(tmp_path, capsys):
    page = tmp_path / "method.md"
    page.write_text("<!-- ablation:begin -->\n<!-- ablation:end -->\n")
    assert main([RESULTS, "--into", str(page), "--check"]) == 1 and "make figures" in capsys.readouterr().err
    assert main([RESULTS, "--into", str(page)]) == 0
    assert main([RESULTS, "--into", str(page), "--check"]) == 0


def test_a_column_a_cost_and_ours_in_the_last_line():
    parts = [row("a", "ablation", steps, psnr=steps + 20.0, lpips=0.5) for steps in (14, 9)]
    ours = [row("ours", "ours", steps, psnr=50.0, lpips=0.25) for steps in (14, 9)]
    lines = ablation_markdown([*ours, *parts]).splitlines()
    assert lines[2:] == [
        "| Variant | PSNR at 14 | PSNR at 9 | LPIPS at 14 | LPIPS at 9 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| a | 34.00 | 29.00 | 0.5000 | 0.5000 |",
        "| **ours** | **50.00** | **50.00** | **0.2500** | **0.2500** |",
    ]


def test_a_variant_that_was_not_measured_everywhere_says_so():
    made = [row("a", "ablation", 14), row("b", "ablation", 14), row("b", "ablation", 9)]
    assert "| a | 62.00 | not measured | 0.0021 | not measured |" in ablation_markdown(made)


def test_rows_without_an_ablation_or_of_two_models_are_refused():
    for wrong in ([row()], [*rows(), row("a", "ablation", 14, model="other")]):
        with pytest.raises(ResultsError, match="ablation of one model"):
            ablation_markdown(wrong)
