"""Instructions whose following a program can check: the 25 types of IFEval (Zhou et al. 2023, arXiv 2311.07911).

`instructions` reads them from data and asks whether a text follows them, strictly or loosely; `wording`, `form` and
`lengths` hold one small class for each type, whose fields are the data's keyword arguments; `language` and `textparts`
are what these share. The checks are our own code. What a type accepts follows the authors' published checkers, quirks
included, so that accuracies compare; each class says where it departs. Imports neither torch nor a stage folder, so
that a judge and an evaluator can both use it.
"""
