"""Kernels: one op, one file, one contract (see ARCHITECTURE.md)."""
