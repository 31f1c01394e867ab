"""The Triton kernels: one op, one file, the contracts of `pagemill.kernels`. Importing this needs triton (`pagemill[gpu]`)."""
