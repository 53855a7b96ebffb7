"""Calibrate while a pipeline is used: `ertacache.enable`. Imports point down this list only.

handle, fitting, state, follow, watch, store, setting
"""
