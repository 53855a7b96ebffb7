"""Trains the embedded tiny pipelines: captioned emoji, drawn scenes for tests, and the training stages.

Shared by the model folders; each folder's `train_tiny.py` names only its own small configuration.
Nothing here is needed to generate, calibrate or compare.
"""
