"""Films with several findings each: one network for all of them, whose features stand for a film (Haq et al. 2020)."""
