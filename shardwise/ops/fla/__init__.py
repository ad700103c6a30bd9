"""Flash linear attention: the delta rule and its gated form."""
