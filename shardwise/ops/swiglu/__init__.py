"""Gated MLPs with SiLU: down(silu(gate(x)) * up(x)), from separate or concatenated projections."""
