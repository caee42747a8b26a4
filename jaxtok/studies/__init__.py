"""Small experiments that show a paper's claim with its baselines: `jaxtok study CONFIG`."""
