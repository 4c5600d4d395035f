"""Is a signal bias or noise: measures on gradients, on labels and on what collapses, of one model as it stands."""
