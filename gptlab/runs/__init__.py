"""Run folders, checkpoints and exact resume: what a run was, written down."""
