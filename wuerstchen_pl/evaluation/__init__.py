"""Evaluation: prompts -> a folder of generated images -> metrics -> a report."""
