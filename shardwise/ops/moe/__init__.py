"""Mixture-of-experts operators: references, Triton grouped kernels, MXFP4, adapters to TRT-LLM kernels."""
