"""Flash linear attention: the delta rule and its gated form.

reference, fla            the operators; `checks` is what they share
delta                     the rule in plain PyTorch
chunked, step, kernels    fla's chunked kernels one after another; launches and kernels of our own around them
decode                    a step of the runtime's gated delta layers in one kernel
prefill, prefill_kernels  prompts of these layers in two kernels; `rule_kernels` is what all our kernels share
"""
