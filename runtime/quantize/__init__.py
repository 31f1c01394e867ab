"""Quantised checkpoints made from a model and pages: `pagemill quantize`."""
