"""Fit a calibration: a file for each stage of docs/method.md, recipe.py on top; imports point down this list only.

recipe, explain, cost, predict, result, published, end_to_end, schedule, step_by_step, least_squares, rerun, runs,
lockstep, micro_batch, work, record, store
"""
