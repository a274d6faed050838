"""The Triton backend: `backend` on the host, and the kernels it launches."""
