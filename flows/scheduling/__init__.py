"""Runs that repeat: what is new, what may be trained on, when to train, and the schedule that a server keeps."""
