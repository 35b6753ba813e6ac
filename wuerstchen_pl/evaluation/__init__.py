"""How good the images are: prompts -> a folder of images -> scores -> a report."""
