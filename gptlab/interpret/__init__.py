"""Looking into a trained model: what it writes, and what each of its blocks would have said."""
