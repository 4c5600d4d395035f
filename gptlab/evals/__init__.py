"""What a trained model scores on tests that others made, each block's reading next to the last one's."""
