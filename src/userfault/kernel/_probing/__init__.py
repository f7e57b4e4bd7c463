"""How `probe` finds out what it reports: what there is to try, the trials, the ways in, and the remedies."""
