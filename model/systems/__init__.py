"""The systems that are compared: Med-MICN and its baselines, one trainer and one protocol for all."""
