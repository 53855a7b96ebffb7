"""Fit a calibration: a file for each stage of docs/method.md, recipe.py on top; imports point down this list only.

recipe, explain, predict, published, end_to_end, schedule, step_by_step, least_squares, rerun, runs, lockstep,
record, store
"""
