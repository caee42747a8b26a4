"""Kernels, each beside the plain definition of its result: one function with `implementation=`."""
