"""What frozen networks make of pictures, written once and read in their place."""
