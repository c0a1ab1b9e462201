"""Judges and pair rules that the claims use and that are no part of prefloop: named in recipes by path."""
