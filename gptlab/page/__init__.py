"""`gptlab page`: runs, comparisons and the lens in a browser, served to whoever has the link, and to nobody else."""
