"""How good the pictures are: prompts -> a folder of pictures -> scores -> a report."""
