"""What both libraries of `csrc/` have in common: what a call looks like, what they are told, how they are found.

looks.py → told.py, with projected.py → arguments.py, the struct that both take; opened.py checks a library.
"""
