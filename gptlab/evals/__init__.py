"""What a trained model scores on tests that others made, each block's reading beside the last one's."""
