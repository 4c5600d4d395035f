"""Measuring training steps against the arithmetic they need and against peers, interleaved, in one process."""
