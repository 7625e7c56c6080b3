"""Searching continuations of a point: many are made, scored and pruned, and every one is a branch.

What comes next is a pure function of the settings and of what is stored (``plan``); it is made in rounds, each of one
batch, whose turns are committed together (``rounds``); so a search that was killed goes on as if it had not been.
"""
