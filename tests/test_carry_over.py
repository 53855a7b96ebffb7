"""Prompts unlike those of the calibration, and one unlike the others within it."""

import ablation
import carry_over
import numpy as np

from tiny_training.emoji import load_subjects


def test_captions_of_one_kind_name_nothing_of_the_other():
    faces, vehicles = carry_over.faces(), carry_over.vehicles()
    assert len(set(faces)) == len(faces) >= 8 and len(set(vehicles)) == len(vehicles) >= 16
    names = [subject.phrase for subject in load_subjects("stills")]
    assert all("face" in prompt.split(",")[0] for prompt in faces)
    assert {prompt.split(",")[0] for prompt in vehicles} == set(carry_over.VEHICLES) <= set(names)


def test_the_table_has_a_line_a_method_and_a_column_a_kind_and_cost():
    rows = [
        {"method": method, "kind": kind, "asked_steps": count, "psnr": psnr, "psnr_p10": psnr - 5, "n": 32}
        for method, psnr in (("seacache", 30.0), ("ertacache", 40.0))
        for kind in carry_over.KINDS.values()
        for count in (9, 14)
    ]
    made = carry_over.table({"model": "tiny", "num_inference_steps": 28, "rows": rows[1:]})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines() if "|" in line]
    assert lines[0][1:] == [f"{title}, {count} of 28" for title in carry_over.KINDS for count in (14, 9)]
    assert lines[2] == ["ertacache", *["40.0 (35.0)"] * 4]
    assert lines[3] == ["seacache", "30.0 (25.0)", "\N{EN DASH}", *["30.0 (25.0)"] * 2]


def test_one_odd_prompt_among_eight_costs_the_others_nothing():
    """Plain least squares follows the prompt with the largest errors, and loses 10 dB on all others."""
    pipeline = ablation.Pipeline("flux", calibrating=8, held_out=2)
    usual, with_empty = (pipeline.values(variant, 14) for variant in (ablation.DEFAULT, ablation.WITH_EMPTY[0]))
    assert np.mean(with_empty) > np.mean(usual) - 2
