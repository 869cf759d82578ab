"""Silences libraries that print messages nobody asked for."""

import os


def quiet_tensorflow():
    """Silences the messages that TensorFlow prints on import. Call this before importing it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
