"""The commands, one file each: they compose the lower floors over the records that the loop yields."""
