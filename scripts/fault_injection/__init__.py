"""Faults and ends of programs: nothing is lost, and a message says what happened.

``python -m scripts.fault_injection KIND``: one module for each kind of fault, which returns what is
not as it should be.
"""
