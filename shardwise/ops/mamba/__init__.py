"""State-space mixers (Mamba2) and their causal convolution.

reference, triton, flashinfer           the scan's operators; `ssm` and `checks` are what the cached ones share,
                                        `metadata` cuts prefill tokens into chunks
ssd                                     the scan in plain PyTorch
scan, ssd_kernels, ssd_step_kernels     the scan on Triton kernels: its launches, prompts, single tokens
conv_reference, conv_triton, conv_cuda  the convolution's operators; `conv` is what those in place share
conv_kernels, conv_step_kernels         Triton kernels of the convolution; `conv.cu` is CUDA C++
"""
