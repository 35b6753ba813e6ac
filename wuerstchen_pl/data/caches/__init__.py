"""What frozen networks make of images, written once and read in their place."""
