"""Fitting packed weights to float ones: `rtn` (nearest), `gptq` (second order), `lloyd` (levels)."""
