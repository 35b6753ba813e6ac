"""A check of the package on one GPU in ten minutes: correct, fast, and what the estimates say.

``make gpu-prepare`` fills ``.gpu/`` where there is a network, and ``make gpu-check`` runs the check
on the machine with the GPU. CONTRIBUTING.md says what each section decides.
"""
