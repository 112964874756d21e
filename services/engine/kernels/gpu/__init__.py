"""Triton kernels, one to a file, and the backend of them. Imported only on a GPU or in the interpreter."""
