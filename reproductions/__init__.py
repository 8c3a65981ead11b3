"""The paper's claims as experiments that run, resume, and end in a verdict.

``python -m reproductions run quick`` runs the quick study; README.md says the rest.
"""
