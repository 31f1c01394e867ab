"""The Triton kernels: one op, one file, the contracts of `pagemill.kernels`. Importing this needs triton (`pagemill[gpu]`)."""

import os

# A product and a sum in one rounding, as these kernels were tested: Triton 3.10 changes what it does unasked.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
